"""The benchmark harness: what it runs, what it keeps, what its tables say; on models that train for a few steps."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_step.recipes import describe
from lightning_step.reports.results import read_results

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(HERE))

import bench  # noqa: E402
import running  # noqa: E402
import training  # noqa: E402
from cells import Cell, hash_of  # noqa: E402
from recipes_compared import CHANGES, ENTRIES, ROWS  # noqa: E402
from report import write_report  # noqa: E402
from running import Book, Run, commit, opened, read_lines  # noqa: E402
from significance import compare, critical, detectable, power, signs, two_sided  # noqa: E402
from studies import STUDIES, Part, Study  # noqa: E402
from tasks import CHAR, SGD, TASKS, WIKITEXT, Grid  # noqa: E402

TINY = CHAR.sized(
    name="tiny",
    model={"width": 8, "layers": 1, "heads": 2, "context": 8, "warmup": 1},
    data={"batch_size": 4, "context": 8, "batches": 2},
    steps=4,
    validate_every=2,
    adam=Grid((1e-3, 1e-2), (0.0, 1e-1)),
    sgd=Grid((1e-1,), (1e-3,)),
    pruned_to=("2:4", "1:8", "1:3"),  # nothing is a multiple of 3 wide
    batches=2,
)
BROKEN = TINY.sized(name="broken", model={"width": 8, "layers": 1, "heads": 3, "context": 8}, adam=Grid((1e-3,), ()))
STUDY = Study(
    (
        Part(TINY, ("dense", "SR-STE", "STEP"), ("2:4",), ("v not frozen", "lam 0.001", "dense, twice the steps")),
        Part(BROKEN, ("dense",)),
    ),
    seeds=(0, 1),
    finalists=1,
)
DRIVER = f"""
import sys
sys.path[:0] = {[str(HERE), str(ROOT), str(Path(__file__).parent)]!r}
import bench
from test_benchmarks import STUDY

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


# What is run


def cell(**changes: object) -> Cell:
    settings = {"task": TINY, "row": "SR-STE", "pattern": "2:4", "lr": 1e-2, "lam": 1e-3, "seed": 0, **changes}
    return Cell(**settings)


def test_a_key_depends_on_everything_that_a_run_depends_on() -> None:
    others = [
        cell(row="STEP"),
        cell(pattern="1:4"),
        cell(lr=1e-3),
        cell(lam=0.0),
        cell(seed=1),
        cell(task=TINY.sized(steps=5)),
        cell(task=TINY.sized(batches=3)),
        cell(task=TINY.sized(exclude=("*.fc",))),
        cell(task=TINY.sized(trainer={"precision": "bf16-mixed"})),
        cell(task=TINY.sized(model={**TINY.model, "width": 16})),
        cell(task=TINY.sized(data={**TINY.data, "batch_size": 8})),
        cell(row="SR-STE, SGD"),
    ]
    assert len({one.key for one in [cell(), *others]}) == 13
    assert cell().key == cell(task=TINY.sized()).key == cell(task=TINY.sized(unit="something")).key
    assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1})


def test_a_key_does_not_depend_on_where_the_data_are() -> None:
    assert "{data}/wikitext-103" in json.dumps(WIKITEXT.config())


def line_of(row: str, seed: int, score: float, **changes: object) -> dict[str, object]:
    """A result as the harness writes it, made by hand."""
    setting = cell(**{"row": row, "seed": seed, "lam": None, "pattern": "2:4" if ENTRIES[row].masked else "", **changes})
    return {
        "key": setting.key,
        **json.loads(json.dumps(training.described(setting))),
        "loss": score,
        "scores": {"val_loss": score},
        "losses": [],
        "pruned": {},
        "switches": [],
        "switch_steps": [],
        "seconds": 36.0,
        "versions": {"torch": "1"},
        "machine": "a machine",
        "commit": "c" * 40,
        "changed": False,
        "finished": "2026-01-01T00:00:00+00:00",
    }


def test_what_follows_from_a_grid_is_known_when_it_is_complete_and_not_before() -> None:
    study = Study((Part(TINY, ("dense", "STEP"), ("2:4",), ("v not frozen",)),), seeds=(0, 1, 2), finalists=2)
    scores = {(1e-3, 0.0): 3.0, (1e-3, 1e-1): 1.0, (1e-2, 0.0): math.nan, (1e-2, 1e-1): 2.0}
    done: dict[str, dict[str, object]] = {}
    for i, ((lr, lam), score) in enumerate(scores.items()):
        known = [one for one in study.cells(done) if one.row == "STEP"]
        assert len(known) == 4, f"after {i} runs the grid alone"
        line = line_of("STEP", 0, score, lr=lr, lam=lam)
        done[line["key"]] = line
    repeated = [(one.lr, one.lam, one.seed) for one in study.cells(done) if one.row == "STEP"][4:]
    assert repeated == [(1e-3, 1e-1, 1), (1e-3, 1e-1, 2), (1e-2, 1e-1, 1), (1e-2, 1e-1, 2)]
    assert not [one for one in study.cells(done) if one.row == "v not frozen"]
    # The second best on seed 0 is the best on the mean.
    for lr, lam, seed in repeated:
        line = line_of("STEP", seed, 9.0 if lr == 1e-3 else 2.0, lr=lr, lam=lam)
        done[line["key"]] = line
    changed = [(one.lr, one.lam, one.seed) for one in study.cells(done) if one.row == "v not frozen"]
    assert changed == [(1e-2, 1e-1, 0), (1e-2, 1e-1, 1), (1e-2, 1e-1, 2)]
    assert study.count() == (2 + 2 * 2) + (4 + 2 * 2) + 3


def test_what_is_better_where_more_is_better() -> None:
    task = TINY.sized(higher_is_better=True)
    study = Study((Part(task, ("dense",)),), seeds=(0, 1), finalists=1)
    done = {}
    for lr, score in ((1e-3, 0.5), (1e-2, 0.4)):
        line = line_of("dense", 0, score, task=task, lr=lr)
        done[line["key"]] = line
    assert [one.lr for one in study.cells(done) if one.seed == 1] == [1e-3]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_made_of_rows_that_there_are(name: str) -> None:
    for part in STUDIES[name].parts:
        assert set(part.rows) <= ROWS.keys()
        assert set(part.changes) <= CHANGES.keys()
        assert {CHANGES[change].of for change in part.changes} <= set(part.rows)
        assert part.changes_at in part.patterns or not part.changes
        for row, pattern in part.groups():
            assert len({one.key for one in part.grid(row, pattern, 0)}) == len(part.task.grid(ROWS[row].optimizer).rates) * (
                len(part.task.grid(ROWS[row].optimizer).lams) if ROWS[row].has_lam else 1
            )
    assert STUDIES[name].count() > 0


@pytest.mark.parametrize("row", ENTRIES)
def test_every_row_trains_and_switches_when_it_says(row: str, tmp_path: Path) -> None:
    entry = ENTRIES[row]
    task = TINY.sized(steps=20, validate_every=40, pruned_to=())
    lam = entry.lam if entry.lam is not None else 1e-3 if entry.has_lam else None
    with torch.random.fork_rng():
        line = training.train(cell(task=task, row=row, pattern="2:4" if entry.masked else "", lam=lam), tmp_path)
    assert math.isfinite(line["loss"])
    assert line["steps"] == 20 * entry.steps
    if entry.switch is not None:
        assert line["switch_steps"] == [round(20 * entry.switch)]
    assert (line["switches"] == []) == (row in {"dense", "dense, SGD", "dense, twice the steps"})


@pytest.mark.parametrize("name", TASKS)
def test_every_task_names_classes_and_arguments_that_there_are(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    absent = [library for library in task.needs if find_spec(library) is None]
    if absent:
        pytest.skip(f"needs {absent}")
    module = import_module(task.module)
    inspect.signature(getattr(module, task.model_class)).bind(**task.model, lr=1e-3)
    inspect.signature(getattr(module, task.data_class)).bind(**task.data, **({"seed": 0} if task.seeded else {}))
    assert task.missing(tmp_path) is None if not task.files else task.fetch in task.missing(tmp_path)
    assert len(task.adam.rates) == len(SGD.rates)


def test_a_task_without_its_data_is_skipped_and_what_to_fetch_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = TINY.sized(name="other", needs=("no_such_library",))
    monkeypatch.setitem(STUDIES, "absent", Study((Part(WIKITEXT, ("dense",)), Part(other, ("dense",)))))
    with pytest.raises(SystemExit) as end:
        bench.main(["absent", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"skipped wikitext: expected {tmp_path / 'wikitext-103' / 'wiki.train.tokens'}, " in said
    assert "Fetch WikiText-2" in said
    assert "skipped other: needs no_such_library: pip install no_such_library" in said


def test_the_trainer_is_told_what_the_task_says(tmp_path: Path) -> None:
    half = TINY.sized(trainer={"precision": "bf16-true"})
    assert training.train(cell(task=half), tmp_path)["loss"] != training.train(cell(), tmp_path)["loss"]
    there = TINY.sized(trainer={"accelerator": "gpu"}).missing(tmp_path)
    assert (there is None) == torch.cuda.is_available()
    assert there in (None, "needs a CUDA device")


def test_sgd_follows_the_schedule_of_the_task(tmp_path: Path) -> None:
    rates = {}
    for optimizer in ("Adam", "SGD"):
        model, data = TINY.make_model(1e-2, tmp_path), TINY.make_data(tmp_path, 0)
        if optimizer == "SGD":
            training.under_sgd(model, 0.3)
        seen: list[float] = []
        record = pl.callbacks.LambdaCallback(
            on_train_batch_start=lambda trainer, *_, seen=seen: seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        )
        trainer = pl.Trainer(max_steps=4, callbacks=[record], limit_val_batches=0, **QUIET)
        trainer.fit(model, datamodule=data)
        rates[optimizer] = seen
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    assert rates["SGD"] == pytest.approx([30 * rate for rate in rates["Adam"]])
    assert len(set(rates["SGD"])) > 2


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# What is kept


def book_with(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_nothing_is_started_that_would_not_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study((Part(TINY, ("dense",)),), seeds=(0,))
    path = book_with(tmp_path / "cells.jsonl", line_of("dense", 0, 1.0, lr=1e-3))
    with opened(path) as book:
        late = Run(study, book, tmp_path, budget=35.0)
        late.go()
        assert not late.in_time
        assert len(book.lines) == 1
        assert late.fits(cell(), 0.0) is False
        assert Run(study, book, tmp_path, budget=37.0).fits(cell(), 0.0)
        assert not Run(study, book, tmp_path, budget=37.0).fits(cell(), 2.0)
    assert capsys.readouterr().out == ""


def test_one_file_is_for_one_program_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path / "cells.jsonl"), pytest.raises(SystemExit, match="another benchmark is writing to it"):
        opened(tmp_path / "cells.jsonl").__enter__()


def test_a_second_result_of_a_run_is_refused(tmp_path: Path) -> None:
    path = book_with(tmp_path / "cells.jsonl", line_of("dense", 0, 1.0))
    with path.open("r+b") as file, pytest.raises(RuntimeError, match="a second time"):
        Book(file).write(line_of("dense", 0, 1.0))


def test_a_line_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(line_of("dense", 0, 1.0)) + "\n[1]\n")
    with pytest.raises(SystemExit, match=r"line 2 of .*cells.jsonl, but got '\[1\]"):
        opened(path).__enter__()


def test_results_of_another_recipe_under_the_same_name_are_refused(tmp_path: Path) -> None:
    old = line_of("ASP", 0, 1.0, lr=1e-3)
    old["config"]["recipe"]["at"]["step"] = 0.25
    old["key"] = hash_of(old["config"])
    path = book_with(tmp_path / "cells.jsonl", old)
    with opened(path) as book, pytest.raises(SystemExit, match=r"recipe.at.step was 0.25 and is 0.5. Give another `--out`"):
        Run(Study((Part(TINY, ("ASP",), ("2:4",)),)), book, tmp_path).go()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_recorded_and_whether_code_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == {"commit": None, "changed": None}
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.py").write_text("1\n")
    (tmp_path / "examples" / "a.md").write_text("1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    head = running.git("rev-parse", "HEAD")
    assert len(head) == 40
    (tmp_path / "examples" / "a.md").write_text("2\n")
    assert commit() == {"commit": head, "changed": False}
    (tmp_path / "examples" / "a.py").write_text("2\n")
    assert commit() == {"commit": head, "changed": True}


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


def test_the_committed_comparison_is_complete_and_has_the_keys_of_today() -> None:
    lines = {line["key"]: line for line in read_lines(HERE / "results" / "compare" / "cells.jsonl")}
    assert all(hash_of(line["config"]) == key for key, line in lines.items())
    assert len(lines) == 144
