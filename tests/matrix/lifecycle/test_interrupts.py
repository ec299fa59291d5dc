"""Errors and Ctrl-C: the optimizer is the stock one again, no file is half-written, and one can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_step import SparseExport

CRASH = {"phase I": 3, "phase II": 6}  # right before an epoch's first step; the switch is after step 4


class Bad(pl.Callback):
    """Raises in the middle of a step: Lightning runs this within ``optimizer.step``."""

    def __init__(self, error: type[BaseException], step: int) -> None:
        self.error, self.step = error, step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("enough")


def interrupted(trainer: pl.Trainer, module: pl.LightningModule, error: type[BaseException]) -> None:
    expected = SystemExit if error is KeyboardInterrupt else error  # Lightning leaves the process after Ctrl-C
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(expected):
        trainer.fit(module)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("crash", CRASH.values(), ids=CRASH)
def test_an_interrupted_fit_takes_its_hooks_off_and_a_later_one_goes_on(
    crash: int,
    error: type[BaseException],
    recipe: Any,
    make_module: Any,
    make_callback: Any,
    make_trainer: Any,
    tmp_path: Path,
) -> None:
    module, callback, path = make_module(), make_callback(recipe), tmp_path / "out" / "model.safetensors"
    trainer = make_trainer(callback, SparseExport(str(path)), Bad(error, crash))
    interrupted(trainer, module, error)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []
    assert callback.sparsifiers[0].t == crash
    with warnings.catch_warnings(record=True):  # that the frozen moment is gone, or that nothing was learned
        warnings.simplefilter("always")
        make_trainer(callback, SparseExport(str(path))).fit(module)
    assert callback.sparsifiers[0].t == crash + 9
    assert path.exists() == (recipe.plan().masks is not None)


class BadBatch(Bad):
    """Raises before the forward pass."""

    def on_before_backward(self, *args: Any) -> None:
        return

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("enough")


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")  # OnExceptionCheckpoint makes Lightning look for one
@pytest.mark.parametrize(("error", "crash"), [(ZeroDivisionError, 3), (KeyboardInterrupt, 6)])
def test_a_checkpoint_written_on_the_way_out_says_what_an_ordinary_one_of_that_step_says(
    crash: int,
    error: type[BaseException],
    recipe: Any,
    make_module: Any,
    make_callback: Any,
    make_trainer: Any,
    same: Any,
    tmp_path: Path,
) -> None:
    ordinary = ModelCheckpoint(tmp_path / "in", "{step}", every_n_train_steps=1, save_top_k=-1)
    out = OnExceptionCheckpoint(str(tmp_path / "out"), "a")
    trainer = make_trainer(make_callback(recipe), BadBatch(error, crash), out, ordinary)
    interrupted(trainer, make_module(), error)
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in (f"in/step={crash}.ckpt", "out/a.ckpt"))
    for part in ("state_dict", "optimizer_states"):
        assert same(before[part], after[part]), part
    assert before["callbacks"]["STEPSparsityCallback"] == after["callbacks"]["STEPSparsityCallback"]
    assert after["callbacks"]["STEPSparsityCallback"]["optimizers"][0]["t"] == crash


SCRIPT = """
import os, signal, sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_step import STEP, AtStep, STEPSparsityCallback, SparseExport

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it

class Model(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

class Interrupts(pl.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    def on_exception(self, trainer, pl_module, exception):
        (optimizer,) = trainer.optimizers
        print("hooks", len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
        print("interrupted by", type(exception).__name__, "at", trainer.global_step)

pl.Trainer(
    accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=20,
    callbacks=[STEPSparsityCallback(recipe=STEP(AtStep(4))), SparseExport(sys.argv[1]), Interrupts()], default_root_dir="."
).fit(Model())
print("not interrupted")
"""


def test_ctrl_c_leaves_the_earlier_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    path.parent.mkdir()
    path.write_text("earlier")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "interrupted by KeyboardInterrupt at 6" in ran.stdout, ran.stderr
    assert "hooks 0 0" in ran.stdout
    assert ran.returncode == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "earlier"
