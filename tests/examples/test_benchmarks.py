"""The benchmark harness runs: it survives being killed, goes on, and says what it does; on models of a few steps."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench
import lightning.pytorch as pl
import pytest
import torch
import training
from cells import hash_of
from recipes_compared import ENTRIES
from report import write_report
from running import Run, commit, opened, read_lines

from lightning_step.recipes import describe
from lightning_step.reports.results import read_results
from tests.examples.tiny_study import (
    HERE,
    ROOT,
    STUDY,
    TINY,
)

DRIVER = f"""
import sys
sys.path[:0] = {[str(HERE), str(ROOT)]!r}
import bench
from tests.examples.tiny_study import STUDY

if __name__ == "__main__":
    bench.STUDIES["tiny"] = STUDY
    bench.main(["tiny", *sys.argv[1:]])
"""


def workers_of(pid: int) -> list[int]:
    """The processes that it started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A benchmark that was killed after three runs, left half a line at its end, and was called again to go on."""
    folder = tmp_path_factory.mktemp("benchmark")
    driver, lines = folder / "driver.py", folder / "out" / "cells.jsonl"
    driver.write_text(DRIVER)
    command = [sys.executable, "-W", "ignore", str(driver), "--out", str(folder / "out"), "--data", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as first:
        deadline = time.monotonic() + 500
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
            assert first.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "three runs of a few steps each"
            time.sleep(0.02)
        workers = workers_of(first.pid)
        first.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    before = lines.read_bytes()
    with lines.open("ab") as file:
        file.write(b'{"key": "0123456789abcdef", "conf')
    second = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, env=environment, check=False)
    return {
        "out": folder / "out",
        "before": before,
        "left": [pid for pid in workers if alive(pid)],
        "workers": len(workers),
        "second": second,
        "lines": read_lines(lines),
    }


def test_workers_end_with_a_program_that_is_killed(finished: dict[str, object]) -> None:
    assert finished["workers"] >= 2  # and a process that looks after semaphores
    assert finished["left"] == []


def test_a_killed_benchmark_goes_on_and_runs_nothing_twice(finished: dict[str, object]) -> None:
    after = (finished["out"] / "cells.jsonl").read_bytes()
    kept = finished["before"][: finished["before"].rindex(b"\n") + 1]
    assert kept.count(b"\n") >= 3
    assert after.startswith(kept)
    keys = [line["key"] for line in finished["lines"]]
    assert len(keys) == len(set(keys)) == STUDY.count() - BROKEN_RUNS
    assert "0123456789abcdef" not in keys
    assert f"{STUDY.count()} runs, {kept.count(bytes([10]))} there already" in finished["second"].stdout


# Of the task that cannot be built one run is tried; the other seed follows from it, and its two changes are in no list.
BROKEN_RUNS = 2


def test_a_run_that_fails_is_named_and_stops_no_other(finished: dict[str, object]) -> None:
    second = finished["second"]
    assert second.returncode == 1
    assert "1 runs failed: broken, dense, rate 0.001, seed 0" in second.stderr
    assert {line["task"] for line in finished["lines"]} == {"tiny"}


def test_progress_is_shown(finished: dict[str, object]) -> None:
    assert f"[{STUDY.count() - BROKEN_RUNS}/{STUDY.count()}, about " in finished["second"].stdout


def test_two_processes_give_what_one_gives_bit_for_bit(finished: dict[str, object], tmp_path: Path) -> None:
    lines = {line["key"]: line for line in finished["lines"]}
    cells = {cell.key: cell for cell in STUDY.cells(lines) if cell.task is TINY}
    assert lines.keys() == cells.keys()
    for key, cell in cells.items():
        alone = json.loads(json.dumps(training.train(cell, tmp_path)))
        assert {**alone, "seconds": 0} == {name: lines[key][name] for name in alone} | {"seconds": 0}


def test_every_line_says_by_what_it_was_made(finished: dict[str, object]) -> None:
    for line in finished["lines"]:
        assert line["versions"]["torch"] == torch.__version__
        assert line["versions"]["lightning"] == pl.__version__
        assert {"python", "lightning-step"} <= line["versions"].keys()
        assert (line["commit"], line["changed"]) == tuple(commit().values())
        assert line["seconds"] > 0
        assert line["finished"].startswith("20")
        assert hash_of(line["config"]) == line["key"]
        assert line["config"]["recipe"] == json.loads(json.dumps(describe(ENTRIES[line["row"]].make(line["lam"] or 0.0))))


def test_a_complete_benchmark_has_nothing_to_do(finished: dict[str, object], tmp_path: Path) -> None:
    before = (finished["out"] / "cells.jsonl").read_bytes()
    with opened(finished["out"] / "cells.jsonl") as book:
        Run(STUDY.only(["tiny"]), book, tmp_path).go()
    assert (finished["out"] / "cells.jsonl").read_bytes() == before


def test_steps_are_the_same_in_every_row_but_the_one_that_says_so(finished: dict[str, object]) -> None:
    steps = {line["row"]: line["steps"] for line in finished["lines"]}
    assert steps.pop("dense, twice the steps") == 8
    assert set(steps.values()) == {4}
    assert {row: [at for at, _ in line["losses"]] for line in finished["lines"] if (row := line["row"]) == "dense"} == {
        "dense": [2, 4]
    }


def test_the_setting_that_is_repeated_and_changed_is_the_best_of_the_grid(finished: dict[str, object]) -> None:
    lines = finished["lines"]
    for row in ("dense", "SR-STE", "STEP"):
        first = {(line["lr"], line["lam"]): line["loss"] for line in lines if (line["row"], line["seed"]) == (row, 0)}
        assert len(first) == (2 if row == "dense" else 4)
        [other] = {(line["lr"], line["lam"]) for line in lines if (line["row"], line["seed"]) == (row, 1)}
        assert other == min(first, key=lambda setting: first[setting])
        if row == "STEP":
            assert {(a["lr"], a["lam"]) for a in lines if a["row"] == "v not frozen"} == {other}
            assert {(a["lr"], a["lam"]) for a in lines if a["row"] == "lam 0.001"} == {(other[0], 1e-3)}


def test_dense_runs_are_pruned_at_the_end(finished: dict[str, object]) -> None:
    for line in finished["lines"]:
        if line["row"] == "dense":
            assert sorted(line["pruned"]) == ["1:8", "2:4"], "no layer can be 1:3"
            assert line["pruned"]["2:4"]["val_loss"] != line["pruned"]["1:8"]["val_loss"] != line["loss"]
        else:
            assert (line["pruned"] == {}) == (line["n"] is not None)


def test_a_report_is_made_of_the_lines_in_any_order_and_drawn(finished: dict[str, object], tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(finished["lines"], len(finished["lines"]))
    assert write_report(tmp_path, shuffled) == (finished["out"] / "results.md").read_text()
    for name in ("results.md", "results.json", "tiny.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished["out"] / name).read_bytes()
    drawn = read_results(tmp_path / "tiny.jsonl")
    assert {run.frozen for run in drawn} == {None, True, False}, "v not frozen, and STEP itself on the other side"
    assert "(p " in (tmp_path / "results.md").read_text()


def test_the_table_can_be_asked_for_alone(finished: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(["quick", "--table", "--out", str(finished["out"])])
    assert end.value.code == 0
    assert capsys.readouterr().out == (finished["out"] / "results.md").read_text() + "\n"
    with pytest.raises(SystemExit, match="Call it without --table first"):
        bench.main(["quick", "--table", "--out", str(finished["out"] / "none")])
