"""A compiled model under the Lightning Trainer, with our callbacks."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, SparseExport, STEPSparsityCallback, load_sparse

SWITCH = 3
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(SWITCH), lam=1e-2),
}
MASKED = ["net.fc.weight", "net.out.weight"]
# torch's own, of plain models too: Dynamo looks at what one block hands to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.fc(x).relu())


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.head = Body(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        return (self(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def whole(model, backend):
    return torch.compile(model, backend=backend)


def part(model, backend):
    model.net = torch.compile(model.net, backend=backend)
    return model


def in_place(model, backend):
    model.net.compile(backend=backend)
    return model


def fit(recipe, folder, compiled=lambda model: model, ckpt_path=None, max_steps=6):
    torch.manual_seed(1)
    model = Model()
    step = STEPSparsityCallback(recipe=recipe, exclude=["head"], overrides={"net.out": [1, 4]}, verbose=False)
    export = SparseExport(str(folder / "model.safetensors"))
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[step, export, ModelCheckpoint(folder, "last", every_n_epochs=1)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    trainer.fit(compiled(model), DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return model, step, export


def weights(model):
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Expected learned masks:UserWarning")  # Dense has none to write
@pytest.mark.parametrize("how", [whole, part, in_place])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_compiled_model_trains_and_exports_like_an_eager_one(counter, recipe, how, tmp_path):
    (tmp_path / "eager").mkdir()
    (tmp_path / "compiled").mkdir()
    eager, *_ = fit(recipe, tmp_path / "eager")
    backend = counter("eager")
    model, step, export = fit(recipe, tmp_path / "compiled", lambda model: how(model, backend))
    torch.testing.assert_close(weights(model), weights(eager))
    (sparsifier,) = step.sparsifiers
    assert [(t.name, str(t.pattern)) for t in sparsifier.targets.masked] == [*zip(MASKED, ["2:4", "1:4"], strict=True)]
    switched = any(event.step == SWITCH for event in sparsifier.events)
    assert switched == (type(recipe) in (ASP, STEP))
    if how is not whole:  # there Dynamo also traces what Lightning does around the forward pass
        assert (backend.graphs, backend.breaks) == (1 + switched, {})
    if not isinstance(recipe, Dense):
        assert list(export.exported.manifest.sparse) == MASKED
        plain = load_sparse(tmp_path / "compiled" / "model.safetensors", Model())
        twin = load_sparse(tmp_path / "eager" / "model.safetensors", Model())
        torch.testing.assert_close(weights(plain), weights(twin))
        assert (plain.net.out.weight.reshape(-1, 4) != 0).sum(1).tolist() == [1] * 32


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("how", [whole, in_place])
def test_checkpoints_have_plain_keys_and_resume_in_eager(counter, how, tmp_path):
    recipe = STEP(AtStep(SWITCH), lam=1e-2)
    half, rest, all_ = (tmp_path / name for name in ("half", "rest", "all"))
    for folder in (half, rest, all_):
        folder.mkdir()
    eager, *_ = fit(recipe, all_)
    fit(recipe, half, lambda model: how(model, counter("eager")), max_steps=4)
    state = torch.load(half / "last.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Model().state_dict())
    Model().load_state_dict(state, strict=True)
    resumed, step, _ = fit(recipe, rest, ckpt_path=half / "last.ckpt")
    torch.testing.assert_close(weights(resumed), weights(eager))
    assert [event.step for event in step.sparsifiers[0].events] == [SWITCH]


def test_a_part_compiled_by_the_user_keeps_torchs_keys_in_checkpoints_and_plain_names_in_our_state(counter, tmp_path):
    fit(STEP(AtStep(SWITCH), lam=1e-2), tmp_path, lambda model: part(model, counter("eager")))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "net._orig_mod.fc.weight" in checkpoint["state_dict"]  # as without masks: use `module.compile()` for plain keys
    (own,) = [state for name, state in checkpoint["callbacks"].items() if "STEPSparsity" in name]
    assert "_orig_mod" not in str(own)
    assert sorted(own["optimizers"][0]["frozen"]) == MASKED
