"""Models to export, and files taken apart by hand: neither safetensors nor our own code is asked what is in them."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightning_step


def take_apart(path):
    """Header and data of a safetensors file, by its specification: 8 bytes of length, JSON, bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 8 == 0, "safetensors aligns the data to 8 bytes"
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_together(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def edit_manifest(path, change):
    header, data = take_apart(path)
    manifest = json.loads(header["__metadata__"]["lightning_step"])
    change(manifest)
    header["__metadata__"]["lightning_step"] = json.dumps(manifest)
    return put_together(path, header, data)


@pytest.fixture
def by_hand():
    return SimpleNamespace(take_apart=take_apart, put_together=put_together, edit_manifest=edit_manifest)


# Every masked tensor of `Layouts` and the dimension its groups run along.
DIMS = {
    "linear.weight": 1,
    "conv1.weight": 1,
    "conv2.weight": 1,
    "conv3.weight": 1,
    "attention.in_proj_weight": 1,
    "attention.out_proj.weight": 1,
    "hf.weight": 0,
    "up.weight": 0,
}


class Layouts(nn.Module):
    """Every layout that gets a mask, and an embedding and buffers that do not."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(5, 32)
        self.linear = nn.Linear(32, 3)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(32, 2, 3), nn.Conv2d(64, 2, (3, 1)), nn.Conv3d(32, 2, 2)
        self.norm = nn.BatchNorm1d(3)
        self.attention = nn.MultiheadAttention(32, 2)
        self.hf = Conv1D(3, 32)
        self.up = nn.ConvTranspose2d(32, 2, 2)
        if tied:
            self.tied = nn.Linear(32, 3, bias=False)
            self.tied.weight = self.linear.weight


def trained(n=2, m=4, dtype=torch.float32, enabled=True, tied=True):
    """As training leaves it: latent weights with ties, zeros of both signs and extremes; masks on."""
    torch.manual_seed(n * 100 + m)
    model = Layouts(tied).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(4).round().div(4))
        weight = model.linear.weight
        weight[0] = 0.0
        weight[1] = -0.0
        weight[2, :4] = torch.tensor([torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0])
        model.norm.running_mean.copy_(torch.tensor([1.0, -0.0, 3.0]))
        model.norm.num_batches_tracked.fill_(2**40)
    model.conv2.to(memory_format=torch.channels_last)
    lightning_step.apply_nm_masks(model, lightning_step.NMPattern(n, m), enabled=enabled)
    return model


def masked_by_loops(model, n, m):
    """The plain state dict with the masks of the paper: the n largest magnitudes, the earlier one of equals."""
    expected = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, dim in (DIMS | {"tied.weight": 1}).items():
        if name in expected:
            rows = expected[name].movedim(dim, -1)  # a view
            magnitude = np.abs(rows.double().numpy())
            for at in np.ndindex(*magnitude.shape[:-1]):
                for start in range(0, magnitude.shape[-1], m):
                    group = magnitude[at][start : start + m].tolist()
                    order = sorted(range(m), key=lambda i, group=group: -group[i])  # stable
                    rows[at][[start + i for i in order[n:]]] = 0.0
    return expected


def bits_of(tensors):
    """Type, shape and bytes of every tensor: what has to be equal, bit for bit."""
    return {
        k: (t.dtype, tuple(t.shape), t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for k, t in tensors.items()
    }


@pytest.fixture
def zoo():
    return SimpleNamespace(plain=Layouts, trained=trained, masked=masked_by_loops, dims=DIMS, bits_of=bits_of)


class Golden(nn.Module):
    """A layer, a second one tied to it, and a counter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)
        self.again = nn.Linear(8, 2, bias=False)
        self.again.weight = self.fc.weight
        self.register_buffer("steps", torch.tensor(0))


# What docs/packed-format.md works out, digit by digit. Never edit these literals: files written yesterday look like this.
GOLDEN_LATENT = [[0.1, 1.5, -1.0, -2.0, 3.0, 0.5, 0.25, 0.0], [0.5, 0.25, 1.0, -1.0, 0.0, 4.0, 0.0, 0.0]]
GOLDEN_DENSE = [[0.0, 1.5, 0.0, -2.0, 3.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0, 0.0, 4.0, 0.0, 0.0]]
GOLDEN_MANIFEST = (
    '{"aliases": {"again.weight": "fc.weight"}, "format": "packed", "info": {"recipe": "STEP"}, '
    '"n_means": "weights kept of every m consecutive ones along dim", '
    '"sha256": {'
    '"fc.bias": "cd3958c8080a1d73ec8a399470c872aef91d269cbcb51cd40585ecfc81c3bc49", '
    '"fc.weight.nm_index": "71f317972c5520820db958829123f3871edd6564e5bd9e1cd4e36218ed5a41d9", '
    '"fc.weight.nm_values": "a1c97da79a30ecdb77193d16dc2d6d0546af9019253be74b4aea453717225c5c", '
    '"steps": "db382772a587c93693d478a4445957162c526a1cda13cbdfed2091bb2a501bed"'
    "}, "
    '"sparse": {"fc.weight": {"dim": 1, "m": 4, "n": 2, "shape": [2, 8]}}, '
    '"version": 1, "written_by": "lightning-step 0.1.0"}'
)
GOLDEN_HEADER = {
    "__metadata__": {"format": "pt", "lightning_step": GOLDEN_MANIFEST},
    "steps": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
    "fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    "fc.weight.nm_values": {"dtype": "F32", "shape": [4, 2], "data_offsets": [16, 48]},
    "fc.weight.nm_index": {"dtype": "U8", "shape": [2], "data_offsets": [48, 50]},
}
GOLDEN_VALUES = "0000c03f 000000c0 00004040 0000003f 0000803f 000080bf 00000000 00008040"
GOLDEN_INDEX = "44 01"
GOLDEN_DATA = bytes.fromhex("0700000000000000" + "0000803e 000080bf" + GOLDEN_VALUES + GOLDEN_INDEX)


def golden_trained():
    model = Golden()
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor(GOLDEN_LATENT))
        model.fc.bias.copy_(torch.tensor([0.25, -1.0]))
        model.steps.fill_(7)
    lightning_step.apply_nm_masks(model, lightning_step.NMPattern(2, 4))
    return model


@pytest.fixture
def golden():
    return SimpleNamespace(
        plain=Golden,
        trained=golden_trained,
        dense=GOLDEN_DENSE,
        manifest=GOLDEN_MANIFEST.replace("0.1.0", lightning_step.__version__),
        header=GOLDEN_HEADER,
        values=GOLDEN_VALUES,
        index=GOLDEN_INDEX,
        data=GOLDEN_DATA,
    )


@pytest.fixture
def known(tmp_path):
    """Whether the safetensors that is installed has a dtype: its oldest that we take lack some that torch has since."""

    def ask(dtype):
        try:
            save_file({"x": torch.zeros(8 * dtype.itemsize, dtype=torch.uint8).view(dtype)}, tmp_path / "known")
            load_file(tmp_path / "known")
        except (KeyError, AttributeError, SafetensorError):
            return False
        return True

    return ask
