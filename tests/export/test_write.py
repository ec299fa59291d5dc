"""What is in a file, checked with plain safetensors, loops and bytes of our own; and what is not written at all."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, export_model, find_targets, load_sparse, strip
from lightning_step.errors import ArgumentTypeError, ConfigurationError, PatternError, ViolationError
from lightning_step.parametrization import nm_masks

PATTERNS = [(2, 4), (1, 4), (1, 8), (3, 8), (1, 16), (1, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def most_nonzeros(array, m, dim):
    """In any group, counted one by one."""
    moved = np.moveaxis(array, dim, -1)
    groups = ((at, k) for at in np.ndindex(*moved.shape[:-1]) for k in range(0, moved.shape[-1], m))
    return max(sum(1 for value in moved[at][k : k + m] if value != 0) for at, k in groups)


def unpacked_by_loops(values, index, n, m, shape, dim):
    """The packed format from its specification alone: masks in colexicographic order, bits read one by one."""
    masks = sorted(itertools.combinations(range(m), n), key=lambda places: places[::-1])
    width = math.ceil(math.log2(len(masks)))
    stream = [(byte >> bit) & 1 for byte in index.tolist() for bit in range(8)]
    moved = [size for i, size in enumerate(shape) if i != dim] + [shape[dim]]
    rows = torch.zeros(math.prod(moved) // m, m, dtype=values.dtype)
    for g in range(len(rows)):
        rank = sum(bit << i for i, bit in enumerate(stream[g * width : (g + 1) * width]))
        rows[g, list(masks[rank])] = values[g]
    assert not any(stream[len(rows) * width :]), "the last byte is filled up with zeros"
    return rows.reshape(moved).movedim(-1, dim)


def small(enabled=True):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    targets = apply_nm_masks(model, NMPattern(2, 4), enabled=enabled)
    return model, targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_dense_file_holds_the_masked_weights_under_plain_keys(n, m, dtype, zoo, tmp_path):
    model = zoo.trained(n, m, dtype)
    export_model(model, tmp_path / "file", "dense")
    with safe_open(tmp_path / "file", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    counts = {name: most_nonzeros(stored[name].float().numpy(), m, dim) for name, dim in zoo.dims.items()}
    assert counts == dict.fromkeys(zoo.dims, n)
    expected = zoo.masked(model, n, m)
    del expected["tied.weight"]  # stored once, as linear.weight
    assert zoo.bits_of(stored) == zoo.bits_of(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_packed_file_decodes_by_loops_to_the_masked_weights(n, m, dtype, zoo, tmp_path):
    model = zoo.trained(n, m, dtype)
    export_model(model, tmp_path / "file", "packed")
    stored = load_file(tmp_path / "file")
    expected = zoo.masked(model, n, m)
    del expected["tied.weight"]
    for name, dim in zoo.dims.items():
        values, index = stored.pop(name + ".nm_values"), stored.pop(name + ".nm_index")
        stored[name] = unpacked_by_loops(values, index, n, m, tuple(expected[name].shape), dim)
    assert zoo.bits_of(stored) == zoo.bits_of(expected)


def test_plain_safetensors_loads_a_dense_file_strictly(zoo, tmp_path):
    model = zoo.trained(tied=False)
    export_model(model, tmp_path / "file")
    plain = zoo.plain(tied=False)
    plain.load_state_dict(load_file(tmp_path / "file"), strict=True)
    assert zoo.bits_of(plain.state_dict()) == zoo.bits_of(zoo.masked(model, 2, 4))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_packed_file_is_values_and_index_and_header(n, m, zoo, tmp_path, by_hand):
    model = zoo.trained(n, m)
    exported = export_model(model, tmp_path / "file", "packed")
    tensors = dict(model.state_dict())
    del tensors["tied.weight"]
    size = sum(tensor.numel() * tensor.itemsize for name, tensor in tensors.items() if name not in zoo.dims)
    for name in zoo.dims:
        groups = tensors[name].numel() // m
        size += groups * n * 4 + math.ceil(groups * math.ceil(math.log2(math.comb(m, n))) / 8)
    assert len(by_hand.take_apart(exported.path)[1]) == size
    assert exported.bytes == exported.path.stat().st_size


def test_golden_bytes(golden, tmp_path, by_hand):
    header, data = by_hand.take_apart(export_model(golden.trained(), tmp_path / "x", "packed", info={"recipe": "STEP"}).path)
    assert header.pop("__metadata__") == {"format": "pt", "lightning_step": golden.manifest}
    assert header == {name: entry for name, entry in golden.header.items() if name != "__metadata__"}
    assert data.hex() == golden.data.hex()


def test_the_specification_works_out_the_golden_bytes(golden):
    text = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text(encoding="utf-8")
    assert golden.values in text
    assert golden.index in text
    assert json.loads(golden.manifest)["n_means"] in text


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_export_leaves_the_model_as_it_is(format, zoo, tmp_path):
    model = zoo.trained()
    before, types = zoo.bits_of(model.state_dict()), [type(module) for module in model.modules()]
    export_model(model, tmp_path / "file", format)
    assert zoo.bits_of(model.state_dict()) == before
    assert [type(module) for module in model.modules()] == types
    assert all(mask.enabled for mask in nm_masks(model).values())


def test_masks_that_never_came_on_are_refused_and_one_shot_prunes_a_copy(zoo, tmp_path):
    model = zoo.trained(enabled=False)
    before = zoo.bits_of(model.state_dict())
    message = (
        r"^Expected a model with learned masks, but got 9 masks of which none is on.*prune by magnitude now with `one_shot"
    )
    with pytest.raises(ConfigurationError, match=message):
        export_model(model, tmp_path / "file")
    assert not list(tmp_path.iterdir())
    export_model(model, tmp_path / "file", one_shot=True)
    assert zoo.bits_of(load_sparse(tmp_path / "file")) == zoo.bits_of(zoo.masked(model, 2, 4))
    assert zoo.bits_of(model.state_dict()) == before
    assert not any(mask.enabled for mask in nm_masks(model).values())


def test_a_model_without_masks_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="but got 0 masks"):
        export_model(nn.Linear(8, 4), tmp_path / "file", one_shot=True)


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_stripped_model_is_verified_not_pruned(format, tmp_path):
    model, targets = small()
    strip(model)
    path = export_model(model, tmp_path / "file", format, targets=targets).path
    assert torch.equal(load_sparse(path)["2.weight"], model[2].weight)
    good = path.read_bytes()
    with torch.no_grad():
        model[0].weight[1, 4:8] = 1.0
        model[0].weight[3, :4] = 1.0
    message = (
        r"^Expected '0\.weight' to hold 2:4 along dim 1, but got 4 non-zero weights in group \(1, 1\) "
        r"\(and 1 more bad groups\)\. Export never prunes"
    )
    with pytest.raises(ViolationError, match=message):
        export_model(model, path, format, targets=targets)
    assert path.read_bytes() == good, "a refused export has touched the file"


def test_a_minus_zero_is_kept_as_long_as_there_is_room(tmp_path, zoo):
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -0.0, 0.0, 1.0, -0.0, 2.0, -0.0, -0.0]]))
    path = export_model(model, tmp_path / "x", "packed", targets=find_targets(model, NMPattern(2, 4))).path
    expected = torch.tensor([[0.0, -0.0, 0.0, 1.0, -0.0, 2.0, 0.0, 0.0]])
    assert zoo.bits_of(load_sparse(path)) == zoo.bits_of({"weight": expected})


def test_targets_of_another_model_are_refused(tmp_path):
    model, _ = small()
    targets = find_targets(nn.ModuleDict({"net": model}), NMPattern(2, 4))
    with pytest.raises(ConfigurationError, match=r"^Expected the state dict to hold the tensor 'net\.0\.weight'"):
        export_model(model, tmp_path / "file", targets=targets)
    other = find_targets(nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 8)), NMPattern(1, 3), include=["0"])
    with pytest.raises(PatternError, match="size 8 along dim 1"):
        export_model(model, tmp_path / "file", targets=other)


def test_a_masked_tensor_under_another_key_does_not_pass_unverified(tmp_path):
    model, _ = small()
    model[0].register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({"x": state.pop(prefix + "weight")})
    )
    with pytest.raises(ConfigurationError, match=r"to hold the tensor '0\.weight', which must be 2:4"):
        export_model(model, tmp_path / "file")


def test_a_name_that_packing_would_take_is_refused(tmp_path):
    model, _ = small()
    model._buffers["0.weight.nm_values"] = torch.zeros(1)
    export_model(model, tmp_path / "dense", "dense")
    with pytest.raises(ConfigurationError, match=r"no tensor named '0\.weight\.nm_values' beside '0\.weight'"):
        export_model(model, tmp_path / "packed", "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_tensor_that_cannot_be_stored_leaves_the_old_file(tmp_path):
    model, _ = small()
    path = export_model(model, tmp_path / "file").path
    good = path.read_bytes()
    model.register_buffer("exotic", torch.empty(1, dtype=torch.bits8))
    with pytest.raises(ConfigurationError, match=r"of a dtype that safetensors stores, but got 'exotic' of torch\.bits8"):
        export_model(model, path)
    with pytest.raises(ArgumentTypeError, match="Expected `info` to hold plain values"):
        export_model(small()[0], path, info={"where": path})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", good)]


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    model, _ = small()
    model.register_buffer("view", model[0].weight.new_zeros(4, 8)[:, ::2])
    model.register_buffer("expanded", model.view[:1, :1].expand(3, 3))
    tensors = load_sparse(export_model(model, tmp_path / "file").path)
    assert (tensors["view"].shape, tensors["expanded"].shape) == ((4, 4), (3, 3))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"^Expected `format` to be one of \['dense', 'packed'\], but got 'onnx'"):
        export_model(small()[0], tmp_path / "file", "onnx")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_packed_file_of_a_million_weights_is_within_one_percent_of_its_content(dtype, tmp_path):
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)]).to(dtype)
    apply_nm_masks(model, NMPattern(2, 4))
    size = export_model(model, tmp_path / "file", "packed").bytes
    content = 2**20 * (dtype.itemsize * 8 / 2 + 3 / 4) / 8
    assert content < size < 1.01 * content


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantized_tensors_are_verified_and_come_back(dtype, format, tmp_path, zoo):
    """A parameter of one byte a weight, as a quantizer leaves it."""
    model = nn.Linear(16, 8, bias=False)
    targets = find_targets(model, NMPattern(2, 4))
    weight = torch.arange(-64, 64).reshape(8, 16).float().div(16 if dtype.is_floating_point else 1).to(dtype)
    weight.view(torch.uint8).view(-1, 4)[:, ::2] = 0
    model.weight = nn.Parameter(weight, requires_grad=False)
    path = export_model(model, tmp_path / "file", format, targets=targets).path
    assert zoo.bits_of(load_sparse(path)) == zoo.bits_of({"weight": weight})
    weight.view(torch.uint8)[3, 4:8] = 1
    with pytest.raises(ViolationError, match=r"got 4 non-zero weights in group \(3, 1\)"):
        export_model(model, path, format, targets=targets)
