"""Layers on sparse tensor cores give what the dense ones give, and a table says how fast. `make gpu` runs and prints it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_step import NMPattern, apply_nm_masks, export_model, load_sparse, strip
from lightning_step.export import to_semi_structured
from lightning_step.export.semi_structured import active_backend, why_not_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [
    (16, 16),
    (32, 64),
    (48, 80),
    (64, 128),
    (96, 32),
    (128, 1024),
    (768, 768),
    (3072, 768),
    (1024, 4096),
    (24, 64),
    (64, 60),
]
BATCHES = [(1,), (7,), (16,), (2, 5), (3, 128)]
GRID = [(768, 768), (3072, 768), (768, 3072), (4096, 4096), (11008, 4096), (8192, 8192)]
TOKENS = [16, 512, 4096]


def two_four(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows + columns)
    layer = nn.Linear(columns, rows, bias=bias).to("cuda", dtype)
    apply_nm_masks(layer, NMPattern(2, 4))
    strip(layer)
    return layer.eval()


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within the rounding of the sums of one row, which the two kernels take in another order."""
    tolerance = 4 * torch.finfo(ours.dtype).eps * float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) <= tolerance


@pytest.fixture(autouse=True)
def backend() -> str:
    found, reason = active_backend(torch.device("cuda"))
    if found is None:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@torch.no_grad()
def test_outputs_equal_those_of_the_dense_layer(
    rows: int, columns: int, dtype: torch.dtype, bias: bool, backend: str
) -> None:
    dense = two_four(rows, columns, dtype, bias)
    packed = copy.deepcopy(dense)
    expected = why_not_packed((rows, columns), dtype, "cutlass" if backend == "cutlass" else "cusparselt")
    if expected:
        with pytest.warns(UserWarning, match="but got none that can be"):
            result = to_semi_structured(packed)
    else:
        result = to_semi_structured(packed)
    assert [layer.reason for layer in result.layers] == [expected]
    for batch in BATCHES:
        x = torch.randn(*batch, columns, device="cuda", dtype=dtype)
        assert close(packed(x), dense(x)), batch


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_algorithm_that_was_searched_for_gives_the_same(dtype: torch.dtype, bias: bool, backend: str) -> None:
    dense = two_four(768, 3072, dtype, bias)
    packed = copy.deepcopy(dense)
    [layer] = to_semi_structured(packed, search=100).layers
    assert layer.packed
    assert (layer.algorithm is not None) == (backend == "cusparselt")
    for tokens in (100, 1, 4096):
        x = torch.randn(tokens, 3072, device="cuda", dtype=dtype)
        assert close(packed(x), dense(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_hugging_face_conv1d_is_packed(dtype: torch.dtype) -> None:
    from transformers.pytorch_utils import Conv1D

    dense = Conv1D(256, 128).to("cuda", dtype)  # (in, out) = (128, 256)
    apply_nm_masks(dense, NMPattern(2, 4))
    strip(dense)
    packed = copy.deepcopy(dense)
    assert to_semi_structured(packed).packed == 1
    x = torch.randn(2, 5, 128, device="cuda", dtype=dtype)
    assert close(packed(x), dense(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_no_weight_is_lost(dtype: torch.dtype) -> None:
    layer = two_four(128, 256, dtype, bias=False)
    weight = layer.weight.clone()
    assert to_semi_structured(layer).packed == 1
    assert torch.equal(layer(torch.eye(256, device="cuda", dtype=dtype)), weight.t())


@torch.no_grad()
def test_a_dense_layer_and_float32_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).cuda()
    apply_nm_masks(model, NMPattern(2, 4), include=["1"])
    strip(model)
    weight = model[0].weight.clone()
    with pytest.warns(UserWarning, match="takes no float32"):
        assert to_semi_structured(model).packed == 0
    result = to_semi_structured(model, torch.bfloat16)
    assert [layer.packed for layer in result.layers] == [False, True]
    assert "does not hold 2:4" in result.layers[0].reason
    assert torch.equal(model[0].weight, weight.bfloat16())


@pytest.mark.parametrize("format", ["dense", "packed"])
@torch.no_grad()
def test_a_file_is_loaded_for_sparse_tensor_cores(format: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).half()
    apply_nm_masks(model, NMPattern(2, 4))
    path = export_model(model, tmp_path / "file", format).path  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).half().eval()
    x = torch.randn(4, 128, device="cuda", dtype=torch.float16)
    dense = load_sparse(path, copy.deepcopy(plain), device="cuda", backend="dense")
    assert type(dense[0].weight) is nn.Parameter
    for how in ("auto", "semi_structured"):
        sparse = load_sparse(path, copy.deepcopy(plain), device="cuda", backend=how)  # type: ignore[call-overload]
        assert isinstance(sparse[0].weight, torch.sparse.SparseSemiStructuredTensor)
        assert close(sparse(x), dense(x))
    training = load_sparse(path, copy.deepcopy(plain).train(), device="cuda")
    assert type(training[0].weight) is nn.Parameter, "a model that may go on training keeps its weights"
    tensors = load_sparse(path, device="cuda")
    assert {tensor.device.type for tensor in tensors.values()} == {"cuda"}
    assert torch.equal(tensors["0.weight"], dense[0].weight)


def milliseconds(layer: nn.Module, x: Tensor) -> float:
    """The median of 20 measurements of 10 products each."""
    for _ in range(10):
        layer(x)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            layer(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def test_the_table_of_times(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {backend}, bfloat16, ms per product",
        "\n| weight | tokens | dense | 2:4 | speed-up |\n|---|---|---|---|---|",
    ]
    for rows, columns in GRID:
        dense = two_four(rows, columns, torch.bfloat16)
        packed = copy.deepcopy(dense)
        assert to_semi_structured(packed).packed == 1
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            assert close(packed(x), dense(x))
            before, after = milliseconds(dense, x), milliseconds(packed, x)
            lines.append(f"| {rows} x {columns} | {tokens} | {before:.4f} | {after:.4f} | {before / after:.2f} |")
    with capsys.disabled():
        print("\n".join(lines))  # noqa: T201
