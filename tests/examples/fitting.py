"""A fit under STEP of an example's classes, and whether its file gives the same model back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_step import STEP, AtStep, SparseExport, STEPSparsityCallback, load_sparse
from lightning_step.export import read_manifest
from lightning_step.functional import find_violation

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def validate(model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """The metrics of a model as it is."""
    [metrics] = pl.Trainer(**QUIET).validate(model, data, verbose=False)
    return dict(metrics)


def check_fit(make: Callable[[], pl.LightningModule], data: pl.LightningDataModule, folder: Path) -> list[str]:
    """Fit for an epoch under STEP, export, load into a fresh model; returns the names of the sparse tensors."""
    pl.seed_everything(0, verbose=False)
    model, path = make(), str(folder / "sparse.safetensors")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    masks = STEPSparsityCallback(recipe=STEP(AtStep(0.5)), verbose=False)
    trainer = pl.Trainer(max_epochs=1, callbacks=[masks, SparseExport(path, format="packed", module="model")], **QUIET)
    trainer.fit(model, data)
    [sparsifier] = masks.sparsifiers
    assert [event.step for event in sparsifier.events] == [trainer.global_step // 2]
    assert trainer.global_step >= 2
    after = model.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    fresh = make()
    load_sparse(path, fresh.model)
    tensors = load_sparse(path)
    promised = read_manifest(path).sparse
    assert [name for name, entry in promised.items() if find_violation(tensors[name], entry.pattern, entry.dim)] == []
    expected = validate(model, data)
    assert validate(fresh, data) == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    return list(promised)
