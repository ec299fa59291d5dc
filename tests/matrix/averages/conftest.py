"""A small module with a norm and real loaders, trained by a quiet trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, STEPSparsityCallback

BATCHES = 3  # per epoch
SWITCH = 4  # in the middle of the second epoch
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=0.01),
    "STEP": STEP(AtStep(SWITCH), lam=0.01),
}


class Net(pl.LightningModule):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh(), nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0][:, :4].sin()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen = {name: module.weight.detach().clone() for name, module in layers(self).items()}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(8 * BATCHES, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), batch_size=8)

    val_dataloader = predict_dataloader = train_dataloader


def layers(module: nn.Module) -> dict[str, nn.Module]:
    return {"net.0.weight": module.net[0], "net.3.weight": module.net[3]}


def mask_by_sorting(weight: Tensor, n: int, m: int) -> Tensor:
    """What a forward pass should see: every group sorted as a Python list, equal magnitudes keep the lower place."""
    groups = weight.detach().reshape(-1, m)
    kept = [sorted(range(m), key=lambda i, row=row: -abs(row[i]))[:n] for row in groups.tolist()]
    mask = torch.tensor([[i in places for i in range(m)] for places in kept])
    return (groups * mask).reshape(weight.shape)


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Any:
    """Every recipe, with its switch (if it has one) after 4 steps of 3 an epoch."""
    return request.param


@pytest.fixture
def recipes() -> dict[str, Any]:
    """The recipes by name."""
    return RECIPES


@pytest.fixture
def make_module() -> type[Net]:
    return Net


@pytest.fixture
def make_callback() -> Callable[..., STEPSparsityCallback]:
    def make(recipe: Any) -> STEPSparsityCallback:
        return STEPSparsityCallback(n=2, m=4, recipe=recipe, read_every=3, verbose=False)

    return make


@pytest.fixture
def by_sorting() -> Callable[[Tensor], Tensor]:
    return lambda weight: mask_by_sorting(weight, 2, 4)


@pytest.fixture
def make_trainer(make_trainer: Callable[..., pl.Trainer]) -> Callable[..., pl.Trainer]:
    """The same, with one validation batch: what it sees is looked at."""
    return partial(make_trainer, limit_val_batches=1)
