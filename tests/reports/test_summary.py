from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_step import SRSTE, STEP, AtStep, AutoSwitch
from lightning_step.recipes import Recipe, describe
from lightning_step.reports.event_files import EventLog
from lightning_step.reports.exported import ExportedFile
from lightning_step.reports.runs import Run
from lightning_step.reports.summary import number, summary_table
from tests.reports.test_html import Checker


def cells(run: Run) -> list[str]:
    """What stands in the one row of the table, behind the heads of its columns."""
    return [word for word in Checker(f"<!DOCTYPE html>{summary_table([run])}").words if word.strip()][8:]


def of(recipe: Recipe) -> Run:
    info = {"recipe": describe(recipe), "switches": ["optimizer step 9: masks on (8 tensors); r: n"], "steps": 1200}
    file = ExportedFile(Path("m.safetensors"), "packed", 5_900, 10_000, {"2:4": 1, "1:8": 7}, 0.2, info)
    return Run("mine", Path("mine"), EventLog(), [file])


def test_a_row_says_what_differs_from_the_recipe_as_it_comes() -> None:
    assert cells(of(STEP()))[1] == "STEP()"
    assert cells(of(SRSTE(1e-3)))[1] == "SRSTE(lam=0.001)"
    assert cells(of(STEP(AutoSwitch(threshold=1e-7))))[1] == "STEP(switch=AutoSwitch(threshold=1e-07))"
    assert cells(of(replace(STEP(), masks_from=AtStep(0))))[1] == "STEP(masks_from=AtStep())"


def test_a_row_of_a_run_that_logged_nothing_but_left_a_file() -> None:
    file = "m.safetensors (packed): 5,900 bytes, 59.0 % of dense"
    row = [
        "mine",
        "STEP()",
        "2:4 (1 tensor), 1:8 (7 tensors)",
        "1,200",
        "step 9: masks on (8 tensors); r: n",
        "—",
        "0.2",
        file,
    ]
    assert cells(of(STEP())) == row


def test_a_row_of_a_run_that_only_logged_a_text() -> None:
    table = "masked  layer   shape   n:m  along  tensors\nx.weight  Linear  (4, 8)  1:4  dim 1        3"
    switch = "- optimizer step 5: masks on (3 tensors); a: b"
    text = f"### Recipe\n\n`STEP(lam=0.0, masks_from=None)`\n\n```\n{table}\n```\n\n{switch}"
    row = cells(Run("mine", Path("mine"), EventLog(texts={"sparsity/recipe/text_summary": text})))
    assert row[1:5] == ["STEP(lam=0.0)", "1:4 (3 tensors)", "0", "step 5: masks on (3 tensors); a: b"]


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.0, 1e-3, 123456.0, float("inf"))] == ["0", "0.0010", "1.235e+05", "inf"]
