"""Back from a file: bit for bit, or refused with the model left as it was."""

import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_step import NMPattern, apply_nm_masks, export_model, load_sparse
from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.export import read_manifest
from lightning_step.parametrization import nm_masks

PATTERNS = [(2, 4), (1, 4), (1, 8), (3, 8), (1, 16), (1, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["dense", "packed"]


def layer(masked=False):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
    if masked:
        apply_nm_masks(model, NMPattern(2, 4))
    return model


@pytest.fixture(params=FORMATS)
def file(request, tmp_path):
    return export_model(layer(masked=True), tmp_path / "file", request.param).path


def refusals(path):
    """What every way to read a file says to it; anything but our own error goes through and fails the test."""
    model = layer()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    texts = []
    for read in (load_sparse, lambda p: load_sparse(p, model), read_manifest):
        with pytest.raises(FileFormatError) as caught:
            read(path)
        texts.append(str(caught.value))
    assert all(str(path) in text for text in texts)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    return texts


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_file_comes_back_bit_for_bit(n, m, dtype, format, zoo, tmp_path):
    model = zoo.trained(n, m, dtype)
    path = export_model(model, tmp_path / "file", format).path
    expected = zoo.bits_of(zoo.masked(model, n, m))
    assert zoo.bits_of(load_sparse(path)) == expected
    plain = zoo.plain().to(dtype)
    assert load_sparse(path, plain) is plain
    assert zoo.bits_of(plain.state_dict()) == expected
    assert plain.tied.weight is plain.linear.weight


@pytest.mark.parametrize("format", FORMATS)
def test_loading_into_a_model_with_masks_keeps_them(format, zoo, tmp_path):
    path = export_model(zoo.trained(), tmp_path / "file", format).path
    model = load_sparse(path, zoo.trained(enabled=False))
    assert zoo.bits_of(model.state_dict()) == zoo.bits_of(load_sparse(path))
    assert len(nm_masks(model)) == 9
    assert not any(mask.enabled for mask in nm_masks(model).values())
    assert torch.equal(model.linear.weight, zoo.trained().linear.weight), "the mask of a masked weight is itself"


def test_a_file_written_by_version_one_is_read_for_ever(golden, tmp_path, by_hand):
    path = by_hand.put_together(tmp_path / "file", golden.header, golden.data)
    model = load_sparse(path, golden.plain())
    assert model.fc.weight.tolist() == golden.dense
    assert model.again.weight is model.fc.weight
    assert (model.fc.bias.tolist(), int(model.steps)) == ([0.25, -1.0], 7)
    assert sorted(load_sparse(path)) == ["again.weight", "fc.bias", "fc.weight", "steps"]
    manifest = read_manifest(path)
    assert (manifest.format, manifest.aliases, manifest.info) == (
        "packed",
        {"again.weight": "fc.weight"},
        {"recipe": "STEP"},
    )


def test_the_order_of_the_header_means_nothing(golden, tmp_path, by_hand):
    header = dict(reversed(golden.header.items()))
    path = by_hand.put_together(tmp_path / "file", header, golden.data)
    assert load_sparse(path)["again.weight"].tolist() == golden.dense


def test_a_tied_tensor_is_stored_once_and_restored_under_every_name(zoo, tmp_path, by_hand):
    for format, stored in (("dense", "linear.weight"), ("packed", "linear.weight.nm_values")):
        path = export_model(zoo.trained(), tmp_path / format, format).path
        names = by_hand.take_apart(path)[0]
        assert stored in names
        assert not any(name.startswith("tied.") for name in names)
        tensors = load_sparse(path)
        assert torch.equal(tensors["tied.weight"], tensors["linear.weight"])
        assert read_manifest(path).aliases == {"tied.weight": "linear.weight"}


def test_extra_state_that_is_no_tensor_is_left_to_the_module(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            raise AssertionError("nothing to set")

    model = Counting(8, 4)
    apply_nm_masks(model, NMPattern(2, 4))
    path = export_model(model, tmp_path / "file").path
    assert sorted(load_sparse(path)) == ["bias", "weight"]
    assert torch.equal(load_sparse(path, Counting(8, 4)).weight, model.weight)


def test_every_cut_of_a_file_is_refused(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut"
    for length in [*range(0, len(whole), 23), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        assert all("truncated or damaged" in text and str(cut) in text for text in refusals(cut)), length


def test_random_bytes_are_refused(tmp_path):
    source, path = random.Random(0), tmp_path / "noise"
    for _ in range(100):
        path.write_bytes(source.randbytes(source.randrange(300)))
        refusals(path)


def test_a_damaged_header_is_refused_or_read_but_never_another_error(file, tmp_path):
    source, path, whole, texts = random.Random(0), tmp_path / "damaged", file.read_bytes(), []
    for _ in range(200):
        raw = bytearray(whole)
        raw[source.randrange(500)] = source.randrange(32, 127)
        path.write_bytes(raw)
        try:
            load_sparse(path, layer())
        except FileFormatError as error:
            texts.append(str(error))
    assert len(texts) > 50
    assert all(str(path) in text for text in texts)


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "No such file"), ("", "Is a directory"), ("file/below", "Not a directory")]
)
def test_what_cannot_be_opened_is_named(name, reason, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert all(
        f"Expected a readable file at `path`, but got '{tmp_path / name}': {reason}" in t for t in refusals(tmp_path / name)
    )


def test_a_file_of_somebody_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(4, 16)}, tmp_path / "file", {"format": "pt"})
    save_file({"weight": torch.zeros(4, 16)}, tmp_path / "bare")
    for name in ("file", "bare"):
        texts = refusals(tmp_path / name)
        assert all("whose header holds no manifest. Read other safetensors files with safetensors.torch" in t for t in texts)


def test_a_newer_file_is_refused(file, by_hand):
    by_hand.edit_manifest(file, lambda manifest: manifest.update(version=2))
    assert all("but got version 2. Update lightning-step" in text for text in refusals(file))


def test_a_file_of_another_model_lists_every_name_and_changes_nothing(file):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(8, 4))
            self.add_module("1", nn.BatchNorm1d(4, affine=False))
            self.extra = nn.Linear(2, 3)

    model = Other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileFormatError) as caught:
        load_sparse(file, model)
    assert str(caught.value) == (
        f"Expected '{file}' to hold the tensors of Other, but got a file of another model. "
        "missing: extra.bias, extra.weight; "
        "unexpected: 1.bias, 1.weight; mis-shaped: 0.weight (4, 16) in the file, (4, 8) in the model."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["sparse"].update({"1.weight": {"n": 2, "m": 4, "dim": 0, "shape": [8]}}),
        lambda m: m["sparse"]["0.weight"].update(shape=[4, 20]),
        lambda m: m["sparse"]["0.weight"].update(shape=[10**30, 16]),
        lambda m: m["sparse"].update({"gone.weight": {"n": 2, "m": 4, "dim": 0, "shape": [4]}}),
        lambda m: m["aliases"].update({"0.again": "gone.weight"}),
    ],
    ids=["not packed", "another shape", "absurd shape", "missing tensor", "missing alias"],
)
def test_a_manifest_of_another_file_is_refused(change, file, by_hand):
    by_hand.edit_manifest(file, change)
    with pytest.raises(FileFormatError, match=r"manifest"):
        load_sparse(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["sparse"]["0.weight"].update(n=1), "to unpack, but got: Expected values of shape"),
        (lambda m: m["sparse"]["0.weight"].update(m=8), "to unpack, but got: Expected values of shape"),
        (lambda m: m.update(format="dense"), "'0.weight' in .* in the shape that its manifest says"),
    ],
)
def test_a_packed_file_that_says_something_else_is_refused(change, message, tmp_path, by_hand):
    path = export_model(layer(masked=True), tmp_path / "file", "packed").path
    by_hand.edit_manifest(path, change)
    with pytest.raises(FileFormatError, match=message):
        load_sparse(path)


def test_an_index_that_names_no_mask_is_refused(golden, tmp_path, by_hand):
    damaged = golden.data[:-2] + b"\xff\xff"
    path = by_hand.put_together(tmp_path / "file", golden.header, damaged)
    with pytest.raises(
        FileFormatError, match=r"'fc\.weight' in '.*' to unpack, but got: Expected mask ranks below 6 for 2:4"
    ):
        load_sparse(path)


def test_the_dtype_of_the_file_is_kept_and_a_model_keeps_its_own(tmp_path):
    model = layer(masked=True).to(torch.bfloat16)
    path = export_model(model, tmp_path / "file", "packed").path
    assert {load_sparse(path)[name].dtype for name in ("0.weight", "0.bias")} == {torch.bfloat16}
    loaded = load_sparse(path, layer())
    assert loaded[0].weight.dtype == torch.float32
    assert torch.equal(loaded[0].weight.bfloat16(), model[0].weight)


def test_tensors_and_models_go_to_the_device(file):
    assert {tensor.device.type for tensor in load_sparse(file, device="cpu").values()} == {"cpu"}
    model = load_sparse(file, layer(), device=torch.device("cpu"))
    assert torch.equal(model[0].weight, load_sparse(file)["0.weight"])


@pytest.mark.parametrize("device", ["cuda:97", "nowhere", "meta", 1.5])
def test_a_device_that_is_not_there_is_told_before_the_file_is_read(device, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^Expected `device` to "):
        load_sparse(tmp_path / "missing", device=device)


def test_a_backend_that_cannot_be_is_refused(file):
    with pytest.raises(ConfigurationError, match=r"one of \['auto', 'dense', 'semi_structured'\], but got 'sparse'"):
        load_sparse(file, layer(), backend="sparse")
    with pytest.raises(ConfigurationError, match="`backend='semi_structured'`, but got no model"):
        load_sparse(file, backend="semi_structured")
    with pytest.raises(ConfigurationError, match="but got one with masks"):
        load_sparse(file, layer(masked=True), backend="semi_structured")


def test_on_a_cpu_every_backend_gives_the_dense_model_and_one_says_why(file):
    expected = load_sparse(file)["0.weight"]
    for backend in ("auto", "dense"):
        assert torch.equal(load_sparse(file, layer().eval(), backend=backend)[0].weight, expected)
    with pytest.warns(UserWarning, match="got none that can be: it is not on a CUDA device"):
        assert torch.equal(load_sparse(file, layer(), backend="semi_structured")[0].weight, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_auto_packs_only_what_no_longer_trains_and_fits(format, tmp_path, monkeypatch):
    """As if CUTLASS were there: torch packs on a CPU too, once nobody asks for the device."""
    packed_class = torch.sparse.SparseSemiStructuredTensorCUTLASS
    for module in ("load", "semi_structured"):
        monkeypatch.setattr(f"lightning_step.export.{module}.active_backend", lambda device: ("cutlass", ""))
    monkeypatch.setattr(packed_class, "_validate_device_dim_dtype_shape", lambda weight: None)

    def plain(dtype=torch.bfloat16, size=64, layer=nn.Linear):
        return nn.Sequential(layer(size, 64)).to(dtype).eval()

    def file(pattern, **settings):
        model = plain(**settings)
        apply_nm_masks(model, pattern)
        return export_model(model, tmp_path / "file", format).path

    def packed(path, model, **settings):
        return isinstance(load_sparse(path, model, **settings)[0].weight, packed_class)

    path = file(NMPattern(2, 4))
    assert packed(path, plain())
    assert packed(path, plain().train(), backend="semi_structured")
    assert not packed(path, plain().train())
    assert not packed(path, plain(), backend="dense")
    assert not packed(path, plain(torch.float32))
    assert not packed(file(NMPattern(1, 8)), plain())
    assert packed(file(NMPattern(2, 4), layer=Conv1D), plain(layer=Conv1D))
    assert not packed(file(NMPattern(2, 4), size=32), plain(size=32))


def test_a_dense_file_is_mapped_not_read(tmp_path):
    model = nn.Linear(1024, 1024)
    apply_nm_masks(model, NMPattern(2, 4))
    path = export_model(model, tmp_path / "file").path
    tensor = load_sparse(path)["weight"]
    before = float(tensor[0, 1023])
    raw = bytearray(path.read_bytes())
    place = raw.index(tensor[0].numpy().tobytes()) + 1023 * 4
    with path.open("rb+") as opened:  # in place: a mapped tensor sees it
        opened.seek(place)
        opened.write(b"\x00\x00\x80\x3f" if before != 1.0 else b"\x00\x00\x00\x40")
    assert float(tensor[0, 1023]) != before
