"""Trains in processes that are killed. Run as ``python killing.py FOLDER PLANS``; prints a JSON report.

``PLANS`` is JSON, ``{name: [recipe, [moment, ...]]}``.

A parent imports everything once and forks one child after the other. Each child trains with a real Trainer from the newest
checkpoint that can be loaded, until SIGKILL ends it at its moment; the last one is left to finish. A moment is
``kind:step``. Kinds that come at a random time are done by the parent, from outside; kinds that name a place in the code
are done by the child itself, from a hook that only this harness puts there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, SparseExport, STEPSparsityCallback, load_sparse

STEPS, SWITCH, EVERY = 60, 30, 3
RECIPES = {
    "STEP": lambda: STEP(AutoSwitch(window=4, threshold=1e-30, t_min=2, t_max=SWITCH), lam=1e-3),
    "SRSTE": lambda: SRSTE(lam=1e-2),
    "STE": lambda: STE(),
    "ASP": lambda: ASP(AtStep(SWITCH)),
    "Dense": lambda: Dense(),
}
# Added right before the export: enough bytes that the kill can come while they are written.
BALLAST = 4_000_000


class Module(pl.LightningModule):
    """Tiny; its data are a function of the step alone, so that a resumed run sees the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(8, 16, generator=generator)
        return (self.net(x) - x[:, :4].sin()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.zeros(1))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Progress(pl.Callback):
    """Tells the parent about every step, and kills from inside where the moment says so."""

    def __init__(self, kind: str, step: int, pipe: int) -> None:
        self.kind, self.step, self.pipe = kind, step, pipe
        self.steps = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        os.write(self.pipe, b".")
        self.steps = trainer.global_step
        if self.kind == "timed" and self.steps >= self.step:
            os.write(self.pipe, b"!")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.kind == "gradients" and trainer.global_step >= self.step:
            die()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.kind == "stepped" and trainer.global_step >= self.step:
            die()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:  # right before the export
        self.steps = trainer.global_step
        pl_module.register_buffer("ballast", torch.arange(BALLAST, dtype=torch.float32))
        if self.kind == "export-timed":
            os.write(self.pipe, b"!")


class Dying(fsspec.implementations.local.LocalFileOpener):
    """Lightning's checkpoints go through here; half of the bytes are written."""

    def write(self, data: bytes) -> int:
        self.f.write(data[: len(data) // 2])
        self.f.flush()
        die()
        return 0


def copy_half(source: str, target: str, **_: Any) -> str:
    """What a move to another file system is when the process ends in the middle of it."""
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: len(data) // 2])
    die()
    return target


def deadly(function: Callable[..., Any], before: bool, after: bool, armed: Callable[[], bool]) -> Callable[..., Any]:
    """The function, with death before or after it."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if before and armed():
            die()
        result = function(*arguments, **keywords)
        if after and armed():
            die()
        return result

    return wrapped


def plant(kind: str, armed: Callable[[], bool]) -> None:
    """Hooks of the child. They do nothing until armed."""
    rename = deadly(os.rename, kind == "checkpoint-before-rename", kind == "checkpoint-after-rename", armed)

    def elsewhere(*arguments: Any, **keywords: Any) -> None:
        if kind == "checkpoint-torn" and armed():
            shutil.copyfile = copy_half  # type: ignore[assignment]
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(*arguments, **keywords)

    os.rename = elsewhere
    os.fsync = deadly(os.fsync, kind == "export-before-fsync", False, armed)
    Path.replace = deadly(  # type: ignore[method-assign]
        Path.replace, kind == "export-before-rename", kind == "export-after-rename", armed
    )
    if kind == "checkpoint-write":
        opener = fsspec.implementations.local.LocalFileOpener

        def open_armed(self: Any, path: str, mode: str = "rb", **keywords: Any) -> Any:
            return (Dying if "w" in mode and armed() else opener)(path, mode, fs=self, **keywords)

        fsspec.implementations.local.LocalFileSystem._open = open_armed


def newest(folder: Path) -> Iterator[Path]:
    """Checkpoints, the latest step first; of one step the latest file first."""
    paths = [path for path in folder.glob("*.ckpt") if path.stat().st_size]
    step = {path: int(path.stem.split("=")[1].split("-")[0]) for path in paths}
    yield from sorted(paths, key=lambda path: (step[path], path.stat().st_mtime_ns), reverse=True)


def newest_loadable(folder: Path) -> tuple[str | None, int]:
    """What a user does by hand after a crash, and how many torn files that passed over."""
    torn = 0
    for path in newest(folder):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError):  # no zip archive, or one without its end
            torn += 1
        else:
            return str(path), torn
    return None, torn


def train(folder: Path, recipe: str, kind: str, step: int, pipe: int) -> None:
    torch.manual_seed(0)
    progress = Progress(kind, step, pipe)
    plant(kind, lambda: progress.steps >= step)
    sparsity = STEPSparsityCallback(n=2, m=4, recipe=RECIPES[recipe](), read_every=4, verbose=False)
    callbacks: list[pl.Callback] = [
        sparsity,
        progress,
        pl.callbacks.ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=EVERY, save_top_k=-1),
        SparseExport(str(folder / "out" / "model.safetensors"), "packed"),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module()
    checkpoint, torn = newest_loadable(folder / "checkpoints")
    os.write(pipe, f"[{checkpoint and Path(checkpoint).stem}|{torn}]".encode())
    trainer.fit(module, ckpt_path=checkpoint)
    state = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "ours": sparsity.state_dict()}
    if kind != "none":
        signal.pause()  # the kill is on its way
    (folder / "end.json").write_text(json.dumps({name: digest(value) for name, value in state.items()}))


def digest(value: Any) -> str:
    """One number for nested state, bit for bit."""
    if isinstance(value, Tensor):
        value = (str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
    elif isinstance(value, dict):
        value = sorted((str(key), digest(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = [digest(item) for item in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def child(folder: Path, recipe: str, kind: str, step: int, source: random.Random) -> dict[str, Any]:
    """One process and its end."""
    read, write = os.pipe()
    there = hidden(folder / "out")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            train(folder, recipe, kind, step, write)
            code = 0
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode()[-2000:])
        finally:
            os._exit(code)
    os.close(write)
    said = b""
    killed_by_us = False
    while part := os.read(read, 65_536):
        said += part
        if b"!" in part and not killed_by_us:
            killed_by_us = True
            if kind == "export-timed":
                wait_for_writing(folder / "out", there)
            time.sleep(source.uniform(0, 0.003))
            os.kill(pid, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    start = said.partition(b"]")[0].decode(errors="replace").strip("[")
    return {
        "moment": f"{kind}:{step}",
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "from": start.partition("|")[0],
        "torn": int(start.partition("|")[2] or 0),
        "steps": said.count(b"."),
        "tail": "" if os.WIFSIGNALED(status) else said[-300:].decode(errors="replace"),
        "out": export_state(folder / "out"),
    }


def hidden(out: Path) -> set[str]:
    return {name for name in os.listdir(out) if name.startswith(".")} if out.exists() else set()


def wait_for_writing(out: Path, there: set[str]) -> None:
    """Until the second temporary file is there, ours having been made: safetensors now writes its bytes."""
    end = time.monotonic() + 1
    while time.monotonic() < end and len(hidden(out) - there) < 2:
        pass


def export_state(out: Path) -> dict[str, Any]:
    """What lies under the final name, and how many temporary files."""
    final = out / "model.safetensors"
    loaded = len(load_sparse(final)) if final.exists() else 0
    sizes = sorted(path.stat().st_size for path in out.glob("*") if path != final) if out.exists() else []
    return {"tensors": loaded, "left": sizes, "digest": digest(load_sparse(final)) if loaded else None}


def run(folder: Path, recipe: str, moments: list[str]) -> dict[str, Any]:
    """One training and all its deaths."""
    source = random.Random(0)
    deaths = []
    (folder / "checkpoints").mkdir(parents=True)
    for moment in [*moments, "none:0"]:
        kind, _, step = moment.partition(":")
        deaths.append(child(folder, recipe, kind, int(step), source))
    end = folder / "end.json"
    report = {"deaths": deaths, "end": json.loads(end.read_text()) if end.exists() else None}
    shutil.rmtree(folder)
    return report


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plans = json.loads(sys.argv[2])
    reports = {name: run(Path(sys.argv[1]) / name, recipe, moments) for name, (recipe, moments) in plans.items()}
    sys.stdout.write(json.dumps({"steps": STEPS, "switch": SWITCH, "reports": reports}))
