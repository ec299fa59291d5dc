"""A tiny real LightningModule whose data depend on the step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn


class TinyModule(pl.LightningModule):
    def __init__(self, optimizer: str = "AdamW", **arguments: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)
        self.optimizer, self.arguments = optimizer, {"lr": 1e-2, **arguments}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 8, generator=generator)
        return x, x[:, :2].sin()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.batch(self.global_step)
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.batch(10_000)
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(self.batch(10_000)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.arguments)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.zeros(1))  # one step an epoch; the data come from `batch`

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture
def tiny() -> Callable[..., TinyModule]:
    """Makes the module, with the same weights each time."""

    def make(optimizer: str = "AdamW", **arguments: Any) -> TinyModule:
        torch.manual_seed(7)
        return TinyModule(optimizer, **arguments)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Makes a quiet trainer on the CPU."""

    def make(*callbacks: pl.Callback, steps: int = 20, **arguments: Any) -> pl.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
            "max_epochs": -1,
            "max_steps": steps,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**{**quiet, "callbacks": list(callbacks), **arguments})

    return make


@pytest.fixture
def board(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="tb")


@pytest.fixture
def read() -> Callable[[TensorBoardLogger], EventAccumulator]:
    """All that a logger wrote, by TensorBoard's own reader."""
    everything = dict.fromkeys(("scalars", "histograms", "tensors", "images"), 0)
    return lambda logger: EventAccumulator(logger.log_dir, size_guidance=everything).Reload()
