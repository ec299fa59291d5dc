"""What the README shows is run, what it names is there."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "examples" / "benchmarks" / "results" / "main"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_there_are_blocks_to_run() -> None:
    assert len(blocks("python")) >= 2
    assert len(blocks("yaml")) >= 1
    assert len(blocks("console")) >= 3


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(blocks("python")[number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's hints at defaults that the block leaves alone
        runpy.run_path(str(script))


@pytest.mark.filterwarnings("ignore")  # LightningCLI 2.6 calls what newer jsonargparse deprecates
@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_a_yaml_block_configures_a_trainer(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_step.cli import SparsityCLI

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-step"])
    config = tmp_path / "block.yaml"
    config.write_text(blocks("yaml")[number])
    model = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"]
    arguments: list[Any] = [f"--config={config}", model, *quiet]
    cli = SparsityCLI(subclass_mode_model=True, run=False, args=arguments, save_config_callback=None)
    ours = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"STEPSparsityCallback", "SparseExport"} <= set(ours)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("console")), re.MULTILINE)) | set(
        re.findall(r"`make ([a-z-]+)`", README)
    )
    assert {"demo", "test", "lint", "compare"} <= named
    assert named <= targets


def test_every_file_linked_or_named_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    configs = re.findall(r"--config (\S+)", README)
    assert links
    assert configs
    assert [path for path in links + configs if not (ROOT / path).exists()] == []


def test_no_placeholder_is_left() -> None:
    assert "<!--" not in README


def test_every_loss_in_its_tables_is_of_the_committed_comparison() -> None:
    table = (RESULTS / "results.md").read_text(encoding="utf-8")
    losses = re.findall(r"\d\.\d{4} ± \d\.\d{4}", README)
    assert len(losses) > 20
    assert [loss for loss in losses if f"| {loss} |" not in table] == []


def test_its_table_of_fine_tuning_is_that_of_the_committed_comparison() -> None:
    tables = {
        (task["name"], table["pattern"]): {row["row"]: row for row in table["rows"]}
        for task in json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))["tasks"]
        for table in task["tables"]
    }
    shown = re.findall(r"^\| `([\w-]+)`[^|]*\| (\d+:\d+) \|(.*)\|$", README, re.MULTILINE)
    assert {task for task, _, _ in shown} == {
        name for name, _ in tables if name.endswith("-tuned") and (name, "1:8") in tables
    }
    for task, pattern, cells in shown:
        rows = tables[task, pattern]
        *means, against = (cell.strip() for cell in cells.split("|"))
        for name, mean in zip(("dense", "ASP", "SR-STE", "the default"), means, strict=True):
            digits = len(mean.partition(".")[2])
            assert mean == f"{rows[name]['mean']:.{digits}f}", (task, pattern, name)
        found = rows["the default"]["against"]["SR-STE"]
        verdict = f", {found['verdict']}" if found["verdict"] else ""
        assert against == f"{found['difference']:+.{digits}f} (p {found['p']:.2g}{verdict})", (task, pattern)
