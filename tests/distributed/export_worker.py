"""Fits on two processes and exports in the middle and the best checkpoint. Writes what every process saw of it."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_step import STEP, AtStep, SparseExport, STEPSparsityCallback
from tests.distributed.lightning_worker import ENGINES, FOLDER, WORLD, Module, save

BEST = 6


class Midway(pl.Callback):
    """Says that step 6 is the best, and exports there and then."""

    def __init__(self, export: SparseExport) -> None:
        self.export = export

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        pl_module.log("score", float(abs(trainer.global_step - BEST)))
        if trainer.global_step == BEST:
            state = pl_module.state_dict()
            self.weights = {n: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for n, w in state.items()}
            self.written = [str(each.path) for each in self.export.export_now(trainer)]


def fit(engine: str) -> dict[str, Any]:
    folder = FOLDER / engine
    midway = Midway(SparseExport(str(folder / "now.safetensors")))
    best = SparseExport(str(folder / "best-{format}.safetensors"), format=["dense", "packed"], which="best")
    saving = pl.callbacks.ModelCheckpoint(folder, "best", monitor="score", every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ENGINES[engine](),
        callbacks=[STEPSparsityCallback(recipe=STEP(AtStep(3)), verbose=False), midway, best, saving],
        max_steps=BEST + 3,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module())
    return {"weights": midway.weights, "now": midway.written, "best": best.written}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for engine in ("DDP", "FSDP2, one file"):
        save(engine, fit(engine))
    dist.destroy_process_group()
