"""Files from a stranger: read right, or refused with an error of ours; nothing else is opened, run or allocated.

``LIGHTNING_STEP_FUZZ=20000 pytest tests/faults/test_fuzz.py`` mutates so many files instead of a thousand; a failure names
the seed of its file.
"""

import copy
import json
import math
import os
import random
import re
import resource
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, export_model, load_sparse
from lightning_step.errors import FileFormatError
from lightning_step.export import Manifest, read_manifest

FILES = int(os.environ.get("LIGHTNING_STEP_FUZZ", "1000"))
CHUNKS = 10
SECONDS, SPARE_MEMORY = 5.0, 512 * 2**20  # of one call, whatever the file says; all files here are below 10 KB
GROWTH = 1024  # of a packed file, see docs/packed-format.md
WIDTHS = {"U8": 1, "I8": 1, "BOOL": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8, "C64": 8}

ABSURD = [
    *(-1, 0, 1, 2, 3, 4, 7, 8, 64, 65_536, 65_537, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30),
    *(-(2**31), -(2**63), 10**4000, 1.0, 0.5, -0.0, 1e308, math.nan, math.inf, True, False, None),
    *("", "2:4", "F32", "F4", "I64", "dense", "packed", "fc.weight", "__metadata__", "\0", "\ud800", "é" * 50, "x" * 3000),
    *("../../../etc/passwd", "/dev/zero", "..\\con", "file:///etc/passwd", "__import__('os').abort()", "%s%n{0.__class__}"),
    *([], {}, [[]], [0], [2, 8], [8, 2], [-2, 8], [2**40, 2**40], [0, 2**63], [2**62, 4], [1] * 70, [1] * 5000, {"n": 2}),
]
PATTERNS = [(2, 4), (1, 4), (3, 8), (4, 4), (1, 16), (50, 100), (33, 66), (1, 2), (1, 4096), (2, 2048), (4096, 4096)]


class Tied(nn.Module):
    def __init__(self, m=4):
        super().__init__()
        self.fc = nn.Linear(2 * m, 2)
        self.again = nn.Linear(2 * m, 2, bias=False)
        self.again.weight = self.fc.weight
        self.conv = nn.Conv1d(m, 2, 3)
        self.norm = nn.BatchNorm1d(2)


def take_apart(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_together(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Good files, each with a maker of the model it fits."""
    found = []
    for (n, m), format in [((2, 4), "dense"), ((2, 4), "packed"), ((3, 8), "packed"), ((36, 66), "packed")]:
        torch.manual_seed(m)
        model = Tied(m)
        apply_nm_masks(model, NMPattern(n, m))
        path = tmp_path_factory.mktemp("base") / "file"
        export_model(model, path, format, info={"recipe": {"type": "STEP"}, "steps": [1, 2]})
        found.append((path.read_bytes(), m, described(load_sparse(path))))
    return found


class Watch:
    """What Python does while a file is read. An audit hook stays for good, so there is one and it can be switched off."""

    HARMLESS = frozenset({"object.__getattr__", "sys._getframe", "code.__new__"})

    def __init__(self):
        self.on, self.events = False, []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.on and event not in self.HARMLESS:
            self.events.append((event, str(arguments[:1])))


WATCH = Watch()


@contextmanager
def guarded(path):
    """No code, no other file, no absurd allocation, no endless loop."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, hard))
    start, WATCH.events, WATCH.on = time.perf_counter(), [], True
    try:
        yield
    finally:
        WATCH.on = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.perf_counter() - start < SECONDS
    others = [(event, what) for event, what in WATCH.events if event != "open" or str(path) not in what]
    assert not others, others


def described(tensors):
    """All that there is to a tensor."""
    return {
        name: (tensor.dtype, tensor.shape, bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
        for name, tensor in tensors.items()
    }


def check_tensors(path, tensors, written):
    """What was written, where digests tell; else, what lies at its offsets, and nothing larger than the file can make it."""
    raw = path.read_bytes()
    header, data = take_apart(raw)
    manifest = read_manifest(path)
    packed = set(manifest.sparse) if manifest.format == "packed" else set()
    packed.add("__metadata__")  # no tensor of the header, though a manifest may give that name to one
    if manifest.sha256:  # then nothing else may pass than what was written
        assert described(tensors) == written
    whole = {name: entry for name, entry in header.items() if name in tensors and name not in packed}
    for name, entry in whole.items():
        begin, end = entry["data_offsets"]
        assert 0 <= begin <= end <= len(data), name
        assert bytes(tensors[name].contiguous().view(-1).view(torch.uint8).tolist()) == data[begin:end], name
    assert sum(tensors[name].nbytes for name in manifest.sparse) <= GROWTH * len(raw)


def attempt(read, *arguments):
    """What came back, or the text of our error; any other error goes through and fails the test."""
    try:
        return read(*arguments)
    except FileFormatError as error:
        return str(error)


def read_every_way(path, m, written):
    """Returns how many ways to read took the file."""
    model = Tied(m)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with guarded(path):
        results = [attempt(read_manifest, path), attempt(load_sparse, path), attempt(load_sparse, path, model)]
    refusals = [result for result in results if isinstance(result, str)]
    assert all(str(path) in text for text in refusals), refusals
    taken = len(results) - len(refusals)
    if isinstance(results[1], dict):
        check_tensors(path, results[1], written)
    if taken < 3:
        after = model.state_dict().values()
        assert all(a.equal(b) for a, b in zip(after, before, strict=True)), "a refused file has changed the model"
    return taken


def damage_bytes(source, raw):
    raw = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        at = source.choice([source.randrange(8), source.randrange(len(raw)), source.randrange(min(len(raw), 900))])
        how = source.randrange(5)
        if how == 0:
            raw[at] ^= 1 << source.randrange(8)
        elif how == 1:
            raw[at] = source.randrange(256)
        elif how == 2:
            del raw[at : at + source.randrange(1, 40)]
        elif how == 3:
            raw[at:at] = source.randbytes(source.randrange(1, 40))
        else:
            raw[at:at] = raw[source.randrange(len(raw)) :][: source.randrange(1, 80)]
        if len(raw) < 9:
            break
    return bytes(raw)


def places(value, path=()):
    """Every place in nested JSON."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def damage_json(source, value):
    """Replaces, removes, renames or adds something somewhere."""
    value = copy.deepcopy(value)
    for _ in range(source.randint(1, 3)):
        *way, last = source.choice([path for path in places(value) if path] or [("x",)])
        holder = value
        for key in way:
            holder = holder[key]
        how = source.randrange(6)
        if how == 0:
            del holder[last]
        elif how == 1 and isinstance(holder, dict):
            holder[str(source.choice(ABSURD))] = holder.pop(last)
        elif how == 2 and isinstance(holder, dict):
            holder[str(source.choice(ABSURD))] = copy.deepcopy(holder[last])
        elif how == 3 and isinstance(holder[last], int):
            holder[last] += source.choice([-8, -4, -1, 1, 4, 8, 2**32])
        else:
            holder[last] = copy.deepcopy(source.choice(ABSURD))
        if not value:
            break
    return value


def damage_header(source, raw):
    header, data = take_apart(raw)
    return put_together(damage_json(source, header), data)


def damage_manifest(source, raw):
    header, data = take_apart(raw)
    manifest = damage_json(source, json.loads(header["__metadata__"]["lightning_step"]))
    header["__metadata__"]["lightning_step"] = json.dumps(manifest)
    return put_together(header, data)


def repeat_a_key(source, raw):
    """Two values under one key, in the header or in the manifest, which only text can say."""
    header, data = take_apart(raw)
    text = json.dumps(header).encode()
    name = source.choice([b'"fc.bias": ', b'"__metadata__": ', b'\\"version\\": ', b'\\"sparse\\": ', b'\\"shape\\": '])
    quote = b"\\" if b"\\" in name else b""
    extra = source.choice([b"1", b"[2, 4]", b"{}", b"[" * source.choice([5, 200, 50_000]), quote + b'"x' + quote + b'"'])
    return put_together(text.replace(name, name + extra + b", " + name, 1), data)


def invent(source, raw):
    """A file whose parts agree in size, so that its content is looked at: any pattern, shape, type and index."""
    n, m = source.choice(PATTERNS)
    shape = [source.choice([0, 1, 2, 3]) for _ in range(source.randint(1, 4))]
    dim = source.randrange(len(shape))
    shape[dim] = m * source.choice([0, 1, 1, 2])
    groups = math.prod(shape) // m
    bits = (math.comb(m, n) - 1).bit_length()
    index = -(-groups * (bits if bits <= 62 else m) // 8)
    dtype = source.choice(list(WIDTHS))
    size = groups * n * WIDTHS[dtype]
    tensors = {
        "fc.weight.nm_values": {"dtype": dtype, "shape": [groups, n], "data_offsets": [0, size]},
        "fc.weight.nm_index": {"dtype": "U8", "shape": [index], "data_offsets": [size, size + index]},
    }
    manifest = {"version": 1, "format": "packed", "aliases": {}, "info": {}}
    manifest["sparse"] = {"fc.weight": {"n": n, "m": m, "dim": dim, "shape": shape}}
    if source.random() < 0.3:
        manifest["sparse"] = damage_json(source, manifest["sparse"])
    data = bytes(size) + source.choice([source.randbytes(index), bytes(index), b"\xff" * index])
    return put_together({"__metadata__": {"lightning_step": json.dumps(manifest)}, **tensors}, data)


DAMAGES = [damage_bytes, damage_header, damage_manifest, repeat_a_key, invent]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited with what Linux tells")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_mutated_file_is_refused_by_us_or_read_within_its_bounds(chunk, bases, tmp_path):
    taken = []
    for i in range(chunk, FILES, CHUNKS):
        source = random.Random(i)
        raw, m, written = source.choice(bases)
        path = tmp_path / "file"
        path.write_bytes(source.choice(DAMAGES)(source, raw))
        try:
            taken.append(read_every_way(path, m, written))
        except BaseException as error:
            raise AssertionError(f"seed {i}: {type(error).__name__}: {str(error)[:500]}") from error
    assert {0, 2} <= set(taken), "the damage is too coarse or too fine to test anything"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited with what Linux tells")
def test_the_guards_catch_what_they_are_there_for(tmp_path):
    with pytest.raises(AssertionError, match="open"), guarded(tmp_path / "file"):
        Path(os.devnull).read_bytes()
    with pytest.raises(AssertionError, match="exec"), guarded(tmp_path / "file"):
        exec("pass")
    with pytest.raises(RuntimeError, match="allocate"), guarded(tmp_path / "file"):
        torch.zeros(2 * SPARE_MEMORY, dtype=torch.uint8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(ABSURD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries({"n": JSON, "m": JSON, "dim": JSON, "shape": st.lists(JSON, max_size=3) | JSON})
GOOD = st.just({"n": 2, "m": 4, "dim": 1, "shape": [2, 8]})
MANIFESTS = st.fixed_dictionaries(
    {
        "version": st.just(1) | JSON,
        "format": st.sampled_from(["dense", "packed"]) | JSON,
        "sparse": st.dictionaries(st.text(max_size=5), GOOD | FIELDS | JSON, max_size=3) | JSON,
        "aliases": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3) | JSON,
        "info": st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON,
        "sha256": st.just({}) | st.dictionaries(st.text(max_size=3), st.just("0f" * 32) | JSON, max_size=2) | JSON,
    }
)


@given(MANIFESTS | JSON)
@settings(max_examples=max(200, FILES // 5), deadline=None, suppress_health_check=list(HealthCheck))
def test_a_manifest_of_any_json_is_refused_by_us_or_means_what_it_says(body):
    manifest = attempt(Manifest.from_json, json.dumps(body))
    if isinstance(manifest, str):
        assert len(manifest) < 6000
        return
    assert (body["version"], manifest.format) == (1, body["format"])
    for name, entry in manifest.sparse.items():
        assert {key: body["sparse"][name][key] for key in ("n", "m", "dim")} == {
            "n": entry.n,
            "m": entry.m,
            "dim": entry.dim,
        }
        assert list(entry.shape) == body["sparse"][name]["shape"]
        assert 1 <= entry.n <= entry.m
        assert entry.shape[entry.dim] % entry.m == 0
        assert math.prod(max(size, 1) for size in entry.shape) < 2**63
    assert manifest.sha256 == body["sha256"]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in manifest.sha256.values())
    assert not set(manifest.aliases) & set(manifest.aliases.values())
    assert Manifest.from_json(manifest.to_json()) == manifest or "nan" in str(manifest).lower()
