"""One run of the comparison, from a setting to a dictionary of plain numbers."""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from recipes_compared import ABLATIONS, PATTERNS, ROWS

sys.path.insert(0, str(Path(__file__).parents[1]))
from char_transformer import CharTransformer, TopicsDataModule

from lightning_step import NMPattern, STEPSparsityCallback, __version__, apply_nm_masks, strip

TASK: dict[str, Any] = {
    "steps": 1000,
    "model": {"width": 96, "layers": 2, "heads": 4, "context": 64},
    "data": {"batch_size": 16, "context": 64, "batches": 100},
    "torch": torch.__version__,
    "lightning": pl.__version__,
    "lightning-step": __version__,
}


SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Run:
    """One setting."""

    row: str
    pattern: str  # "2:4"; "" where there are no masks
    rate: float
    lam: float | None
    seed: int

    @property
    def key(self) -> str:
        """Its name, also of its file."""
        lam = "" if self.lam is None else f" lam {self.lam:g}"
        pattern = f" {self.pattern.replace(':', '-')}" if self.pattern else ""
        name = f"{self.row}{pattern} rate {self.rate:g}{lam} seed {self.seed}"
        return name.replace(" %", "pc").replace(",", "").replace(" ", "_")


def quiet() -> None:
    """What a worker process does first: one thread, and only warnings that are news."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 calls what torch 2.13 deprecates


def train(run: Run) -> dict[str, Any]:
    """Train one setting to the end.

    Args:
        run: The setting.

    Returns:
        The setting, the validation loss after every 100 steps and at the end, the switches, the seconds.
    """
    started = time.monotonic()
    pl.seed_everything(run.seed, verbose=False)
    model = CharTransformer(**TASK["model"], lr=run.rate)
    data = TopicsDataModule(**TASK["data"], seed=run.seed)
    recipe = (ROWS | ABLATIONS)[run.row].make(run.lam or 0.0)
    n, m = parts(run.pattern) if run.pattern else (2, 4)  # without masks any will do
    sparsity = STEPSparsityCallback(n, m, recipe, verbose=False)
    history = History()
    trainer = pl.Trainer(max_steps=TASK["steps"], max_epochs=-1, callbacks=[sparsity, history], **SILENT)
    trainer.fit(model, data)
    [final] = trainer.validate(model, data, verbose=False)
    events = [event for sparsifier in sparsity.sparsifiers for event in sparsifier.events]
    return {
        **asdict(run),
        "task": TASK,
        "val_loss": final["val_loss"],
        "val_losses": history.losses,
        "pruned": {} if run.pattern else pruned_losses(model, data),
        "switches": [str(event) for event in events],
        "switch_steps": [event.step for event in events],
        "seconds": round(time.monotonic() - started, 1),
    }


def pruned_losses(model: CharTransformer, data: TopicsDataModule) -> dict[str, float]:
    """Validation loss of a dense model pruned by magnitude and not trained on, for each pattern of the comparison."""
    losses = {}
    for pattern in PATTERNS:
        pruned = copy.deepcopy(model)
        strip(pruned)  # the masks of `Dense`, which never came on
        apply_nm_masks(pruned, NMPattern(*parts(pattern)))
        [final] = pl.Trainer(**SILENT).validate(pruned, data, verbose=False)
        losses[pattern] = final["val_loss"]
    return losses


def parts(pattern: str) -> tuple[int, int]:
    """The two numbers of a pattern as it is written."""
    n, m = pattern.split(":")
    return int(n), int(m)


class History(pl.Callback):
    """Keeps every validation loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after every validation."""
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
