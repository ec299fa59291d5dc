"""docs/packed-format.md: its example is a file, its rules are kept, and what it says a reader must refuse is refused."""

import json
import math
import os
import re
import struct
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, export_model, load_sparse
from lightning_step.errors import ConfigurationError, FileFormatError, PatternError
from lightning_step.export import read_manifest
from lightning_step.functional import Packed, index_width, pack_nm, unpack_nm

TEXT = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.partition("## Worked example")[2].partition("## What is not checked")[0]


def example():
    """Everything that the worked example says, taken from its text alone."""
    rows = [
        [float(x) for x in line.replace("|", " ").split()]
        for line in re.findall(r"^ {4}row \d: (.*)$", EXAMPLE, re.MULTILINE)
    ]
    cells = [line.strip("|").split("|") for line in EXAMPLE.splitlines() if re.match(r"\| \d", line)]
    numbers = [re.findall(r"-?[\d.]+", re.sub(r"\(.*", "", cell[2])) for cell in cells]
    table = {
        "places": [[int(x) for x in cell[1].split(",")] for cell in cells],
        "weights": [[float(x) for x in weights] for weights in numbers],
        "ranks": [int(cell[3].rpartition("=")[2]) for cell in cells[:3]] + [int(cells[3][3])],
        "fields": [[int(x) for x in cell[4].split()] for cell in cells],
    }
    values = bytes.fromhex(re.search(r"^ {4}((?:[0-9a-f]{8} ?)+)$", EXAMPLE, re.MULTILINE).group(1))
    index = bytes.fromhex(re.search(r"the two bytes `([0-9a-f ]+)`", EXAMPLE).group(1))
    manifest = json.loads(
        re.search(r'^ {4}(\{"version".*?\}\n*)$', EXAMPLE, re.MULTILINE | re.DOTALL).group(1).split("\n\n")[0]
    )
    return rows, table, values, index, manifest


def test_the_example_is_a_file_that_we_read(tmp_path, by_hand):
    rows, _, values, index, manifest = example()
    assert torch.tensor(rows).shape == (2, 8)
    header = {
        "__metadata__": {"lightning_step": json.dumps(manifest)},
        "fc.weight.nm_values": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
        "fc.weight.nm_index": {"dtype": "U8", "shape": [2], "data_offsets": [32, 34]},
    }
    tensors = load_sparse(by_hand.put_together(tmp_path / "file", header, values + index))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"fc.weight": rows, "again.weight": rows}


def test_the_example_is_what_we_write():
    rows, _, values, index, _ = example()
    packed = pack_nm(torch.tensor(rows), NMPattern(2, 4))
    assert packed.values.numpy().tobytes() == values
    assert packed.index.numpy().tobytes() == index


def test_the_steps_of_the_example_follow_from_one_another():
    rows, table, values, index, _ = example()
    groups = [row[i : i + 4] for row in rows for i in (0, 4)]
    for group, places, weights, rank, field in zip(groups, *table.values(), strict=True):
        assert [group[place] for place in places] == weights
        assert all(group[place] == 0 for place in range(4) if place not in places)
        assert rank == math.comb(places[0], 1) + math.comb(places[1], 2)
        assert field == [rank >> i & 1 for i in range(3)]
    stream = [bit for field in table["fields"] for bit in field]
    assert re.search(r"The stream `([01 ]+)`", EXAMPLE).group(1).replace(" ", "") == "".join(map(str, stream))
    assert int.from_bytes(index, "little") == sum(bit << i for i, bit in enumerate(stream))
    assert values == struct.pack("<8f", *(weight for weights in table["weights"] for weight in weights))
    assert "3 for 2:4" in TEXT.replace("\n", " ")


def bits_needed(n, m):
    return (math.comb(m, n) - 1).bit_length()


def test_the_wide_patterns_are_those_that_the_text_names():
    assert "No pattern with m <= 65 is wide; at m = 66 those from 30:66 to 36:66 are; 29:66 still has ranks, of 62" in TEXT
    assert not any(index_width(NMPattern(n, m)) != bits_needed(n, m) for m in range(2, 66) for n in range(1, m + 1))
    assert [n for n in range(1, 67) if index_width(NMPattern(n, 66)) == 66] == list(range(30, 37))
    assert index_width(NMPattern(29, 66)) == 62
    assert all(index_width(NMPattern(n, m)) == m for m, n in ((66, 33), (100, 33), (100, 67), (65_536, 33)))


@pytest.mark.parametrize(("n", "m"), [(29, 66), (30, 66), (36, 66), (37, 66), (2, 128), (126, 128), (4, 512), (510, 512)])
def test_the_first_and_the_last_mask_of_large_groups_come_back(n, m):
    weight = torch.zeros(3, m)
    weight[0, :n] = weight[1, m - n :] = torch.arange(1.0, n + 1)
    weight[2, torch.randperm(m)[:n]] = 1.0
    packed = pack_nm(weight, NMPattern(n, m))
    width = bits_needed(n, m) if bits_needed(n, m) <= 62 else m
    stream = int.from_bytes(packed.index.numpy().tobytes(), "little")
    first, last = stream & (2**width - 1), stream >> width & (2**width - 1)
    assert (first, last) == ((0, math.comb(m, n) - 1) if width != m else (2**n - 1, (2**n - 1) << (m - n)))
    assert torch.equal(unpack_nm(packed, NMPattern(n, m), (3, m)), weight)


@pytest.mark.parametrize(("n", "m"), [(3, 7), (5, 9)])
def test_every_rank_of_an_odd_pattern_is_its_place_among_all_masks(n, m):
    masks = sorted(combinations(range(m), n), key=lambda places: places[::-1])
    width = bits_needed(n, m)
    stream = sum(rank << (width * rank) for rank in range(len(masks)))
    index = torch.tensor(list(stream.to_bytes(-(-width * len(masks) // 8), "little")), dtype=torch.uint8)
    rows = unpack_nm(Packed(torch.ones(len(masks), n), index), NMPattern(n, m), (len(masks), m))
    assert [tuple(row.nonzero().flatten().tolist()) for row in rows] == masks


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1025), (63, 64 * 1024), (64, 65_537), (60_000, 65_537), (1, 2**62), (2**61, 2**62)]
)
def test_patterns_out_of_bounds_are_refused_before_anything_is_counted_or_allocated(n, m):
    message = rf"^Expected m <= 65536 and m <= 1024 \* n in a packed tensor, but got {n}:{m}\. Store it dense"
    with pytest.raises(PatternError, match=message):
        unpack_nm(Packed(torch.zeros(0, 1), torch.zeros(0, dtype=torch.uint8)), NMPattern(n, m), (0, m))
    with pytest.raises(PatternError, match=message):
        pack_nm(torch.zeros(0, min(m, 100)), NMPattern(n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 1024), (64, 65_536), (4095, 4096)])
def test_patterns_at_the_bounds_are_taken(n, m):
    weight = torch.zeros(1, m)
    weight[0, m - n :] = 1.0
    assert torch.equal(unpack_nm(pack_nm(weight, NMPattern(n, m)), NMPattern(n, m), (1, m)), weight)


def test_a_pattern_that_nobody_packs_is_exported_dense(tmp_path):
    model = nn.Linear(1025, 1)
    apply_nm_masks(model, NMPattern(1, 1025))
    with pytest.raises(PatternError, match=r"but got 1:1025\. Store it dense"):
        export_model(model, tmp_path / "file", "packed")
    assert not list(tmp_path.iterdir())
    assert load_sparse(export_model(model, tmp_path / "file", "dense").path)["weight"].count_nonzero() == 1


def test_a_header_without_padding_is_read(golden, tmp_path):
    text = json.dumps(golden.header).encode()
    for spaces in range(8):
        padded = text + b" " * spaces
        (tmp_path / "file").write_bytes(struct.pack("<Q", len(padded)) + padded + golden.data)
        assert load_sparse(tmp_path / "file", golden.plain()).fc.weight.tolist() == golden.dense


def test_a_tensor_of_the_name_that_the_header_takes_is_refused(tmp_path):
    model = nn.Linear(8, 4)
    apply_nm_masks(model, NMPattern(2, 4))
    model.register_buffer("__metadata__", torch.zeros(1))
    with pytest.raises(ConfigurationError, match="Expected no tensor named '__metadata__', but got one"):
        export_model(model, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/dev/zero", "a\0b", "~", "..\\con", "__import__('os').abort()"])
def test_a_name_is_just_a_name(name, golden, tmp_path, by_hand):
    header = {**golden.header, name: {"dtype": "U8", "shape": [1], "data_offsets": [50, 51]}}
    path = by_hand.put_together(tmp_path / "file", header, golden.data + b"\x07")
    by_hand.edit_manifest(path, lambda manifest: manifest.pop("sha256"))
    assert load_sparse(path)[name].tolist() == [7]
    assert list(tmp_path.iterdir()) == [path]


PLAIN = {"dtype": "F32", "shape": [2, 8], "data_offsets": [50, 114]}


@pytest.mark.parametrize(
    ("extra", "aliases", "message"),
    [
        ({"fc.weight": PLAIN}, None, "'fc.weight.nm_values' and 'fc.weight.nm_index' .* for 'fc.weight'"),
        ({"again.weight": PLAIN}, None, "every name in .* once, but got 'again.weight' as a tensor and in its manifest"),
        ({}, {"fc.weight": "fc.weight"}, "an alias of an alias"),
        ({}, {"a": "b", "b": "fc.weight"}, "an alias of an alias"),
        ({}, [["again.weight", "fc.weight"]], "not an object"),
    ],
)
def test_a_tensor_under_two_names_in_another_way_than_by_alias_is_refused(
    extra, aliases, message, golden, tmp_path, by_hand
):
    path = by_hand.put_together(tmp_path / "file", {**golden.header, **extra}, golden.data + bytes(64 * len(extra)))
    if aliases is not None:
        by_hand.edit_manifest(path, lambda manifest: manifest.update(aliases=aliases))
    with pytest.raises(FileFormatError, match=message):
        load_sparse(path)


def test_a_key_that_occurs_twice_in_the_manifest_is_refused(golden, tmp_path, by_hand):
    text = golden.header["__metadata__"]["lightning_step"].replace('"n": 2', '"n": 1, "n": 2')
    path = by_hand.put_together(tmp_path / "file", {**golden.header, "__metadata__": {"lightning_step": text}}, golden.data)
    for read in (load_sparse, read_manifest):
        with pytest.raises(FileFormatError, match="a key occurs twice"):
            read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 2**63]},
        {"shape": [0, 2**40, 2**40]},
        {"shape": [4] + [1] * 64, "dim": 0},
        {"shape": [0, 2**64], "m": 2**64},
        {"shape": [10**4000, 10**4000]},
        {"shape": "28"},
        {"shape": {"2": 8}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_shapes_that_no_tensor_has_are_refused(change, golden, tmp_path, by_hand):
    path = by_hand.put_together(tmp_path / "file", golden.header, golden.data)
    by_hand.edit_manifest(path, lambda manifest: manifest["sparse"]["fc.weight"].update(change))
    with pytest.raises(
        FileFormatError, match=r"damaged one \(ValueError\(.*(no tensor has so many|must be integers)"
    ) as caught:
        load_sparse(path)
    assert len(str(caught.value)) < 1000, "a message that repeats the file"


def test_a_size_beyond_the_reach_of_torch_is_refused_outside_of_the_manifest_too(golden, tmp_path, by_hand):
    header = {**golden.header, "empty": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [50, 50]}}
    path = by_hand.put_together(tmp_path / "file", header, golden.data)
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        load_sparse(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float4_e2m1fn_x2], ids=str)
def test_what_cannot_become_the_dtype_of_the_model_is_refused_and_changes_nothing(dtype, tmp_path, known):
    if not known(dtype):
        pytest.skip("needs a safetensors that has it")
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    apply_nm_masks(first, NMPattern(2, 4))
    first.register_buffer("seen", torch.zeros(4, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype))
    second.register_buffer("seen", torch.zeros(4))
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    path = export_model(first, tmp_path / "file").path
    with pytest.raises(FileFormatError, match=rf"^Expected 'seen' in .* to become torch\.float32.* but got {dtype}"):
        load_sparse(path, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())
    assert load_file(path)["seen"].dtype == dtype


def test_a_fraction_does_not_become_a_whole_number(tmp_path):
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    apply_nm_masks(first, NMPattern(2, 4))
    first.register_buffer("seen", torch.tensor(2.5))
    second.register_buffer("seen", torch.tensor(0))
    with pytest.raises(FileFormatError, match=r"to become torch\.int64.* but got torch\.float32 \(it would lose"):
        load_sparse(export_model(first, tmp_path / "file").path, second)


def test_another_model_is_told_before_anything_is_unpacked(tmp_path, by_hand, golden):
    """A packed file may be 1024 times larger in memory."""
    path = by_hand.put_together(tmp_path / "file", golden.header, golden.data[:-2] + b"\xff\xff")
    with pytest.raises(FileFormatError, match="a file of another model"):
        load_sparse(path, nn.Linear(8, 2))
    with pytest.raises(FileFormatError, match="to unpack"):
        load_sparse(path, golden.plain())


def test_a_model_without_memory_is_refused(golden, tmp_path, by_hand):
    path = by_hand.put_together(tmp_path / "file", golden.header, golden.data)
    with pytest.raises(ConfigurationError, match=r"on the meta device\. Call `model\.to_empty\(device='cpu'\)` first"):
        load_sparse(path, golden.plain().to("meta"))
    assert load_sparse(path, golden.plain().to("meta").to_empty(device="cpu")).fc.weight.tolist() == golden.dense


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (load_sparse, read_manifest):
        with pytest.raises(
            FileFormatError, match=rf"readable file at `path`, but got '{tmp_path}/pipe': Not a file but a pipe"
        ):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["a\0b", os.devnull])
def test_paths_that_are_no_files_are_refused(path):
    with pytest.raises(FileFormatError, match=r"but got .*(null byte|truncated or damaged)"):
        load_sparse(path)
