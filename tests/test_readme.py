"""What the README shows is run, what it names is there."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
