"""A small module with real loaders, trained by a quiet trainer; everything is a function of the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, STEPSparsityCallback, nm_masks

BATCHES = 3  # per epoch
SWITCH = 4  # in the middle of the second epoch
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=0.01),
    "STEP": STEP(AutoSwitch(window=3, threshold=1e-30, t_min=1, t_max=SWITCH), lam=0.01),
    "STEP for all": STEP(AtStep(SWITCH), scope="all"),
}


def rows(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs(), x[:, 4]], dim=1))


class Net(pl.LightningModule):
    """Two layers to mask, and one norm, which is not."""

    def __init__(self, lr: float = 0.01, batch_size: int = 8) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(rows(8 * BATCHES, seed=1), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(rows(16, seed=2), batch_size=16)

    test_dataloader = predict_dataloader = val_dataloader


def latent(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Any:
    """Every recipe, with its switch (if it has one) after 4 steps of 3 an epoch."""
    return request.param


@pytest.fixture
def recipes() -> dict[str, Any]:
    """The recipes by name."""
    return RECIPES


@pytest.fixture
def make_module() -> Callable[..., Net]:
    """Makes the module, with the same weights each time."""

    def make(kind: type[Net] = Net, **arguments: Any) -> Net:
        torch.manual_seed(7)
        return kind(**arguments)

    make.kind = Net  # type: ignore[attr-defined]
    return make


@pytest.fixture
def make_callback() -> Callable[..., STEPSparsityCallback]:
    def make(recipe: Any = RECIPES["STEP"], **arguments: Any) -> STEPSparsityCallback:
        return STEPSparsityCallback(**{"n": 1, "m": 4, "recipe": recipe, "read_every": 3, "verbose": False, **arguments})

    return make


@pytest.fixture
def look() -> Callable[..., dict[str, Any]]:
    """All that a stage could leave behind: weights, masks, our state, the optimizer's."""

    def look(module: pl.LightningModule, callback: STEPSparsityCallback, *, optimizer: bool = True) -> dict[str, Any]:
        seen = {
            "weights": latent(module),
            "masks": {name: repr(mask) for name, mask in nm_masks(module).items()},
            "callback": callback.state_dict(),
        }
        if optimizer:
            seen["optimizer"] = module.trainer.optimizers[0].state_dict()["state"]
        return seen

    return look


@pytest.fixture
def assert_same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def check(a: dict[str, Any], b: dict[str, Any]) -> None:
        assert a.keys() == b.keys()
        for part in a:
            assert is_same(a[part], b[part]), part

    return check


@pytest.fixture
def masked() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The weights as a forward pass should see them at 1:4, by sorting every group."""

    def masked(module: nn.Module) -> dict[str, Tensor]:
        weights = latent(module)
        for name in ("net.0.weight", "net.3.weight"):
            groups = weights[name].reshape(-1, 4)
            kept = torch.zeros_like(groups).scatter_(1, groups.abs().argmax(1, keepdim=True), 1.0)
            weights[name] = (groups * kept).reshape(weights[name].shape)
        return weights

    return masked


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Bit for bit, through dictionaries and lists."""
    return is_same
