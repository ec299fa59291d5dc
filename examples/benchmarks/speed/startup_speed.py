"""What is paid once: importing the package, starting a fit, writing and reading files."""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from side_by_side import Row, Settings, Work, medians, ratios
from torch import Tensor, nn

from lightning_step import NMPattern, STEPSparsityCallback, apply_nm_masks, export_model, load_sparse, strip

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def imports(settings: Settings) -> list[Row]:
    """Fresh processes in turns."""
    kinds = {"import lightning": "lightning", "with lightning_step": "lightning, lightning_step"}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for i in range(1 if settings.quick else 2 + settings.repeats // 3):
        for name, modules in kinds.items():
            command = [sys.executable, "-c", TIMED.format(modules)]
            seconds = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if i or settings.quick:  # the first one reads from disk what the others find in memory
                found[name].append(seconds)
    return ratios("import", {name: statistics.median(each) for name, each in found.items()}, "import lightning")


class Net(LightningModule):
    """Many small layers, side by side so that a step takes no time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def training_step(self, batch: Tensor) -> Tensor:
        """One layer is enough."""
        return self.layers[0](batch).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> Any:
        """One batch."""
        return torch.utils.data.DataLoader(list(torch.randn(2, 8)), batch_size=2)  # type: ignore[arg-type]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what a trainer says at every start; nothing of it stays, a test may run this among others."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_step")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fits(settings: Settings) -> list[Row]:
    """A fit of one step, with the callback and without; and how the difference grows with the number of modules."""
    rows: list[Row] = []
    added: dict[int, float] = {}
    few = settings._replace(repeats=max(1, settings.repeats // 5))
    for count in (20, 100) if settings.quick else (500, 2000):

        def fit(callbacks: list[Callback], count: int = count) -> None:
            with quiet():
                Trainer(
                    max_steps=1, accelerator="cpu", logger=False, callbacks=list(callbacks), enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False,
                ).fit(Net(count))  # fmt: skip

        works: dict[str, Work] = {
            "plain": lambda fit=fit: fit([]),  # type: ignore[misc]
            "with the callback": lambda fit=fit: fit([STEPSparsityCallback(n=2, m=4)]),  # type: ignore[misc]
        }
        seconds = medians(works, few, warm=1)
        added[count] = seconds["with the callback"] - seconds["plain"]
        rows += ratios("fit start-up", seconds, "plain", f"{count} modules, ")
        rows.append(Row("fit start-up", f"{count} modules, added", "us a module", added[count] / count * 1e6, added[count]))
    return rows


def files(settings: Settings) -> list[Row]:
    """Writing and reading every format against plain safetensors; `export_sizes.py` has them all, with their sizes."""
    from safetensors.torch import load_file, save_file

    width = 64 if settings.quick else 1024
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
    targets = apply_nm_masks(model, NMPattern(2, 4))
    strip(model)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / kind for kind in ("plain", "dense", "packed")}
        writers: dict[str, Work] = {
            "safetensors": lambda: save_file(tensors, paths["plain"]),
            "dense": lambda: export_model(model, paths["dense"], "dense", targets=targets),
            "packed": lambda: export_model(model, paths["packed"], "packed", targets=targets),
        }
        rows = ratios("files", medians(writers, settings), "safetensors", "write ")
        readers: dict[str, Work] = {
            "safetensors": lambda: model.load_state_dict(load_file(paths["plain"])),
            "dense": lambda: load_sparse(paths["dense"], model, backend="dense"),
            "packed": lambda: load_sparse(paths["packed"], model, backend="dense"),
        }
        return rows + ratios("files", medians(readers, settings), "safetensors", "read ")


def elapsed(start: float) -> str:
    """For the lines that say how far it is."""
    return f"{time.perf_counter() - start:.0f} s"
