"""What a model has learned before a recipe gets it, in tasks that fine-tune: dense weights, alike for all rows of a seed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from cells import Cell, hash_of

KEPT = Path(__file__).parents[2] / "out" / "pretrained"


def pretrained(cell: Cell, folder: Path, trainer: dict[str, object]) -> dict[str, torch.Tensor]:
    """Weights after dense training, made when they are first asked for.

    Args:
        cell: A run of a task with `Task.pretraining`.
        folder: Where the data are.
        trainer: What every trainer is told.

    Returns:
        A state dict.
    """
    task = cell.task
    path = KEPT / f"{task.name}-{hash_of({**task.config(), 'steps': 0, 'seed': cell.seed})}.pt"
    if not path.exists():
        pl.seed_everything(cell.seed, verbose=False)
        model = task.make_model(task.pretraining_rate, folder)
        fitting = pl.Trainer(max_steps=task.pretraining, max_epochs=-1, **{**trainer, "limit_val_batches": 0})  # type: ignore[arg-type]
        fitting.fit(model, datamodule=task.make_data(folder, cell.seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            torch.save(model.state_dict(), file)
        os.replace(file.name, path)  # another process may have been as fast, with the same bits
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state
