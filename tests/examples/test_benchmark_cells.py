"""What the benchmark harness runs and what it keeps."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import bench
import lightning.pytorch as pl
import pretraining
import pytest
import running
import torch
import training
from cells import hash_of
from recipes_compared import CHANGES, ENTRIES, ROWS
from running import Book, Run, commit, opened
from studies import STUDIES, Part, Study
from tasks import TASKS, WIKITEXT

from tests.examples.tiny_study import (
    TINY,
    cell,
    line_of,
)

# What is run


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


@pytest.mark.parametrize("name", TASKS)
def test_a_setting_is_the_same_when_it_is_read_back(name: str) -> None:
    config = cell(task=TASKS[name]).config()
    assert config == json.loads(json.dumps(config))


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
        assert line["switch_steps"][-1] == round(20 * entry.switch)  # masks may have come before
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
    missing = task.missing(tmp_path)
    if task.trainer and not torch.cuda.is_available():
        assert missing == "needs a CUDA device"
    else:
        assert missing is None if not task.files else task.fetch in missing


def test_sgd_has_as_many_rates_as_adam_where_both_are_compared() -> None:
    tasks = [
        p.task for study in STUDIES.values() for p in study.parts if any(ROWS[row].optimizer == "SGD" for row in p.rows)
    ]
    assert tasks
    for task in tasks:
        assert len(task.sgd.rates) == len(task.adam.rates)


def test_a_part_may_have_seeds_of_its_own() -> None:
    part = Part(TINY, ("dense", "ASP"), ("2:4",), seeds=(0, 1, 2, 3))
    study = Study((part, Part(TINY, ("SR-STE",), ("2:4",))), seeds=(0, 1), finalists=1)
    rates, lams = len(TINY.adam.rates), len(TINY.adam.lams)
    assert study.count() == 2 * (rates + 3) + rates * lams + 1
    lines = [line_of(one.row, one.seed, 1.0, lr=one.lr, lam=one.lam) for one in study.cells({})]
    done = {str(line["key"]): line for line in lines}
    seeds = {row: {one.seed for one in study.cells(done) if one.row == row} for row in ("dense", "ASP", "SR-STE")}
    assert seeds == {"dense": {0, 1, 2, 3}, "ASP": {0, 1, 2, 3}, "SR-STE": {0, 1}}
    assert {one.seed for one in study.sown((5,)).cells(done)} == {5}


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


def test_a_task_that_fine_tunes_starts_from_the_same_weights_whoever_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "KEPT", tmp_path)
    tuned = TINY.sized(pretraining=40, pretraining_rate=1e-2)
    found = [training.train(cell(task=tuned, row=row, seed=1), tmp_path) for row in ("SR-STE", "SR-STE", "dense")]
    assert found[0]["losses"] == found[1]["losses"]  # the first one has made them, the second has read them
    assert len(list(tmp_path.glob("*.pt"))) == 1
    fresh = training.train(cell(row="dense", seed=1), tmp_path)
    assert found[2]["losses"][0][1] < fresh["losses"][0][1] - 0.1
    assert cell(task=tuned).key != cell().key
    training.train(cell(task=tuned, row="dense", seed=2), tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 2
