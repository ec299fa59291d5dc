from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, export_model
from lightning_step.errors import FileFormatError
from lightning_step.reports.exported import find_exported, read_exported


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).bfloat16()
    apply_nm_masks(made, NMPattern(1, 4), overrides={"1.*": (2, 4)})
    return made


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_sizes_patterns_and_density_of_a_file(format: str, model: nn.Module, tmp_path: Path) -> None:
    path = export_model(model, tmp_path / "model.safetensors", format, info={"recipe": {"type": "STEP"}}).path
    file = read_exported(path)
    weights, biases = [64 * 32, 32 * 16], 32 + 16
    assert file.patterns == {"1:4": 1, "2:4": 1}
    assert file.density == pytest.approx((weights[0] / 4 + weights[1] / 2) / sum(weights))
    assert file.dense_bytes == 2 * (sum(weights) + biases)
    assert file.bytes == Path(path).stat().st_size
    assert (file.format, file.info["recipe"]) == (format, {"type": "STEP"})


def test_files_of_others_are_passed_over_and_damaged_ones_told(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    good = export_model(model, tmp_path / "checkpoints" / "good.safetensors").path
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\1\2\3")
    files, problems = find_exported(tmp_path)
    assert [file.path for file in files] == [Path(good)]
    assert len(problems) == 1
    assert "bad.safetensors" in problems[0]
    with pytest.raises(FileFormatError, match="holds no manifest"):
        read_exported(tmp_path / "other.safetensors")
