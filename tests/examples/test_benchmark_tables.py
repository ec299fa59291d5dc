"""What the tables of the benchmark harness say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cells import Cell, hash_of
from compare import RESULTS
from report import write_report
from running import read_lines
from significance import compare, critical, detectable, power, signs, two_sided
from studies import STUDIES

from lightning_step.reports import write_figure
from tests.examples.tiny_study import (
    HERE,
    ROOT,
    TINY,
    line_of,
)

# What the tables say


@pytest.mark.parametrize(
    ("t", "df", "p"),  # from printed tables of Student's distribution
    [
        *((12.706, 1, 0.05), (63.657, 1, 0.01), (4.303, 2, 0.05), (3.182, 3, 0.05), (4.604, 4, 0.01), (2.571, 5, 0.05)),
        *((2.228, 10, 0.05), (3.169, 10, 0.01), (2.131, 15, 0.05), (2.750, 30, 0.01)),
    ],
)
def test_p_values_are_those_of_printed_tables(t: float, df: int, p: float) -> None:
    assert two_sided(t, df) == two_sided(-t, df) == pytest.approx(p, rel=2e-3)
    assert critical(df, p) == pytest.approx(t, abs=1e-3)


def test_a_comparison_by_hand() -> None:
    row, other = {0: 1.1, 1: 2.2, 2: 3.3, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 0.0}
    found = compare(row, other)
    t = 0.2 / (0.1 / math.sqrt(3))  # differences 0.1, 0.2, 0.3
    assert found is not None
    assert found.seeds == 3
    assert found.difference == pytest.approx(0.2)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # the closed form for two degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.2 - 4.302653 * 0.057735, 0.2 + 4.302653 * 0.057735), abs=1e-5)
    assert found.p_exact == 0.25
    assert compare({0: 1.0}, {0: 2.0}) is None
    assert compare({0: 1.0, 1: math.nan}, {0: 2.0, 1: 2.0}) is None
    assert compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p == 0.0


@pytest.mark.parametrize(
    ("differences", "p"), [([1, 2, 3], 2 / 8), ([1, 2, -3], 1.0), ([3, 2, -1], 4 / 8), ([-1.0] * 5, 2 / 32), ([0, 1], 1.0)]
)
def test_the_exact_test_counts_patterns_of_signs(differences: list[float], p: float) -> None:
    assert signs(differences) == p


@pytest.mark.parametrize(("seeds", "effect"), [(3, 2.0), (3, 3.264), (5, 1.2)])
def test_power_is_how_often_a_difference_is_found(seeds: int, effect: float) -> None:
    draws = torch.randn(100_000, seeds, dtype=torch.float64) + effect
    t = draws.mean(1) / (draws.std(1) / math.sqrt(seeds))
    found = (t.abs() > critical(seeds - 1)).double().mean().item()
    assert power(effect, seeds) == pytest.approx(found, abs=0.006)
    assert power(0.0, seeds) == pytest.approx(0.05, abs=1e-4)
    assert power(detectable(seeds), seeds) == pytest.approx(0.8)


def report_of(folder: Path, lines: list[dict[str, object]]) -> tuple[str, dict[str, object]]:
    text = write_report(folder, lines)
    return text, json.loads((folder / "results.json").read_text())


def test_a_table_by_hand(tmp_path: Path) -> None:
    scores = {"dense": (1.0, 1.2, 1.4), "SR-STE": (1.5, 1.8, 2.1), "STEP": (1.4, 1.6, 1.8)}
    lines = [
        line_of(row, seed, score, lam=None if row == "dense" else 0.1)
        for row, each in scores.items()
        for seed, score in enumerate(each)
    ]
    lines[0]["pruned"] = {"2:4": {"val_loss": 3.0}}
    # A setting with one lucky seed does not win over a mean of three.
    lines.append(line_of("STEP", 0, 0.5, lr=1e-3, lam=0.1))
    text, body = report_of(tmp_path, lines)
    [task] = body["tasks"]
    rows = {row["row"]: row for row in task["tables"][0]["rows"]}
    assert list(rows) == ["dense", "SR-STE", "STEP"]
    step = rows["STEP"]
    assert (step["lr"], step["lam"], step["tried"]) == (1e-2, 0.1, 2)
    assert step["mean"] == pytest.approx(1.6)
    assert step["sd"] == pytest.approx(0.2)
    assert step["above_dense"] == pytest.approx(0.4)
    assert step["gap_closed"] == pytest.approx((1.8 - 1.6) / (1.8 - 1.2))
    against = step["against"]["SR-STE"]  # differences -0.1, -0.2, -0.3
    assert against["difference"] == pytest.approx(-0.2)
    assert against["p"] == pytest.approx(0.07418, abs=1e-5)
    assert (against["p_exact"], against["verdict"]) == (0.25, "")
    assert task["tables"][0]["pruned"]["mean"] == 3.0
    assert (
        "| STEP | 1.6000 ± 0.2000 | +0.4000 | -0.2000 (p 0.074 / 0.25) | 33 % | 1.4000, 1.6000, 1.8000 | 0.01 (edge) |"
        in text
    )
    assert "| dense, pruned at the end | 3.0000 | +1.8000 |" in text
    assert "SR-STE (1 of 2 settings)" in text, "one rate of the two that STEP had"
    assert "10 runs, 0.1 hours of single runs; a machine; torch 1; 2026-01-01; commit cccccccccccc." in text
    assert "chance of 80 % if it is 3.3 times" in text
    assert "cannot fall below 0.25" in text


def test_better_and_worse_are_said_where_they_are_significant(tmp_path: Path) -> None:
    for task, words in ((TINY, ("better", "worse")), (TINY.sized(higher_is_better=True), ("worse", "better"))):
        scores = {"dense": (1.0, 1.2, 1.4), "SR-STE": (2.0, 3.0, 4.0), "STEP": (1.50, 2.51, 3.49)}
        lines = [line_of(row, seed, score, task=task) for row, each in scores.items() for seed, score in enumerate(each)]
        lines += [line_of("ASP", seed, score, task=task) for seed, score in enumerate((2.50, 3.51, 4.49))]
        text, body = report_of(tmp_path, lines)
        rows = {row["row"]: row for row in body["tasks"][0]["tables"][0]["rows"]}
        assert tuple(rows[row]["against"]["SR-STE"]["verdict"] for row in ("STEP", "ASP")) == words
        assert f"/ 0.25, {words[0]})" in text
        assert body["summary"]["comparisons"] == 3
        counts = {row["row"]: row["against"]["SR-STE"] for row in body["summary"]["rows"]}
        assert counts["STEP"] == {"better": 0, "neither": 0, "worse": 0, words[0]: 1}


def test_a_gap_that_may_be_chance_is_not_closed(tmp_path: Path) -> None:
    for rival, closed in (((1.2, 1.1, 1.3), 0.5), ((1.5, 0.9, 1.2), None), ((0.9, 0.8, 0.7), None)):
        scores = {"dense": (1.0, 1.0, 1.0), "SR-STE": rival, "STEP": (1.1, 1.1, 1.1)}
        lines = [line_of(row, seed, score) for row, each in scores.items() for seed, score in enumerate(each)]
        _, body = report_of(tmp_path, lines)
        found = {row["row"]: row["gap_closed"] for row in body["tasks"][0]["tables"][0]["rows"]}
        assert found["STEP"] == (None if closed is None else pytest.approx(closed))


def test_a_run_that_broke_down_is_never_the_best(tmp_path: Path) -> None:
    lines = [line_of("STEP", 0, score, lr=lr, lam=0.1) for lr, score in ((1e-3, math.nan), (1e-2, 2.0))]
    _, body = report_of(tmp_path, lines)
    assert body["tasks"][0]["tables"][0]["rows"][0]["lr"] == 1e-2


def test_unequal_steps_are_refused(tmp_path: Path) -> None:
    lines = [line_of("dense", 0, 1.0), line_of("STEP", 0, 1.0, task=TINY.sized(steps=6))]
    with pytest.raises(
        SystemExit, match=r"same number of steps in every row of tiny, but got {'4': \['dense'\], '6': \['STEP'\]}"
    ):
        write_report(tmp_path, lines)
    assert not (tmp_path / "results.md").exists()
    write_report(tmp_path, [line_of("dense", 0, 1.0), line_of("dense, twice the steps", 0, 1.0)])


def test_what_is_not_tuned_is_shown_at_the_rate_that_is_best_for_dense_training(tmp_path: Path) -> None:
    lines = [line_of("dense", seed, loss, lr=rate) for rate, loss in ((1e-3, 1.0), (1e-2, 2.0)) for seed in range(3)]
    # A grid that grew later left a better loss behind, at a rate that nobody would have taken.
    lines += [
        line_of("SR-STE, untuned", seed, loss, lr=rate) for rate, loss in ((1e-3, 1.8), (1e-2, 1.5)) for seed in range(3)
    ]
    lines += [line_of("ASP, untuned", seed, 1.7, lr=1e-2) for seed in range(3)]
    [task] = report_of(tmp_path, lines)[1]["tasks"]
    rows = {row["row"]: row for row in task["tables"][0]["untuned"]}
    assert (rows["SR-STE, untuned"]["lr"], rows["SR-STE, untuned"]["mean"]) == (1e-3, 1.8)
    assert rows["ASP, untuned"]["lr"] == 1e-2, "all there is"


def test_two_things_under_one_name_are_refused(tmp_path: Path) -> None:
    other = line_of("ASP", 1, 1.0)
    other["config"]["recipe"]["at"]["step"] = 0.25
    with pytest.raises(SystemExit, match="Expected 'ASP' of tiny to be one thing"):
        write_report(tmp_path, [line_of("ASP", 0, 1.0), other])
    wider = TINY.sized(model={**TINY.model, "width": 16})
    with pytest.raises(SystemExit, match="Expected the task tiny to be one thing"):
        write_report(tmp_path, [line_of("ASP", 0, 1.0), line_of("dense", 1, 1.0, task=wider)])
    write_report(tmp_path, [line_of("STEP", 0, 1.0, lam=0.0), line_of("STEP", 0, 1.0, lam=0.1)])


COMMITTED = sorted((HERE / "results").glob("*/cells.jsonl"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_tables_are_those_of_the_committed_lines(path: Path, tmp_path: Path) -> None:
    write_report(tmp_path, read_lines(path))
    made = sorted(file.name for file in tmp_path.iterdir())
    assert len(made) >= 3
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*made, "cells.jsonl"])
    for name in made:
        assert (tmp_path / name).read_bytes() == (path.parent / name).read_bytes(), f"{name} was edited by hand, or is old"


def test_the_committed_comparison_is_complete_and_all_lines_are_of_settings_of_today() -> None:
    lines = {line["key"]: line for line in read_lines(RESULTS / "cells.jsonl")}
    assert all(hash_of(line["config"]) == key for key, line in lines.items())
    comparison = {cell.key for cell in STUDIES["compare"].cells(lines)}
    assert len(comparison) > 150
    assert comparison <= lines.keys()
    tasks = [part.task for study in STUDIES.values() for part in study.parts]
    for line in lines.values():  # also of those that no study asks for any more
        config = line["config"]
        pattern = f"{config['n']}:{config['m']}" if config["n"] else ""
        setting = (line["row"], pattern, config["lr"], config["lam"], config["seed"])
        assert line["key"] in {Cell(task, *setting).key for task in tasks if task.name == line["task"]}, line["row"]


@pytest.mark.parametrize(
    ("task", "name"),
    [("char", "patterns"), ("char", "loss")] + [("char-tuned", name) for name in ("patterns", "loss", "switch", "frozen")],
)
def test_the_figures_of_the_page_are_those_of_the_committed_lines(task: str, name: str, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    image = f"images/benchmark-{task}-{name}.svg"
    assert f"]({image})" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    there = (ROOT / "docs" / image).read_text()
    if f"v{matplotlib.__version__}," not in there:
        pytest.skip("drawn by another matplotlib")
    assert write_figure(name, [str(RESULTS / f"{task}.jsonl")], tmp_path / "a.svg").read_text() == there, "draw it anew"
