"""Lightning's Trainer on two processes, DDP and ModelParallelStrategy, against one; all run by `lightning_worker.py`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_step import STEPSparsityCallback, load_sparse
from lightning_step.errors import ConfigurationError

RECIPES = ["Dense", "ASP", "STE", "SRSTE", "STEP", "decays"]
DDP, FILE, FILES = "DDP", "FSDP2, one file", "FSDP2, sharded files"
RUNS = [(engine, recipe) for engine in (DDP, FILE) for recipe in RECIPES] + [(FILES, "STEP"), (FILES, "ASP")]
SWITCHED = {"Dense": [], "ASP": [1], "STE": [0], "SRSTE": [0], "STEP": [6], "decays": [4]}


def read(folder: Path, name: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def steps(run: Any) -> list[int]:
    return [event["step"] for event in run["state"]["events"]]


def close(one: Any, other: Any) -> bool:
    return all(torch.allclose(other["weights"][n], w, rtol=1e-9, atol=1e-11) for n, w in one["weights"].items())


def equal(one: Any, other: Any) -> bool:
    return one["state"] == other["state"] and all(torch.equal(other["weights"][n], w) for n, w in one["weights"].items())


@pytest.mark.parametrize(("engine", "recipe"), RUNS)
def test_two_processes_fit_what_one_fits_and_switch_together(engine: str, recipe: str, fitted: Path) -> None:
    alone, (first, second) = read(fitted, f"alone, {recipe}"), (read(fitted, f"{engine}, {recipe}", r) for r in (0, 1))
    assert close(alone, first)
    assert equal(first, second)
    assert steps(first) == steps(alone) == SWITCHED[recipe]
    assert first["sharded"] == (engine != DDP)
    assert first["state"]["t"] == 12


@pytest.mark.parametrize(("engine", "recipe"), RUNS)
def test_resuming_on_as_many_processes_equals_the_undisturbed_run_bit_for_bit(
    engine: str, recipe: str, fitted: Path
) -> None:
    for rank in (0, 1):
        assert equal(read(fitted, f"{engine}, {recipe}", rank), read(fitted, f"{engine} to {engine}, {recipe}", rank))


@pytest.mark.parametrize(
    ("way", "recipe"),
    [(f"{engine} to alone", recipe) for engine in (DDP, FILE) for recipe in RECIPES]
    + [(f"alone to {engine}", "STEP") for engine in (DDP, FILE)]
    + [(f"{FILES} to one", recipe) for recipe in ("STEP", "ASP")],
)
def test_a_checkpoint_of_two_resumes_on_one_and_the_reverse(way: str, recipe: str, fitted: Path) -> None:
    alone, resumed = read(fitted, f"alone, {recipe}"), read(fitted, f"{way}, {recipe}")
    assert close(alone, resumed)
    assert steps(resumed) == SWITCHED[recipe]
    assert resumed["state"]["t"] == 12


@pytest.mark.parametrize(("engine", "recipe"), RUNS)
def test_the_export_is_gathered_and_written_once(engine: str, recipe: str, fitted: Path) -> None:
    first, second = (read(fitted, f"{engine}, {recipe}", rank) for rank in (0, 1))
    path = fitted / engine / recipe / "model.safetensors"
    assert first["exported"] == second["exported"] == path.stat().st_size
    written = load_sparse(path)
    assert list(path.parent.glob("*.part")) == []
    for name, rows in (("first.weight", 12), ("last.weight", 5)):
        weight = first["weights"][name]
        assert written[name].shape == weight.shape
        assert written[name].count_nonzero() == weight.numel() // 2
        assert written[name].shape[0] == rows
        assert torch.equal(written[name][written[name] != 0], weight[written[name] != 0])


def logged(folder: Path) -> dict[int, dict[str, float]]:
    with next(folder.glob("logs/**/metrics.csv")).open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len({row["step"] for row in rows}) == len(rows), "every step once"
    return {int(row["step"]): row for row in rows}


@pytest.mark.parametrize(("engine", "recipe"), RUNS)
def test_two_processes_log_once_what_one_logs(engine: str, recipe: str, fitted: Path) -> None:
    alone, together = (logged(fitted / way / recipe) for way in ("alone", engine))
    assert sorted(together) == list(range(1, 13))
    assert "sparsity/layer/first.weight/v_l2" in together[12]
    for step, row in alone.items():
        assert together[step] == pytest.approx(row, rel=1e-6, abs=1e-18), step
    boards = [EventAccumulator(str(next((fitted / way / recipe).glob("board/**/version_0")))) for way in ("alone", engine)]
    tags = [board.Reload().Tags() for board in boards]
    assert sorted(tags[0]["histograms"]) == sorted(tags[1]["histograms"])
    for tag in tags[0]["histograms"]:
        mine, theirs = ([(e.step, e.histogram_value) for e in board.Histograms(tag)] for board in boards)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        for (_, one), (_, other) in zip(mine, theirs, strict=True):
            assert one.num == other.num
            assert one.sum == pytest.approx(other.sum, rel=1e-3), "a few lie on the edge of a bin"


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (FSDPStrategy, "FSDP1 flattens parameters"),
        (type("Own", (FSDPStrategy,), {}), "FSDP1 flattens parameters"),
        (DeepSpeedStrategy, "DeepSpeed steps an optimizer of its own"),
    ],
)
def test_a_strategy_that_hides_parameters_is_refused_by_name(cls: Any, reason: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, max_steps=1, enable_checkpointing=False)
    # Both want GPUs, and DeepSpeed wants deepspeed, before they can be set up: here, only the classes are real.
    trainer._accelerator_connector.strategy = cls.__new__(cls)
    text = f"Expected a strategy that leaves every weight its shape, but got {cls.__name__}: {reason}.*ModelParallelStrategy"
    with pytest.raises(ConfigurationError, match=text):
        STEPSparsityCallback().setup(trainer, BoringModel(), "fit")
