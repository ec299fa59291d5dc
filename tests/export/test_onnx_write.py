"""Models that one ONNX file cannot hold: the limit is lowered, the bytes are looked at, a runtime reads both files."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from lightning_step import NMPattern, apply_nm_masks
from lightning_step.cli import main
from lightning_step.errors import ConfigurationError, ExportError, FileFormatError, ViolationError
from lightning_step.export import check_onnx, export_onnx, onnx_write
from lightning_step.export.onnx_write import write_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LIMIT = 8000  # bytes; the weights take 12,000 and the graph less than half of the limit
X = torch.linspace(-1, 1, 2 * 32).reshape(2, 32)


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16), nn.Linear(16, 4)).eval()
    apply_nm_masks(model, NMPattern(2, 4))
    return model


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Both networks as one file each."""
    folder = tmp_path_factory.mktemp("one")
    return [export_onnx(net(seed), (X,), folder / f"{seed}.onnx") for seed in (0, 1)]


@pytest.fixture
def write(one, tmp_path):
    """Writes a network again under a limit, and gives the path of the model and of its data."""

    def write(seed=0, limit=LIMIT):
        path = tmp_path / "net.onnx"
        return path, write_onnx(path, onnx.load(one[seed].path), limit)

    return write


def outputs(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_weights_lie_beside_the_model_and_both_are_read(tmp_path):
    done = export_onnx(net(), (X,), tmp_path / "net.onnx", max_file_bytes=LIMIT)
    assert re.fullmatch(r"net\.onnx\.[0-9a-f]{16}\.data", done.data.name)
    assert names(tmp_path) == sorted([done.path.name, done.data.name])
    assert done.path.stat().st_size <= LIMIT
    assert done.bytes == done.path.stat().st_size + done.data.stat().st_size
    with torch.no_grad():
        np.testing.assert_allclose(outputs(done.path), net()(X).numpy(), rtol=1e-5, atol=1e-6)
    assert [weight.holds for weight in check_onnx(done.path, strict=True)] == [True] * 3
    assert len(done.nodes) == 3
    assert main(["verify", str(done.path)]) == 0


def test_the_bytes_are_those_of_the_tensors_each_on_a_page(one, write):
    path, beside = write()
    assert one[0].data is None
    whole = {tensor.name: tensor.raw_data for tensor in onnx.load(one[0].path).graph.initializer}
    stored = onnx.load(path, load_external_data=False).graph.initializer
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in stored if t.external_data}
    assert places.keys() == {name for name, raw in whole.items() if len(raw) >= 1024}
    data = beside.read_bytes()
    for name, place in places.items():
        offset, length = int(place["offset"]), int(place["length"])
        assert place["location"] == beside.name
        assert offset % 4096 == 0
        assert data[offset : offset + length] == whole[name]


def test_what_fits_stays_in_one_file_and_takes_the_place_of_two(write, tmp_path):
    _, beside = write()
    (tmp_path / "other.onnx.0123456789abcdef.data").write_bytes(b"of another model")
    assert write(limit=10**6)[1] is None
    assert not beside.exists()
    assert names(tmp_path) == ["net.onnx", "other.onnx.0123456789abcdef.data"]


def test_other_weights_get_another_file_and_the_old_one_goes(write, tmp_path):
    (_, first), (_, same) = write(), write()
    assert first == same
    path, second = write(seed=1)
    assert second != first
    assert names(tmp_path) == sorted([path.name, second.name])
    with torch.no_grad():
        np.testing.assert_allclose(outputs(path), net(1)(X).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails_at", [0, 1], ids=["data", "model"])
def test_a_failure_midway_leaves_the_old_pair_whole(fails_at, write, tmp_path, monkeypatch):
    old, _ = write()
    before, calls, real = {path: path.read_bytes() for path in tmp_path.iterdir()}, [], onnx_write.atomic_write

    @contextmanager
    def full(path):
        calls.append(path)
        with real(path) as temporary:
            yield temporary
            if len(calls) > fails_at:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_write, "atomic_write", full)
    with pytest.raises(ExportError, match=r"Expected to write .* bytes to .*net\.onnx.* No space left on device"):
        write(seed=1)
    assert len(calls) == fails_at + 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert check_onnx(old)


def test_a_graph_that_is_too_large_without_weights_is_refused(write, tmp_path):
    with pytest.raises(ConfigurationError, match="Expected a graph of at most 100 bytes"):
        write(limit=100)
    assert names(tmp_path) == []


def test_a_model_without_its_data_and_a_planted_violation_are_told(write):
    path, data = write()
    data.write_bytes(b"\x3f" * data.stat().st_size)  # 0.747 everywhere
    with pytest.raises(ViolationError, match="to hold 2:4 along axis"):
        check_onnx(path)
    data.unlink()
    with pytest.raises(FileFormatError, match=r"Expected a whole ONNX file, but got .*net\.onnx"):
        check_onnx(path)
