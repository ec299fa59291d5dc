"""The Fabric loop and the Hugging Face callback train, switch, export; crashed and resumed they end at the same weights."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_step import load_sparse
from lightning_step.export import read_manifest
from lightning_step.functional import find_violation
from lightning_step.pattern import NMPattern

EXAMPLES = Path(__file__).parents[2] / "examples"
SWITCH = "optimizer step 5: second moment frozen (8 tensors); t_max reached"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`?isinstance"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as a script, in this process; returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_fabric(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("fabric_loop.py", "--steps", 10, "--out", tmp_path / "whole")
    assert said.count(SWITCH) == 1
    whole = load_sparse(tmp_path / "whole" / "model.safetensors")
    sparse = read_manifest(tmp_path / "whole" / "model.safetensors").sparse
    assert len(sparse) == 8
    assert not any(find_violation(whole[name], entry.pattern, entry.dim) for name, entry in sparse.items())
    for stop in (3, 7):  # a crash in either phase
        out = tmp_path / str(stop)
        assert f"step {stop}: " in run("fabric_loop.py", "--steps", 10, "--out", out, "--stop", stop)
        assert not (out / "model.safetensors").exists()
        assert run("fabric_loop.py", "--steps", 10, "--out", out, "--resume").count(SWITCH) == (stop < 5)
        resumed = load_sparse(out / "model.safetensors")
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.filterwarnings("ignore:GradScaler")
def test_fabric_in_half_precision(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("fabric_loop.py", "--steps", 10, "--out", tmp_path, "--precision", "bf16-mixed")
    assert said.count(SWITCH) == 1


def test_hugging_face(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("hf_trainer.py", "--steps", 10, "--save-steps", 3, "--out", tmp_path / "whole")
    assert said.count(SWITCH) == 1
    assert "model.h.*" in said or "h.*.attn.c_attn.weight" in said
    assert "8 tensors hold 2:4, 49,152 zeros in them" in said
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    pruned = [name for name, value in whole.items() if "c_" in name and value.ndim == 2]
    assert len(pruned) == 8
    assert not any(find_violation(whole[name], NMPattern(2, 4), 0) for name in pruned)  # Conv1D: (in, out)
    for step in (3, 6):  # a checkpoint of either phase
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        latent = load_file(checkpoint / "model.safetensors")
        assert all(int(latent[name].count_nonzero()) == latent[name].numel() for name in pruned)
        out = tmp_path / str(step)
        said = run("hf_trainer.py", "--steps", 10, "--save-steps", 100, "--out", out, "--resume", checkpoint)
        assert said.count(SWITCH) == (step < 5)
        resumed = load_file(out / "model" / "model.safetensors")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
