"""Digests: what they cover, that a file that was changed is refused, and that a reader may be told not to look."""

import hashlib
import json

import pytest
import torch
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, export_model, load_sparse
from lightning_step.errors import FileFormatError, ViolationError
from lightning_step.export import convert_file, describe_file, digests, read_manifest, verify_file
from lightning_step.export.container import Slot
from lightning_step.export.manifest import Manifest, SparseTensor


@pytest.fixture(params=["dense", "packed"])
def file(request, golden, tmp_path):
    return export_model(golden.trained(), tmp_path / "file", request.param).path


def by_specification(header, data, manifest):
    """The digests as docs/packed-format.md says, from the bytes of the file alone."""
    found = {}
    for stored, entry in header.items():
        name = stored
        for end in (".nm_values", ".nm_index"):
            if manifest["format"] == "packed" and stored.endswith(end) and stored[: -len(end)] in manifest["sparse"]:
                name = stored[: -len(end)]
        sparse = manifest["sparse"].get(name)
        pattern = sparse and [sparse["n"], sparse["m"], sparse["dim"], sparse["shape"]]
        aliases = sorted(alias for alias, target in manifest["aliases"].items() if target == name)
        line = json.dumps(
            [stored, entry["dtype"], entry["shape"], pattern, aliases], separators=(",", ":"), ensure_ascii=False
        )
        begin, end = entry["data_offsets"]
        found[stored] = hashlib.sha256(line.encode() + b"\n" + data[begin:end]).hexdigest()
    return found


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_every_tensor_has_the_digest_of_the_specification(format, zoo, tmp_path, by_hand):
    model = zoo.trained()
    model.register_buffer('é\n"\\', torch.tensor([1.5], dtype=torch.float64))
    exported = export_model(model, tmp_path / "file", format)
    header, data = by_hand.take_apart(exported.path)
    manifest = json.loads(header.pop("__metadata__")["lightning_step"])
    assert manifest["sha256"] == by_specification(header, data, manifest)
    assert exported.manifest == read_manifest(exported.path)


def test_the_first_byte_the_last_byte_and_any_bit_between_count(file, golden, by_hand):
    header, data = by_hand.take_apart(file)
    for at in (0, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        by_hand.put_together(file, header, bytes(damaged))
        for read in (load_sparse, lambda path: load_sparse(path, golden.plain()), describe_file):
            with pytest.raises(FileFormatError, match=r"SHA-256 that its manifest says, [0-9a-f]{64}, but got|to unpack"):
                read(file)
        with pytest.raises((FileFormatError, ViolationError), match=r"SHA-256|to unpack|to hold 2:4 along dim 1"):
            verify_file(file)  # tells the first bad group, if there is one


@pytest.mark.parametrize(
    "change",
    [
        lambda header, manifest: header["fc.bias"].update(dtype="I32"),
        lambda header, manifest: header["fc.bias"].update(shape=[1, 2]),
        lambda header, manifest: header.update(other=header.pop("fc.bias")),
        lambda header, manifest: manifest["aliases"].update({"more": "fc.bias"}),
        lambda header, manifest: manifest["aliases"].update({"again.bias": manifest["aliases"].pop("again.weight")}),
        lambda header, manifest: manifest["sparse"]["fc.weight"].update(shape=[4, 4], dim=1),
        lambda header, manifest: manifest["sparse"].clear(),
        lambda header, manifest: manifest["sha256"].pop("steps"),
        lambda header, manifest: manifest["sha256"].update(more="0" * 64),
        lambda header, manifest: manifest["sha256"].update(steps="0" * 64),
    ],
)
def test_what_is_said_of_a_tensor_counts_as_well(change, file, by_hand):
    header, data = by_hand.take_apart(file)
    manifest = json.loads(header["__metadata__"]["lightning_step"])
    change(header, manifest)
    header["__metadata__"]["lightning_step"] = json.dumps(manifest)
    by_hand.put_together(file, header, data)
    with pytest.raises(FileFormatError, match=r"SHA-256|digest for every tensor|in the shape that its manifest"):
        load_sparse(file)


def test_a_refused_file_leaves_the_model_as_it_was(file, golden, by_hand):
    header, data = by_hand.take_apart(file)
    by_hand.put_together(file, header, bytes([data[0] ^ 1]) + data[1:])
    model = golden.plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileFormatError, match="SHA-256"):
        load_sparse(file, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_without_digests_and_a_reader_that_does_not_look_take_what_is_there(file, by_hand):
    header, data = by_hand.take_apart(file)
    by_hand.put_together(file, header, bytes([data[0] ^ 1]) + data[1:])
    assert load_sparse(file, check_digests=False)["steps"].item() == 7 ^ 1
    by_hand.edit_manifest(file, lambda manifest: manifest.pop("sha256"))
    assert load_sparse(file)["steps"].item() == 7 ^ 1


def test_conversion_takes_new_digests(file, golden, tmp_path, by_hand):
    for format in ("dense", "packed", "dense"):
        file = convert_file(file, tmp_path / f"{format}-too", format).path
        header, data = by_hand.take_apart(file)
        manifest = json.loads(header.pop("__metadata__")["lightning_step"])
        assert manifest["sha256"] == by_specification(header, data, manifest)
    assert load_sparse(file)["fc.weight"].tolist() == golden.dense


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_large_files_are_compared_at_the_side_and_refused_all_the_same(format, tmp_path, by_hand):
    model = nn.Linear(1024, 2048)
    apply_nm_masks(model, NMPattern(2, 4))
    path = export_model(model, tmp_path / "file", format).path
    header, data = by_hand.take_apart(path)
    assert len(data) > digests._WORTH_A_THREAD
    assert torch.equal(load_sparse(path)["weight"], model.weight)
    index = header.get("weight.nm_index", header["weight"] if format == "dense" else None)["data_offsets"]
    damage = {"a value": (header["bias"]["data_offsets"][0], 1), "an index": (index[0], 255)}
    for at, bits in damage.values():
        damaged = bytearray(data)
        damaged[at] ^= bits
        by_hand.put_together(path, header, bytes(damaged))
        with pytest.raises(FileFormatError, match=r"SHA-256|to unpack"):
            load_sparse(path)


def test_a_tensor_that_is_called_like_a_part_is_not_taken_for_one():
    slots = {"a.nm_values": Slot(torch.float32, (1,)), "b.nm_values": Slot(torch.float32, (1, 2))}
    manifest = Manifest("packed", {"b": SparseTensor(2, 4, 0, (4,))}, {"c": "a.nm_values"})
    assert digests.openings(slots, manifest) == {
        "a.nm_values": b'["a.nm_values","F32",[1],null,["c"]]\n',
        "b.nm_values": b'["b.nm_values","F32",[1,2],[2,4,0,[4]],[]]\n',
    }
