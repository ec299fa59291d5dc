"""Folders of runs: written scalar by scalar, or by a real trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_step import SparseExport, SparsityMonitor, STEPSparsityCallback
from lightning_step.recipes import Recipe

Write = Callable[..., Path]
STEPS, BETA2 = 24, 0.8  # a window of 5 steps
NASTY = '<script>alert("x")</script> & "q" \'a\' $\\frac{1}$ é _\x07\nend'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run: tags to values by step, and texts."""

    def run(name: str, scalars: Mapping[str, Mapping[int, float]], texts: Mapping[str, str] | None = None) -> Path:
        with SummaryWriter(str(tmp_path / name)) as writer:
            for tag, points in scalars.items():
                for step, value in points.items():
                    writer.add_scalar(tag, value, step)
            for tag, text in (texts or {}).items():
                writer.add_text(tag, text, 0)
        return tmp_path / name

    return run


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.flip(1)).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch) - batch.flip(1)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, BETA2))

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)

    val_dataloader = train_dataloader


def train(root: Path, name: str, recipe: Recipe, every: int = 1) -> Path:
    """A real run that logs every so many steps, with an exported file in its folder."""
    torch.manual_seed(3)
    logger = TensorBoardLogger(root, name=name, version="")
    callbacks: list[pl.Callback] = [
        STEPSparsityCallback(recipe=recipe, read_every=1, verbose=False),
        SparsityMonitor(per_layer=True),
        SparseExport(str(root / name / "model.safetensors"), one_shot=True),
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=every,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(Tiny())
    return root / name


def colours(path: Path) -> int:
    """How many colours a picture has."""
    from matplotlib.image import imread

    pixels = np.ascontiguousarray((imread(path) * 255).astype(np.uint8))  # (height, width, 4)
    return len(np.unique(pixels.view(np.uint32)))
