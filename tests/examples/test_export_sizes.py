"""The benchmark of the export formats runs, at a small size, and its table says what its files are."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "export_sizes.py"


def test_every_format_of_both_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--repeats", "1", "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    kinds = ["safetensors.torch", "safetensors.torch, fsync", "dense", "packed", "folder"]
    kinds += ["dense, digests not compared", "packed, digests not compared", "onnx"]
    assert [row["format"] for row in rows] == kinds * 2
    by_kind = {(row["model"], row["format"]): row for row in rows}
    for model in ("BERT-Base (tiny)", "GPT-2 small (tiny)"):
        dense, packed = by_kind[model, "dense"], by_kind[model, "packed"]
        assert packed["bytes"] < dense["bytes"] == by_kind[model, "folder"]["bytes"]
        assert packed["masked_packed"] == pytest.approx(0.5 + 0.75 / 16), "values, and 3 bits for 4 weights"
        assert 1.0 < packed["to_bound"] < dense["to_bound"]
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 17
    assert table in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md"}
