"""What a user reads at the terminal and in the log of a fit."""

from __future__ import annotations

import logging
import os
import re
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, Recipe, SparseExport, STEPSparsityCallback
from lightning_step.callbacks.console import Console

START, END = "N:M masks on 3 of 6 tensors", "optimizer steps, masks"


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("recipe", "head", "reason"),
    [
        (Dense(), "20 optimizer steps, masks never came on", "masks off: kept |w| is what they would keep"),
        (ASP(AtStep(5)), "20 optimizer steps, masks on: 136 of 272", "optimizer step 5: masks on (3 tensors)"),
        (STE(), "20 optimizer steps, masks on: 136 of 272", "optimizer step 0: masks on (3 tensors)"),
        (SRSTE(), "20 optimizer steps, masks on: 136 of 272", "optimizer step 0: masks on (3 tensors)"),
        (STEP(AtStep(5)), "20 optimizer steps, masks on: 136 of 272", "optimizer step 5: masks on, second moment frozen"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_table_at_the_start_and_one_at_the_end(
    recipe: Recipe, head: str, reason: str, tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = str(tmp_path / "model.safetensors")
    export = SparseExport(path, one_shot=True)
    make_trainer(STEPSparsityCallback(recipe=recipe), export).fit(tiny())
    first, *_, last = caplog.messages[caplog.messages.index(next(m for m in caplog.messages if START in m)) :]
    assert first.splitlines()[1].split() == ["masked", "layer", "shape", "n:m", "along", "tensors"]
    assert last.startswith(head)
    assert f"\n{reason}" in last
    assert last.endswith(f"\nexported to {path}"), "the files are written by then, whichever callback comes first"


def test_every_file_is_named_and_those_of_an_earlier_fit_are_not(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    both = SparseExport(str(tmp_path / "{format}.safetensors"), format=["dense", "packed"])
    for recipe, files in ((STE(), ["dense", "packed"]), (Dense(), [])):
        caplog.clear()
        with nullcontext() if files else pytest.warns(UserWarning, match="never came on"):
            make_trainer(both, STEPSparsityCallback(recipe=recipe), steps=3).fit(tiny())
        assert re.findall(r"exported to .*/(\w+).safetensors", caplog.messages[-1]) == files


def test_verbose_false_says_nothing_at_all(tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(5)), verbose=False)).fit(tiny())
    assert not any(START in m or END in m or "lightning-step" in m for m in caplog.messages)


def test_only_rank_zero_speaks(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(5))))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    trainer.fit(tiny())
    assert not any(START in m or END in m or "lightning-step" in m for m in caplog.messages)


def test_what_has_switched_already_is_said_below_the_start_table(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(STEPSparsityCallback(recipe=STE())).fit(tiny())
    ours = [m for m in caplog.messages if START in m or "masks on" in m]
    assert [START in ours[0], ours[1].startswith("lightning-step, optimizer step 0: masks on"), END in ours[2]] == [True] * 3
    assert len(ours) == 3


class Interrupts(Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError], ids=lambda error: error.__name__)
def test_a_fit_that_is_broken_off_has_no_end_table_and_the_next_one_has_its_own(
    error: type[BaseException], tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    callback, module = STEPSparsityCallback(recipe=STEP(AtStep(5))), tiny()
    with pytest.raises((SystemExit, ZeroDivisionError)):
        make_trainer(callback, Interrupts(error)).fit(module)
    assert not any(END in m for m in caplog.messages)
    trainer = make_trainer(callback, steps=4)
    trainer.validate(tiny(), verbose=False)
    assert not any(END in m for m in caplog.messages)
    caplog.clear()
    make_trainer(callback, steps=4).fit(tiny())
    assert [m.split(",")[0] for m in caplog.messages if END in m] == ["4 optimizer steps"]


class FailsAtTheEnd(Callback):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        raise ZeroDivisionError


def test_a_fit_that_fails_after_training_leaves_its_table_to_no_other_stage(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    callback, module = STEPSparsityCallback(recipe=STEP(AtStep(5))), tiny()
    with pytest.raises(ZeroDivisionError):
        make_trainer(callback, FailsAtTheEnd()).fit(module)
    make_trainer(callback, limit_val_batches=1).validate(module, verbose=False)
    assert not any(END in m for m in caplog.messages)


@pytest.mark.filterwarnings("ignore")  # the finder's own
def test_a_tuner_before_the_fit_has_no_table_of_its_own(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny()
    module.lr = 1e-2
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(5))), finder).fit(module)
    assert [m.split(",")[0] for m in caplog.messages if END in m] == ["20 optimizer steps"]


def test_fast_dev_run_shows_both_tables(tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(STEPSparsityCallback(recipe=STE()), fast_dev_run=1).fit(tiny())
    assert START in "".join(caplog.messages)
    assert [m for m in caplog.messages if m.startswith("1 optimizer step, masks on: 136 of 272 weights")] != []


def test_a_resumed_fit_ends_with_all_its_switches(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = str(tmp_path / "half.ckpt")
    trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(5))), steps=10)
    trainer.fit(tiny())
    trainer.save_checkpoint(path)
    caplog.clear()
    make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(5)))).fit(tiny(), ckpt_path=path)
    [end] = [m for m in caplog.messages if END in m]
    assert end.startswith("20 optimizer steps, masks on")
    assert "\noptimizer step 5: masks on, second moment frozen (3 tensors)" in end
    assert not any(m.startswith("lightning-step, optimizer step 5") for m in caplog.messages), "it was said before"


def test_a_console_that_was_not_begun_is_silent(caplog: pytest.LogCaptureFixture, make_trainer: Any) -> None:
    console, trainer = Console(), make_trainer()
    caplog.clear()
    console.finish()
    console.close(trainer)
    assert caplog.messages == []


SCRIPT = """
import warnings; warnings.filterwarnings("ignore")
import sys, torch, lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_step import STEP, AtStep, SparseExport, STEPSparsityCallback
class Model(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
for bar in (RichProgressBar(), TQDMProgressBar()):
    callbacks = [STEPSparsityCallback(recipe=STEP(AtStep(4))), SparseExport(sys.argv[1]), bar]
    pl.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
               limit_val_batches=0, num_sanity_val_steps=0, callbacks=callbacks).fit(Model())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_in_a_real_terminal_tables_are_drawn_and_lines_stand_by_themselves(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    import fcntl  # not there on Windows, as the other two
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "TQDM_DISABLE", "TQDM_MINITERS"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model.safetensors")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=tmp_path,
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    finally:
        os.close(ours)
        assert process.wait(timeout=120) == 0, said.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert lines.count("│ masked       │ layer  │ shape   │ n:m │ along │ tensors │") == 2
    assert lines.count("│ masked       │ layer  │ n:m │ density │ kept |w| │ tensors │") == 2
    switch = "lightning-step, optimizer step 4: masks on, second moment frozen (1 tensor); fixed step reached: step 4"
    assert lines.count(switch) == 2, "not at the end of a bar, and not twice"
    assert sum(line.startswith("lightning-step, wrote ") for line in lines) == 2
    assert any(re.search(r"\bphase: 2$", line) for line in lines), "rich's bar"
    assert any("phase=2" in line for line in lines), "tqdm's bar"
