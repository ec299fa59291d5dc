"""NaN and infinite gradients at random steps: whatever the recipe, they stay in the tensor they came to."""

import json
import math
import random
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Dense,
    NMPattern,
    SparseExport,
    Sparsifier,
    STEPSparsityCallback,
    load_sparse,
)
from lightning_step.functional import find_violation
from lightning_step.parametrization import nm_masks

STEPS, SWITCH = 16, 8
RECIPES = {
    "STEP": lambda: STEP(AtStep(SWITCH), lam=1e-3),
    "STEP-auto": lambda: STEP(AutoSwitch(window=2, threshold=1e-30, t_min=1, t_max=SWITCH), lam=1e-3),
    "SRSTE": lambda: SRSTE(lam=1e-2),
    "STE": lambda: STE(),
    "ASP": lambda: ASP(AtStep(SWITCH)),
    "Dense": lambda: Dense(),
}
VALUES = [math.nan, math.inf, -math.inf]


class Branches(nn.Module):
    """Two branches with nothing in common but the optimizer, so that only one of them can be to blame."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.sick, self.well = (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))

    def forward(self, x):
        return self.sick(x).square().mean() + (self.well(x) - x[:, :4].sin()).square().mean()


def batch(step):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def train(make, poisoned=frozenset(), value=math.nan):
    """Returns the model, its sparsifier, the optimizer and the texts of our warnings."""
    model = Branches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, 2, 4, recipe=make(), total_steps=STEPS, read_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # none is dropped because it came before
        for step in range(STEPS):
            model(batch(step)).backward()
            if step in poisoned:
                dict(model.named_parameters())["sick.0.weight"].grad[0, 0] = value
            optimizer.step()
            optimizer.zero_grad()
    return model, sparsifier, optimizer, [str(warning.message) for warning in caught]


def bits(model, branch):
    return {name: tensor.view(torch.int32).tolist() for name, tensor in model.state_dict().items() if branch in name}


def second_moments(model, optimizer, branch):
    return {name: optimizer.state[parameter]["exp_avg_sq"] for name, parameter in model.named_parameters() if branch in name}


@pytest.fixture(scope="module")
def undisturbed():
    return {name: train(make) for name, make in RECIPES.items()}


DRAWS = [random.Random(seed) for seed in range(6)]
EARLY = [frozenset(draw.sample(range(SWITCH), draw.randint(1, 3))) for draw in DRAWS]
LATE = [frozenset(draw.sample(range(SWITCH, STEPS), draw.randint(1, 3))) for draw in DRAWS]
CASES = list(zip(EARLY + LATE, VALUES * 4, strict=True))
IDS = [f"{value} at {','.join(map(str, sorted(steps)))}" for steps, value in CASES]


@pytest.mark.parametrize(("poisoned", "value"), CASES, ids=IDS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_gradient_stays_in_its_own_tensors(name, poisoned, value, undisturbed):
    model, sparsifier, optimizer, texts = train(RECIPES[name], poisoned, value)
    assert model.sick[0].weight.isnan().any(), "the poison did not work"
    # Training of the others goes on. STEP does not switch on a second moment that is not finite, so it stays dense.
    stays_dense = name.startswith("STEP") and min(poisoned) < SWITCH
    twin, its_sparsifier, its_optimizer, _ = undisturbed["Dense" if stays_dense else name]
    assert bits(model, "well") == bits(twin, "well")
    assert sparsifier.phase == its_sparsifier.phase
    # Nothing is frozen from it, and what was frozen before is left as it was.
    assert sparsifier.frozen == its_sparsifier.frozen
    moments, its_moments = (second_moments(m, o, "") for m, o in ((model, optimizer), (twin, its_optimizer)))
    assert all(torch.equal(moments[p], its_moments[p]) and moments[p].isfinite().all() for p in sparsifier.frozen)
    # No sample is taken from it.
    json.dumps(sparsifier.state_dict(), allow_nan=False)
    # One warning of each kind at most.
    kinds = [text.partition(", but got")[0] for text in texts]
    gradient, moment = "Expected finite gradients", "Expected a finite second moment at the switch"
    assert kinds == ([gradient] * (name == "STEP-auto") + [moment] if stays_dense else [])
    # Masks keep exactly n:m whatever the numbers are.
    if sparsifier.phase == 2:
        assert {mask.pattern for mask in nm_masks(model).values()} == {NMPattern(2, 4)}
        for layer in (model.sick[0], model.sick[2], model.well[0], model.well[2]):
            assert find_violation(layer.weight.detach(), NMPattern(2, 4)) is None


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Branches()

    def training_step(self, _, batch_idx):
        return self.net(batch(self.global_step))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))


class Poison(pl.Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps:
            pl_module.net.sick[2].bias.grad[:] = math.nan


@pytest.mark.parametrize("poisoned", [EARLY[0], LATE[0]], ids=["early", "late"])
@pytest.mark.parametrize("name", RECIPES)
def test_in_a_trainer_the_run_ends_and_exports_what_it_has(name, poisoned, undisturbed, tmp_path):
    path = tmp_path / "model.safetensors"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[
            STEPSparsityCallback(recipe=RECIPES[name](), read_every=1, verbose=False),
            Poison(poisoned),
            SparseExport(str(path), module="net"),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    assert trainer.global_step == STEPS
    stays_dense = name == "Dense" or (name.startswith("STEP") and min(poisoned) < SWITCH)
    assert bits(module.net, "well") == bits(undisturbed["Dense" if stays_dense else name][0], "well")
    texts = [str(warning.message) for warning in caught]
    if stays_dense:
        assert not path.exists()
        assert any("was not written and nothing was pruned" in text for text in texts)
        return
    tensors = load_sparse(path)
    assert tensors["sick.2.weight"].isnan().any()
    assert all(find_violation(tensors[key], NMPattern(2, 4)) is None for key in tensors if key.endswith("weight"))
