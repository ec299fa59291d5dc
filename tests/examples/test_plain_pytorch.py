from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from lightning_step import load_sparse
from lightning_step.export import read_manifest
from lightning_step.functional import find_violation

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_trains_switches_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", "--steps", "20", "--out", str(path)])
    runpy.run_path(str(EXAMPLES / "plain_pytorch.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "optimizer step 10: second moment frozen (8 tensors); t_max reached" in said
    trained, stripped = said.split("validation loss ")[1].split("\n")[0].split(", after strip ")
    assert trained == stripped
    tensors, sparse = load_sparse(path), read_manifest(path).sparse
    assert len(sparse) == 8
    assert not any(find_violation(tensors[name], entry.pattern, entry.dim) for name, entry in sparse.items())
