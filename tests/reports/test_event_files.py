from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_step.reports.event_files import EVENT_FILES, read_events
from tests.reports.conftest import Write


def only_file(folder: Path) -> Path:
    [path] = folder.glob(EVENT_FILES)
    return path


def test_it_reads_what_tensorboard_reads(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(50):
            writer.add_scalar("a/loss", math.sin(step), 3 * step)
            writer.add_histogram("h", np.arange(2000) * 1.0, step)
        writer.add_image("i", np.zeros((3, 64, 64)), 1)
        writer.add_text("sparsity/recipe", "first\n\nlines", 0)
        writer.add_text("sparsity/recipe", "last", 1)
    log, other = read_events(tmp_path), EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    other.Reload()
    expected = other.Scalars("a/loss")
    assert list(log.scalars) == ["a/loss"]
    assert log.scalars["a/loss"].steps == tuple(event.step for event in expected)
    assert log.scalars["a/loss"].values == tuple(event.value for event in expected)
    assert log.texts == {"sparsity/recipe/text_summary": "last"}
    assert log.problems == []


def test_scalars_that_are_logged_as_tensors(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            writer.add_scalar("loss", 0.5 * step, step, new_style=True)
    assert read_events(tmp_path).scalars["loss"] == ((1, 2), (0.5, 1.0))


def test_a_resumed_run_overrides_the_steps_it_repeats(write: Write) -> None:
    folder = write("run", {"loss": {10: 3.0, 20: 2.0, 30: 9.0}})
    first = only_file(folder)
    first.rename(first.with_name("events.out.tfevents.0000000001.before"))
    write("run", {"loss": {20: 1.5, 30: 1.0, 40: 0.5}})
    assert read_events(folder).scalars["loss"] == ((10, 20, 30, 40), (3.0, 1.5, 1.0, 0.5))


def test_values_that_are_not_finite_are_kept(write: Write) -> None:
    log = read_events(write("run", {"loss": {1: math.nan, 2: math.inf, 3: 1.0}}))
    assert np.isnan(log.scalars["loss"].values[0])
    assert log.scalars["loss"].values[1:] == (math.inf, 1.0)


@pytest.mark.parametrize("cut", [1, 9, 14, 30])
def test_a_file_that_is_cut_short_is_read_up_to_there(cut: int, write: Write) -> None:
    path = only_file(write("run", {"loss": {step: float(step) for step in range(20)}}))
    path.write_bytes(path.read_bytes()[:-cut])
    log = read_events(path.parent)
    assert log.scalars["loss"].steps == tuple(range(19))
    assert log.problems == [f"{path.name}: it ends within a record; 20 records before that were read"]


@pytest.mark.parametrize("part", ["length", "data"])
def test_a_flipped_bit_is_told_and_what_comes_before_is_read(part: str, write: Write) -> None:
    path = only_file(write("run", {"loss": {step: float(step) for step in range(20)}}))
    content, at = bytearray(path.read_bytes()), 0
    for _ in range(11):  # the first record says the version, ten are scalars
        at += 16 + struct.unpack_from("<Q", content, at)[0]
    content[at if part == "length" else at + 20] ^= 1
    path.write_bytes(content)
    log = read_events(path.parent)
    assert log.scalars["loss"].values == tuple(map(float, range(10)))
    assert log.problems == [f"{path.name}: a record is damaged; 11 records before that were read"]


@pytest.mark.parametrize("content", [b"", b"no event file at all, but some text", b"\0" * 100])
def test_a_file_that_is_none_gives_no_scalars(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.x").write_bytes(content)
    log = read_events(tmp_path)
    assert log.scalars == {}
    assert len(log.problems) == (content != b"")


def test_a_large_record_is_passed_over(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("note", "x" * 100_000, 0)
        writer.add_scalar("loss", 1.0, 0)
    log = read_events(tmp_path)
    assert log.texts["note/text_summary"] == f"{'x' * 20_000} …"
    assert log.scalars["loss"].values == (1.0,)
