"""The figures of docs/how-step-works.md: they can be made, and the page says what the committed numbers say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-step-works.md"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        spec = importlib.util.spec_from_file_location("second_moment", ROOT / "examples" / "second_moment.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["second_moment"] = module  # where dataclasses look
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The program as a user runs it, only shorter."""
    out = tmp_path_factory.mktemp("second-moment")
    command = [
        sys.executable,
        str(ROOT / "examples" / "second_moment.py"),
        "--steps",
        "20",
        "--every",
        "2",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return out, run.stdout


def test_a_run_is_measured_at_the_steps_asked_for_and_drawn(made: tuple[Path, str]) -> None:
    out, said = made
    runs = json.loads((out / "second-moment.json").read_text())["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {name: list(range(2, 21, 2)) for name in runs}
    assert {name: run["switch"] for name, run in runs.items()} == {"dense": None, "SR-STE": 0, "STEP": 10}
    assert [(out / name).read_text().startswith("<?xml") for name in ("v-norm.svg", "step-size.svg")] == [True, True]
    assert "step of pruned" in said


def test_the_dense_phase_of_step_is_the_dense_run_and_v_is_held_behind_it(made: tuple[Path, str]) -> None:
    out, _ = made
    runs = json.loads((out / "second-moment.json").read_text())["runs"]
    dense, step = runs["dense"], runs["STEP"]
    assert step["norm"][:4] == dense["norm"][:4]
    assert step["kept"][:5] == dense["kept"][:5]
    assert len(set(step["norm"][4:])) == 1  # from the switch at step 10 on
    assert len(set(dense["norm"])) == 10


def test_the_page_shows_the_numbers_that_are_committed(program: ModuleType) -> None:
    saved = json.loads((ROOT / "docs" / "images" / "second-moment.json").read_text())
    runs = {name: program.Series(**run) for name, run in saved["runs"].items()}
    table = [re.sub(r"\s*\|\s*", "|", line).strip("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert ["|".join(row) for row in program.summary(runs)[1:]] == table[2:5]
    text = " ".join(PAGE.read_text().split())
    assert [part for part in saved["made"].split("; ") if part not in text] == []
