"""Safetensors files of other tools: what they hold is looked up, and proved only where it is asked for."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_step import NMPattern
from lightning_step.cli import main
from lightning_step.errors import ConfigurationError, FileFormatError, ViolationError
from lightning_step.export import describe_file, verify_file

TWO_FOUR = NMPattern(2, 4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool]


def two_four(*shape, dim, dtype=torch.float32):
    """The first and the last of every four along one dimension, and nothing else: no other dimension holds 2:4."""
    index = torch.arange(shape[dim]) % 4
    kept = (index == 0) | (index == 3)
    return kept.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape).contiguous().to(dtype)


@pytest.fixture
def file(tmp_path):
    tensors = {
        "fc.weight": two_four(8, 16, dim=1),
        "hf.weight": two_four(16, 8, dim=0),
        "conv.weight": two_four(8, 8, 3, 3, dim=1),
        "odd.weight": two_four(8, 6, dim=1),
        "both.weight": torch.eye(8),
        "embedding.weight": torch.ones(8, 16),
        "fc.bias": torch.ones(8),
        "scale": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "plain.safetensors", {"format": "pt"})
    return tmp_path / "plain.safetensors"


def test_inspect_says_where_two_four_holds_and_guesses_nothing(file, capsys):
    assert main(["inspect", str(file)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(
        "plain.safetensors: safetensors without a manifest of lightning-step, 6 tensors of two dimensions"
    )
    rows = {line.split()[0]: line for line in lines if line}
    assert {name: row.partition("%")[2].strip() for name, row in rows.items() if ".weight" in name} == {
        "both.weight": "dim 0, dim 1",
        "conv.weight": "dim 1",
        "embedding.weight": "none",
        "fc.weight": "dim 1",
        "hf.weight": "dim 0",
        "odd.weight": "none",
    }
    assert " 50.0%" in rows["fc.weight"]
    assert " 12.5%" in rows["both.weight"]
    assert "Which layers use them is not known." in lines[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_looked_into(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"fc.weight": two_four(4, 8, dim=1, dtype=dtype)}, path)
    assert "50.0%  dim 1" in describe_file(path)
    assert verify_file(path, TWO_FOUR) == 1
    with pytest.raises(ViolationError):
        verify_file(path, NMPattern(1, 4))


def test_numbers_that_torch_cannot_compare_are_said_to_be_unknown(tmp_path, known):
    if not known(torch.float4_e2m1fn_x2):
        pytest.skip("needs a safetensors that has it")
    path = tmp_path / "a.safetensors"
    save_file({"fc.weight": torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    assert "not known  not known" in describe_file(path)
    with pytest.raises(ConfigurationError, match=r"compare with zero, but got 'fc.weight' of torch.float4_e2m1fn_x2"):
        verify_file(path, TWO_FOUR)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--include", "fc", "--include", "conv*", "--exclude", "*.bias"], 2),
        (["--include", "hf.weight", "--dim", "0"], 1),
        (["--exclude", "odd", "--exclude", "hf", "--exclude", "embedding"], 3),  # and no 1-D tensor, which nobody named
    ],
)
def test_verify_proves_what_is_named(words, count, file, capsys):
    assert main(["verify", str(file), "--n", "2", "--m", "4", *words]) == 0
    assert capsys.readouterr().out == f"{file}: {count} tensor{'s' * (count != 1)} verified\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "ConfigurationError: Expected a pattern for .* which has no manifest of lightning-step, but got none"),
        (["--n", "2"], "ConfigurationError: Expected both --n and --m"),
        (["--n", "2", "--m", "4"], "ViolationError: Expected 'embedding.weight' to hold 2:4 along dim 1, but got 4 "),
        (["--n", "1", "--m", "4", "--include", "fc.weight"], r"ViolationError: .*'fc.weight'.* 2 non-zero weights in group"),
        (["--n", "2", "--m", "4", "--include", "odd"], r"ViolationError: .*got the shape \(8, 6\), which cannot"),
        (["--n", "2", "--m", "4", "--include", "fc.weight", "--dim", "2"], "ViolationError: .*along dim 2, but got the"),
        (["--n", "2", "--m", "4", "--include", "fc.bias"], "ViolationError: .*'fc.bias'.*got the shape"),
        (["--n", "2", "--m", "4", "--include", "fcc"], "TargetError: Expected every glob of `include` to match"),
        (["--n", "2", "--m", "4", "--exclude", "*"], "TargetError: Expected a tensor to verify in"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_one_line_and_status_1(words, error, file, capsys):
    assert main(["verify", str(file), *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    with pytest.raises(AssertionError, match=f"^error: {error}"):
        raise AssertionError(captured.err)


def test_the_first_bad_group_is_named(file, tmp_path):
    weight = two_four(4, 8, dim=1)
    weight[2, 5] = 1
    save_file({"fc.weight": weight}, tmp_path / "bad.safetensors")
    with pytest.raises(ViolationError, match=r"but got 3 non-zero weights in group \(2, 1\) \(and 0 more bad groups\)"):
        verify_file(tmp_path / "bad.safetensors", TWO_FOUR)


@pytest.mark.parametrize("body", [b"", b"\x10\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_what_is_no_whole_file_is_told(body, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(body)
    for read in (describe_file, verify_file):
        with pytest.raises(FileFormatError, match=r"Expected a whole safetensors file, but got .*a\.safetensors"):
            read(path)


def test_a_manifest_speaks_for_itself(tmp_path):
    from torch import nn

    from lightning_step import apply_nm_masks, export_model

    layer = nn.Linear(8, 4)
    apply_nm_masks(layer, NMPattern(1, 4))
    path = export_model(layer, tmp_path / "ours.safetensors").path
    assert verify_file(path) == 1
    for more in ({"pattern": TWO_FOUR}, {"include": ["weight"]}, {"exclude": ["bias"]}, {"dim": 1}):
        with pytest.raises(ConfigurationError, match=r"Expected no pattern, globs or dimension for .*ours\.safetensors"):
            verify_file(path, **more)
