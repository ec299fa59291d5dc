"""Fits a small module with Lightning's Trainer: alone, under DDP and under FSDP2. Writes what came out."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Concentration,
    Dense,
    MaskDecay,
    SparseExport,
    SparsityMonitor,
    STEPSparsityCallback,
    StructureDecay,
)

STEPS, HALF = 12, 8
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(1)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AutoSwitch(window=4, threshold=1.5e-4, t_min=2, t_max=10), lam=1e-2),
    "decays": StructureDecay(MaskDecay(STEP(Concentration(1e9, window=3, t_min=2, t_max=10)), end=0.75), end=10),
}
FOLDER = Path(sys.argv[-1])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Module(pl.LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late  # layers come in configure_model
        if not late:
            self.build()

    def build(self) -> None:
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(8, 12).double(), nn.Linear(12, 5).double()

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "first"):
            self.build()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.first.bias, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.first, self.last):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, index: Tensor, batch_idx: int) -> Tensor:
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(self.global_step), dtype=torch.float64)
        y = x[:, :5].sin()
        if self.trainer.world_size > 1:
            x, y = x[RANK::WORLD], y[RANK::WORLD]
        return nn.functional.mse_loss(self.last(self.first(x).tanh()), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, betas=(0.9, 0.9))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(8), batch_size=1)


ENGINES: dict[str, Callable[[], Any]] = {
    "alone": lambda: "auto",
    "DDP": lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)),
    "FSDP2, one file": lambda: fsdp2(save_distributed_checkpoint=False),
    "FSDP2, sharded files": lambda: fsdp2(save_distributed_checkpoint=True),
}


def fsdp2(**arguments: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(WORLD, 1, process_group_backend="gloo", timeout=timedelta(seconds=60), **arguments)


class Die(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == HALF + 1 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(
    engine: str, recipe: str, *, folder: Path, ckpt_path: Any = None, late: bool = False, extra: Any = ()
) -> dict[str, Any]:
    """Fit and say what came out; checkpoints and the export go to the folder."""
    export = SparseExport(str(folder / "model.safetensors"), one_shot=recipe == "Dense")
    callback = STEPSparsityCallback(recipe=RECIPES[recipe], read_every=1, verbose=False)
    saving = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF // 2, save_top_k=-1)
    loggers = [pl.loggers.CSVLogger(folder / "logs"), pl.loggers.TensorBoardLogger(folder / "board")]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if engine == "alone" else WORLD,
        strategy=ENGINES[engine](),
        callbacks=[callback, SparsityMonitor(per_layer=True, histograms_every=4, figure=False), saving, export, *extra],
        max_steps=STEPS,
        max_epochs=-1,
        logger=loggers if RANK == 0 else False,  # the other has nobody to tell, and has to measure all the same
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module(late)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    state = callback.state_dict()["optimizers"][0]
    return {
        "weights": {n: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for n, w in module.state_dict().items()},
        "state": state,
        "sharded": any(isinstance(p, DTensor) for p in module.parameters()),
        "exported": None if export.exported is None else export.exported.bytes,
    }


def save(name: str, value: Any) -> None:
    torch.save(value, FOLDER / f"{name}.{RANK}.pt")


def checkpoint(engine: str, recipe: str) -> Path:
    return FOLDER / engine / recipe / f"step={HALF}.ckpt"


@contextmanager
def single() -> Iterator[None]:
    """As if this were the only process."""
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if "RANK" in key or "WORLD" in key or "ELASTIC" in key}
    yield
    os.environ.update(hidden)


def alone() -> None:
    with single():
        for recipe in RECIPES:
            save(f"alone, {recipe}", fit("alone", recipe, folder=FOLDER / "alone" / recipe))


def together() -> None:
    for engine in ("DDP", "FSDP2, one file"):
        for recipe in RECIPES:
            folder = FOLDER / engine / recipe
            save(f"{engine}, {recipe}", fit(engine, recipe, folder=folder))
            other = FOLDER / f"{engine}, resumed" / recipe
            save(f"{engine} to {engine}, {recipe}", fit(engine, recipe, folder=other, ckpt_path=checkpoint(engine, recipe)))
    for engine in ("DDP", "FSDP2, one file"):
        save(
            f"alone to {engine}, STEP",
            fit(engine, "STEP", folder=FOLDER / "x" / engine, ckpt_path=checkpoint("alone", "STEP")),
        )
    for recipe in ("STEP", "ASP"):
        engine = "FSDP2, sharded files"
        save(f"{engine}, {recipe}", fit(engine, recipe, folder=FOLDER / engine / recipe, late=True))
        save(
            f"{engine} to {engine}, {recipe}",
            fit(engine, recipe, folder=FOLDER / "y" / recipe, ckpt_path=checkpoint(engine, recipe)),
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    task = sys.argv[1]
    if task == "train":
        if RANK == 0:
            alone()
        together()
        dist.barrier()
        dist.destroy_process_group()
        if RANK == 0:
            with single():
                for engine in ("DDP", "FSDP2, one file"):
                    for recipe in RECIPES:
                        save(
                            f"{engine} to alone, {recipe}",
                            fit("alone", recipe, folder=FOLDER / "z", ckpt_path=checkpoint(engine, recipe)),
                        )
    elif task == "resume sharded files on one":
        for recipe in ("STEP", "ASP"):
            engine = "FSDP2, sharded files"
            save(
                f"{engine} to one, {recipe}",
                fit(engine, recipe, folder=FOLDER / "w" / recipe, ckpt_path=checkpoint(engine, recipe)),
            )
        dist.destroy_process_group()
    elif task == "die":
        fit("DDP", "STEP", folder=FOLDER, extra=[Die()])
    else:
        newest = max(FOLDER.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
        save("resumed", {"from": newest.stem, **fit("DDP", "STEP", folder=FOLDER / "resumed", ckpt_path=newest)})
        save("undisturbed", fit("DDP", "STEP", folder=FOLDER / "undisturbed"))
        dist.barrier()
        dist.destroy_process_group()
