"""Our own writer of the safetensors container against safetensors itself, and how much memory an export takes."""

import ctypes
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from lightning_step import NMPattern, find_targets
from lightning_step.errors import ConfigurationError
from lightning_step.export import export_model
from lightning_step.export.container import _NAMES, Slot, write_tensors


def some(dtype, shape=(3, 4)):
    """Random bits of any dtype."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def slots_of(tensors):
    return {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, named, tensors, metadata=None):
    """`named` says what the header holds, `tensors` what comes."""
    return write_tensors(path, slots_of(named), lambda digests: metadata or {}, tensors, dict.fromkeys(named, b"line\n"))


def halves(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return length, json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_every_dtype_lies_where_safetensors_puts_it(tmp_path, known):
    tensors = {f"{place} {dtype}": some(dtype) for place in "ba" for dtype in _NAMES if known(dtype)}
    assert len(tensors) > 2 * 11
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "é \n": torch.arange(3)}
    metadata = {"format": "pt", "key": 'va"lué'}
    write(tmp_path / "file", tensors, tensors.items(), metadata)
    ours, theirs = halves((tmp_path / "file").read_bytes()), halves(save(tensors, metadata))
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2]
    assert ours[0] % 8 == 0
    back = load_file(tmp_path / "file")
    assert all(torch.equal(back[n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)) for n, t in tensors.items())


def test_tensors_may_come_in_any_order_and_as_views(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.ones(5, dtype=torch.uint8),
        "c": torch.zeros(1).expand(4),
    }
    for order in (list(tensors), list(reversed(tensors))):
        path = tmp_path / order[0]
        write(path, tensors, ((name, tensors[name]) for name in order))
        back = load_file(path)
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "Expected every tensor of the header, but got none for 'a'"),
        ([("a", torch.zeros(3))], r"Expected 'a' as Slot\(dtype=torch.float32, shape=\(2,\)\), each once, but got .*\(3,\)"),
        ([("a", torch.zeros(2, dtype=torch.int32))], "each once, but got .*int32"),
        ([("a", torch.zeros(2))] * 2, "each once"),
        ([("b", torch.zeros(2))], "Expected 'b' as None"),
    ],
)
def test_what_the_header_does_not_say_is_refused(tensors, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        write(tmp_path / "file", {"a": torch.zeros(2)}, tensors)


def test_the_same_model_gives_the_same_bytes(zoo, tmp_path):
    for format in ("dense", "packed"):
        one, other = (export_model(zoo.trained(), tmp_path / name, format).path.read_bytes() for name in "ab")
        assert one == other


def peak_above_now(work):
    """How much the resident memory of this process rises, at most, while something runs; in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_an_export_takes_memory_for_a_few_tensors_not_for_the_model(format, tmp_path):
    tensor, count = 2 * 2**20, 48
    model = nn.Sequential(*[nn.Linear(512, 1024, bias=False) for _ in range(count)])
    with torch.no_grad():
        for layer in model:
            layer.weight.view(-1, 4)[:, 2:] = 0.0
    targets = find_targets(model, NMPattern(2, 4))
    export_model(model[:1], tmp_path / "warm", format, targets=find_targets(model[:1], NMPattern(2, 4)))
    taken = peak_above_now(lambda: export_model(model, tmp_path / "file", format, targets=targets))
    copies = peak_above_now(lambda: [layer.weight.clone() for layer in model])
    assert copies > 0.9 * count * tensor, "the measure does not see what it should"
    assert taken < 20 * tensor, f"{taken / tensor:.1f} tensors"
