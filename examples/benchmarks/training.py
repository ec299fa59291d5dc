"""One run of a benchmark, from a setting to a dictionary of plain numbers."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cells import Cell
from pretraining import pretrained
from torch.optim.lr_scheduler import LambdaLR

from lightning_step import NMPattern, STEPSparsityCallback, apply_nm_masks, strip
from lightning_step.errors import TargetError


def quiet() -> None:
    """What a worker process does first: one thread, and only warnings that are news."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 calls what torch 2.13 deprecates
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


def train(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train one setting to the end.

    Args:
        cell: The setting.
        folder: Where the data are.

    Returns:
        What a line of results says of the setting and of what came of it; nothing of where and when.
    """
    started = time.monotonic()
    task, entry = cell.task, cell.entry
    before = pretrained(cell, folder, silent(cell)) if task.pretraining else None
    pl.seed_everything(cell.seed, verbose=False)
    model, data = task.make_model(cell.lr, folder), task.make_data(folder, cell.seed)
    if before is not None:
        model.load_state_dict(before)
    if entry.optimizer == "SGD":
        under_sgd(model, cell.lr)
    n, m = cell.sizes
    recipe = entry.make(cell.lam or 0.0)
    sparsity = STEPSparsityCallback(
        n or 2,  # without masks any will do
        m or 4,
        recipe,
        exclude=list(task.exclude),
        verbose=False,
        monitor=False,
    )
    history = History()
    trainer = pl.Trainer(
        max_steps=cell.steps,
        max_epochs=-1,
        val_check_interval=task.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[sparsity, history],
        **silent(cell),
    )
    trainer.fit(model, datamodule=data)
    scores = evaluated(trainer, cell, model, data)
    if trainer.global_step != cell.steps:
        raise RuntimeError(f"Expected {cell.steps} optimizer steps of {cell}, but got {trainer.global_step}.")
    events = [event for sparsifier in sparsity.sparsifiers for event in sparsifier.events]
    return {
        "key": cell.key,
        **described(cell),
        "loss": scores["val_loss"],
        "scores": scores,
        "losses": history.losses,
        "pruned": {} if entry.masked else pruned_scores(cell, model, data),
        "switches": [str(event) for event in events],
        "switch_steps": [event.step for event in events],
        "seconds": round(time.monotonic() - started, 1),
    }


def described(cell: Cell) -> dict[str, Any]:
    """A setting in the words of tables and figures, and as it was hashed."""
    entry, task = cell.entry, cell.task
    n, m = cell.sizes
    return {
        "task": task.name,
        "row": cell.row,
        "of": entry.of,
        "untuned": entry.untuned,
        "recipe": entry.recipe or cell.row,
        "n": n,
        "m": m,
        "seed": cell.seed,
        "lr": cell.lr,
        "lam": cell.lam,
        "optimizer": entry.optimizer,
        "steps": cell.steps,
        "times": entry.steps,
        "switch": entry.switch,
        "frozen": entry.frozen,
        "change": entry.change,
        "metric": {
            "chosen_by": task.metric,
            "reported": task.reported,
            "unit": task.unit,
            "also": task.also,
            "higher_is_better": task.higher_is_better,
        },
        "config": cell.config(),
    }


def evaluated(trainer: pl.Trainer, cell: Cell, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """Every score of the model as it is, on the validation data and, where they count, on the test data."""
    [scores] = trainer.validate(model, datamodule=data, verbose=False)
    if cell.task.reported.startswith("test_"):
        [tested] = trainer.test(model, datamodule=data, verbose=False)
        scores = {**scores, **tested}
    return {name: float(value) for name, value in scores.items()}


def pruned_scores(cell: Cell, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, dict[str, float]]:
    """Scores of a dense model pruned by magnitude and not trained on, for each pattern that fits a layer."""
    scores = {}
    for pattern in cell.task.pruned_to:
        n, m = map(int, pattern.split(":"))
        pruned = copy.deepcopy(model)
        strip(pruned)  # the masks of `Dense`, which never came on
        with suppress(TargetError):
            apply_nm_masks(pruned, NMPattern(n, m), exclude=list(cell.task.exclude))
            scores[pattern] = evaluated(pl.Trainer(**silent(cell)), cell, pruned, data)
    return scores


def under_sgd(model: pl.LightningModule, lr: float) -> None:
    """Let SGD with momentum train a model that has Adam, under the same schedule.

    Momentum and decay are those of the SR-STE paper's image classifiers.
    """
    setattr(model, "configure_optimizers", partial(sgd_like, model.configure_optimizers, lr))  # noqa: B010 - mypy


def sgd_like(configure: Any, lr: float) -> dict[str, Any]:
    """The same groups and the same schedule; groups without weight decay stay without."""
    made: Mapping[str, Any] = configure()
    adam, schedule = made["optimizer"], made["lr_scheduler"]
    groups = [{"params": g["params"], "weight_decay": 1e-4 if g["weight_decay"] else 0.0} for g in adam.param_groups]
    sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return {"optimizer": sgd, "lr_scheduler": {**schedule, "scheduler": LambdaLR(sgd, schedule["scheduler"].lr_lambdas)}}


def silent(cell: Cell) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": cell.task.batches,
        "limit_test_batches": cell.task.batches,
        **cell.task.trainer,
    }


class History(pl.Callback):
    """Keeps every validation loss, with the step it was measured at."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after every validation."""
        if trainer.state.fn == "fit":
            self.losses.append([trainer.global_step, float(trainer.callback_metrics["val_loss"])])
