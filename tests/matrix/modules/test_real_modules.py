"""Real models under every recipe: what they compute, their checkpoints, and the file that comes out."""

import copy
import io
import pickle

import pytest
import torch

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    NMPattern,
    Sparsifier,
    export_model,
    find_targets,
    load_sparse,
    nm_masks,
    strip,
)
from lightning_step.errors import ConfigurationError

RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(2)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(2), lam=1e-2),
}
STEPS = 4
# torch's own, of plain models too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]


def assert_close(ours, theirs, where=""):
    """Equal but for how a matrix product rounds, which depends on where in memory its operands lie."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")


def latent(model):
    return dict(model.named_parameters())


def names(model):
    return (
        list(model.state_dict()),
        [(name, p.shape) for name, p in model.named_parameters()],
        [*dict(model.named_modules())],
    )


@torch.no_grad()
def pruned_twin(case, model, by_sorting, on):
    """A plain model with the weights of a masked one, the zeros written in by hand."""
    twin = case.build()
    twin.load_state_dict(model.state_dict())
    for name, dim in case.dims(twin).items() if on else ():
        latent(twin)[name].mul_(by_sorting(latent(twin)[name], dim))
    return twin.train(model.training)


class Run:
    """A model trained for a few steps; every step's loss and gradients are compared with those of a plain model."""

    def __init__(self, case, recipe, by_sorting):
        self.case, self.recipe, self.by_sorting = case, recipe, by_sorting
        self.plain = case.build()
        self.model = case.build()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sparsifier = Sparsifier(self.model, optimizer, 2, 4, recipe=recipe, total_steps=STEPS, **case.select)
        self.on = []
        for t in range(STEPS):
            self.on.append(self.sparsifier.phase == 2)
            twin = pruned_twin(case, self.model, by_sorting, self.on[-1])
            loss = case.loss(self.model, t)
            loss.backward()
            self.check(twin, loss, t)
            optimizer.step()
            optimizer.zero_grad()

    def check(self, twin, loss, t):
        expected = self.case.loss(twin, t)
        expected.backward()
        assert_close(loss, expected, t)
        fixed = self.on[-1] and isinstance(self.recipe, ASP)
        dims = self.case.dims(twin)
        for (name, ours), theirs in zip(latent(self.model).items(), twin.parameters(), strict=True):
            grad = theirs.grad
            if fixed and name in dims:
                grad = grad * self.by_sorting(ours, dims[name])
            assert (ours.grad is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(
                    ours.grad, grad, rtol=0, atol=0, msg=lambda text, name=name: f"{t} {name}: {text}"
                )


@pytest.fixture(scope="session", params=RECIPES)
def run(request, case, by_sorting):
    torch.set_num_threads(1)
    return Run(case, RECIPES[request.param], by_sorting)


def outputs(case, model):
    with torch.no_grad():
        return case.outputs(model.eval())


def test_what_is_masked_and_along_which_dim_is_as_written_by_hand(case):
    targets = find_targets(case.build(), NMPattern(2, 4), **case.select)
    assert {t.name: t.dim for t in targets.masked} == case.dims(case.build())


def test_every_step_computes_what_a_plain_model_pruned_by_hand_does(run):
    masks_on = {"Dense": [], "ASP": [2, 3], "STE": [0, 1, 2, 3], "SRSTE": [0, 1, 2, 3], "STEP": [2, 3]}
    assert [t for t, on in enumerate(run.on) if on] == masks_on[type(run.recipe).__name__]
    assert (run.sparsifier.phase == 2) == bool(masks_on[type(run.recipe).__name__])
    assert len(run.sparsifier.frozen) == (len(run.sparsifier.targets.masked) if isinstance(run.recipe, STEP) else 0)


def test_checkpoints_have_plain_keys_and_load_both_ways(run):
    assert names(run.model) == names(run.plain)
    torch.save(run.model.state_dict(), file := io.BytesIO())
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    plain, masked = run.case.build(), copy.deepcopy(run.model)
    plain.load_state_dict(state, strict=True)
    masked.load_state_dict(run.plain.state_dict(), strict=True)
    for ours, theirs in ((plain, run.model), (masked, run.plain)):
        torch.testing.assert_close(latent(ours), latent(theirs), rtol=0, atol=0)
    twin = pruned_twin(run.case, masked, run.by_sorting, run.sparsifier.phase == 2)
    assert_close(outputs(run.case, masked), outputs(run.case, twin))


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_stripped_exported_and_loaded_it_computes_the_same(run, format, tmp_path):
    masked = copy.deepcopy(run.model)
    expected, dims = outputs(run.case, masked), run.case.dims(run.plain)
    assert expected.isfinite().all()
    path = tmp_path / "model.safetensors"
    if run.sparsifier.phase == 1:
        with pytest.raises(ConfigurationError, match="masks of which none is on"):
            export_model(masked, path, format)
        assert strip(masked) == []
    else:
        assert set(export_model(masked, path, format).manifest.sparse) == set(dims)
        loaded = load_sparse(path, run.case.build())
        assert_close(outputs(run.case, loaded), expected)
        assert strip(masked) == list(dims)
        torch.testing.assert_close(loaded.state_dict(), masked.state_dict(), rtol=0, atol=0)
        for name, dim in dims.items():
            kept = run.by_sorting(latent(run.model)[name], dim)
            assert torch.equal(latent(masked)[name], torch.where(kept, latent(run.model)[name], 0.0)), name
    assert [type(module) for module in masked.modules()] == [type(module) for module in run.plain.modules()]
    assert (names(masked), nm_masks(masked)) == (names(run.plain), {})
    assert_close(outputs(run.case, masked), expected)
    assert_close(outputs(run.case, pickle.loads(pickle.dumps(masked))), expected)


def test_copies_and_whole_saved_models_compute_the_same(run):
    model = copy.deepcopy(run.model)
    expected = outputs(run.case, model)
    torch.save(model, file := io.BytesIO())
    twins = [torch.load(io.BytesIO(file.getvalue()), weights_only=False), copy.deepcopy(model)]
    for twin in twins:
        assert_close(outputs(run.case, twin), expected)
        assert [mask.enabled for mask in nm_masks(twin).values()] == [mask.enabled for mask in nm_masks(model).values()]
    strip(model)
    assert all(nm_masks(twin) for twin in twins)
