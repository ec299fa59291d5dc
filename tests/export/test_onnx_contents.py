"""ONNX files at the command line: what their products hold, in words and as an exit status."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_step import NMPattern, apply_nm_masks
from lightning_step.cli import main
from lightning_step.export import export_onnx

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(self.grouped(self.conv(x)).mean(-1)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = Net()
    apply_nm_masks(model, NMPattern(1, 4), exclude=["head"])
    return export_onnx(model, (torch.randn(1, 8, 5),), tmp_path_factory.mktemp("onnx") / "net.onnx").path


@pytest.fixture
def file(written, tmp_path):
    return Path(shutil.copy(written, tmp_path / "net.onnx"))


@pytest.fixture
def without_manifest(file):
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    return file


def plant(file, name):
    """Weights without a zero."""
    model = onnx.load(file)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0 + 1, name))
    onnx.save(model, file)


def test_inspect_lists_every_product(file, capsys):
    assert main(["inspect", str(file)]) == 0
    head, _, title, *rows = capsys.readouterr().out.splitlines()
    assert head == "net.onnx: onnx, 3 of 4 constant weights hold their pattern along the summed axis"
    assert title.split()[:4] == ["weight", "product", "shape", "axis"]
    found = {row.split()[0]: row for row in rows}
    assert {name: ("1:4 (its manifest)" in row, "yes  " in row) for name, row in found.items()} == {
        "conv.weight": (True, True),
        "grouped.weight": (True, True),
        "fc.weight": (True, True),
        "head.weight": (False, False),
    }
    assert {name: row.rsplit("  ", 1)[1] for name, row in found.items()} == {
        "conv.weight": "yes",
        "grouped.weight": "no: a grouped convolution",
        "fc.weight": "yes",
        "head.weight": "no",
    }
    assert "no: 4 non-zero weights in group (0, 0)" in found["head.weight"]


def test_inspect_shows_a_planted_violation_that_verify_refuses(file, capsys):
    plant(file, "fc.weight")
    assert main(["inspect", str(file)]) == 0
    assert "2 of 4 constant weights hold" in capsys.readouterr().out
    assert main(["verify", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ViolationError: Expected the weight 'fc.weight' (8, 8) of Gemm ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 3),
        (["--include", "fc"], 1),
        (["--n", "2", "--m", "4", "--exclude", "head"], 3),
        (["--n", "4", "--m", "4"], 4),
    ],
)
def test_verify_proves_what_the_file_or_the_user_says(words, count, file, capsys):
    assert main(["verify", str(file), *words]) == 0
    assert capsys.readouterr().out == f"{file}: {count} tensor{'s' * (count != 1)} verified\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--n", "2", "--m", "4"], "ViolationError: Expected the weight 'head.weight' (3, 8) of Gemm"),
        (["--dim", "1"], "ConfigurationError: Expected no dimension for an ONNX file"),
        (["--include", "fcc"], "TargetError: Expected every glob of `include` to match"),
        (["--include", "head"], "TargetError: Expected a weight to verify in"),  # of which the file says nothing
    ],
)
def test_what_does_not_hold_is_one_line(words, error, file, capsys):
    assert main(["verify", str(file), *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_without_a_manifest_verify_wants_a_pattern(without_manifest, capsys):
    file = str(without_manifest)
    assert main(["verify", file]) == 1
    assert capsys.readouterr().err.startswith("error: ConfigurationError: Expected a pattern for ")
    assert main(["verify", file, "--n", "2", "--m", "4", "--exclude", "head"]) == 0
    assert main(["inspect", file]) == 0
    assert "its manifest" not in capsys.readouterr().out


def test_a_file_that_is_none_is_told(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 40)
    for command in ("inspect", "verify"):
        for name in ("a.onnx", "missing.onnx"):
            assert main([command, str(tmp_path / name)]) == 1
            assert capsys.readouterr().err.startswith("error: FileFormatError: Expected a ")


def test_without_onnx_it_says_what_to_install(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)  # how Python itself marks a module that cannot be imported
    assert main(["inspect", str(file)]) == 1
    error = "error: ConfigurationError: Expected the package 'onnx' to read and write ONNX, but got:"
    assert capsys.readouterr().err.startswith(error)
