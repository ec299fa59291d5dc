"""Which layers sparse tensor cores would run, decided without one; on a CPU the model stays as it is, and it is said why."""

import inspect

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from transformers.pytorch_utils import Conv1D

from lightning_step import NMPattern, apply_nm_masks, strip
from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.export import semi_structured as module
from lightning_step.export import to_semi_structured
from lightning_step.export.semi_structured import choose_backend, why_no_search, why_not_packed

CLASSES = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
SIZES = [0, 8, 16, 24, 32, 48, 64, 96, 128, 130, 256]


@pytest.mark.parametrize("backend", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decision_is_that_of_torch_for_every_shape_and_float32_is_never_taken(backend, dtype):
    """torch's own table is the oracle; only that it would take float32 as 1:2 is not followed."""
    limits = CLASSES[backend]._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    taken = 0
    for rows in SIZES:
        for columns in SIZES:
            expected = limits is not None and dtype != torch.float32 and rows > 0 and columns > 0
            expected = expected and not rows % limits.sparse_min_rows and not columns % limits.sparse_min_cols
            assert (why_not_packed((rows, columns), dtype, backend) == "") == expected, (rows, columns)
            taken += expected
    assert bool(taken) == (
        dtype in (torch.float16, torch.bfloat16, torch.int8, *[torch.float8_e4m3fn] * (backend == "cusparselt"))
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "reason"),
    [
        (
            (64, 64),
            torch.float32,
            "cutlass",
            "cutlass takes no float32 2:4 weights; ask for a cast with dtype=torch.bfloat16",
        ),
        (
            (64, 64),
            torch.float32,
            "cusparselt",
            "cusparselt takes no float32 2:4 weights; ask for a cast with dtype=torch.bf",
        ),
        ((64, 32), torch.float16, "cutlass", "cutlass needs multiples of 32x64 for float16"),
        ((64, 64), torch.float8_e4m3fn, "cutlass", "cutlass takes no float8_e4m3fn 2:4 weights"),
        ((64, 64, 1), torch.float16, "cusparselt", "it has 3 dimensions, and both backends take 2"),
    ],
)
def test_the_reason_is_given(shape, dtype, backend, reason):
    assert why_not_packed(shape, dtype, backend).startswith(reason)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "backend", "reason"),
    [
        (None, True, None, "it is not on a CUDA device"),
        ((7, 5), True, None, "compute capability 7.5 has no sparse tensor cores"),
        ((8, 0), True, "cusparselt", ""),
        ((8, 9), False, "cutlass", ""),
        ((9, 0), True, "cusparselt", ""),
        ((9, 0), False, None, "compute capability 9.0 needs cuSPARSELt"),
        ((12, 0), False, None, "compute capability 12.0 needs cuSPARSELt"),
    ],
)
def test_the_backend_follows_the_device(capability, cusparselt, backend, reason):
    chosen, why = choose_backend(capability, cusparselt)
    assert chosen == backend
    assert why.startswith(reason)
    assert bool(why) == (backend is None)


class Mixed(nn.Module):
    """Layers that can be packed, and one of every kind that cannot."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.good = nn.Linear(64, 64)
        self.dense = nn.Linear(64, 64)
        self.odd = nn.Linear(64, 24)
        self.embedding = nn.Embedding(32, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.twin = nn.Linear(64, 64)
        self.hf = Conv1D(64, 64)
        self.to(dtype)
        targets = apply_nm_masks(self, NMPattern(2, 4), exclude=["dense"])
        strip(self)
        assert len(targets.masked) == 5
        self.head.weight = self.embedding.weight
        self.twin.weight = self.good.weight


def test_on_a_cpu_the_model_stays_dense_and_every_layer_says_why():
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"but got none that can be: it is not on a CUDA device\. All stay dense"):
        result = to_semi_structured(model, torch.float16)
    assert (result.backend, result.packed) == (None, 0)
    assert {layer.reason for layer in result.layers} == {"it is not on a CUDA device"}
    assert [layer.name for layer in result.layers] == [f"{n}.weight" for n in ("good", "dense", "odd", "head", "twin", "hf")]
    assert str(result).splitlines()[0] == "0 of 6 Linear weights packed for no backend"
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def as_if_cutlass(monkeypatch):
    """torch packs for CUTLASS on a CPU too, once nobody asks for the device; it cannot multiply there."""
    monkeypatch.setattr(module, "active_backend", lambda device: ("cutlass", ""))
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda weight: None)


@pytest.mark.usefixtures("as_if_cutlass")
def test_each_layer_is_packed_or_stays_dense_with_its_reason():
    model = Mixed()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = to_semi_structured(model)
    assert {layer.name: layer.reason for layer in result.layers} == {
        "good.weight": "",
        "dense.weight": "it does not hold 2:4: 4 non-zero weights in group (0, 0)",
        "odd.weight": "cutlass needs multiples of 32x64 for bfloat16",
        "head.weight": "it is shared with 'embedding.weight'",
        "twin.weight": "",
        "hf.weight": "",
    }
    assert result.packed == 3
    assert isinstance(model.good.weight, SparseSemiStructuredTensorCUTLASS)
    assert model.good.weight is model.twin.weight
    assert not model.good.weight.requires_grad
    packed, meta = model.good.weight.packed, model.good.weight.meta
    back = torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
    assert torch.equal(back, plain["good.weight"]), "a weight was lost"
    assert all(torch.equal(model.state_dict()[name], plain[name]) for name in ("dense.weight", "odd.weight"))
    back = torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(
        model.hf.weight.packed, model.hf.weight.meta
    )
    assert torch.equal(back, plain["hf.weight"].t())
    assert isinstance(model.hf, Conv1D)


@pytest.mark.usefixtures("as_if_cutlass")
def test_float32_stays_dense_unless_a_cast_is_asked_for():
    model = Mixed(torch.float32)
    with pytest.warns(UserWarning, match=r"cutlass takes no float32 2:4 weights; ask for a cast"):
        assert to_semi_structured(model).packed == 0
    assert model.good.weight.dtype == torch.float32
    result = to_semi_structured(model, torch.bfloat16)
    assert result.packed == 3
    assert {model.good.weight.dtype, model.good.bias.dtype, model.dense.weight.dtype} == {torch.bfloat16}


@pytest.mark.usefixtures("as_if_cutlass")
def test_what_torch_refuses_stays_dense_with_its_words(monkeypatch):
    def refuse(weight):
        raise RuntimeError("no room\nsecond line")

    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", refuse)
    model = Mixed()
    with pytest.warns(UserWarning, match=r"got none that can be: cutlass refused it \(no room\)"):
        assert to_semi_structured(model).layers[0].reason == "cutlass refused it (no room)"
    assert type(model.good.weight) is nn.Parameter


@pytest.mark.usefixtures("as_if_cutlass")
def test_a_layer_that_multiplies_in_its_own_way_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ (self.weight * 2).t()

    class Renamed(nn.Linear):
        pass

    model = nn.Sequential(Own(64, 64), Renamed(64, 64)).bfloat16()
    apply_nm_masks(model, NMPattern(2, 4))
    strip(model)
    assert [(layer.name, layer.packed) for layer in to_semi_structured(model).layers] == [("1.weight", True)]


def test_a_model_without_linear_layers_says_so():
    with pytest.warns(UserWarning, match="the model has no Linear layer"):
        assert to_semi_structured(nn.Conv2d(4, 4, 3)).layers == ()


def test_a_model_with_masks_and_another_dtype_are_refused():
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigurationError, match=r"to be None, torch\.float16 or torch\.bfloat16, but got torch\.int8"):
        to_semi_structured(model, torch.int8)
    apply_nm_masks(model, NMPattern(2, 4))
    with pytest.raises(ConfigurationError, match=r"without masks, but got one with 1\. Call `strip\(model\)` first"):
        to_semi_structured(model)


def test_nothing_of_torchao_is_needed():
    assert "torchao" not in inspect.getsource(module)


@pytest.mark.usefixtures("as_if_cutlass")
def test_what_is_packed_already_stays_as_it_is():
    model = Mixed()
    to_semi_structured(model)
    weight = model.good.weight
    with pytest.warns(UserWarning, match="but got none that can be: it is packed already"):
        assert to_semi_structured(model).packed == 0
    assert model.good.weight is weight


@pytest.mark.usefixtures("as_if_cutlass")
def test_a_weight_shared_in_both_orientations_stays_dense():
    model = nn.ModuleDict({"linear": nn.Linear(64, 64), "conv": Conv1D(64, 64)}).bfloat16()
    apply_nm_masks(model["linear"], NMPattern(2, 4))
    strip(model["linear"])
    model["conv"].weight = model["linear"].weight
    with pytest.warns(UserWarning, match="it is shared with 'conv.weight'"):
        assert to_semi_structured(model).packed == 0


@pytest.mark.parametrize(
    ("backend", "tokens", "reason"),
    [
        (None, None, ""),
        ("cusparselt", None, ""),
        ("cutlass", None, ""),
        ("cusparselt", 1, ""),
        ("cutlass", 512, "cutlass has one algorithm for a shape"),
        (None, 512, "nothing is packed"),
    ],
)
def test_a_search_says_why_there_is_none(backend, tokens, reason):
    assert why_no_search(backend, tokens) == reason


def test_on_a_cpu_a_search_explains_itself():
    with pytest.warns(UserWarning, match="it is not on a CUDA device"):
        result = to_semi_structured(nn.Linear(64, 64), search=512)
    assert str(result).splitlines()[0] == "0 of 1 Linear weights packed for no backend (no search: nothing is packed)"


@pytest.mark.usefixtures("as_if_cutlass")
def test_cutlass_packs_and_says_that_there_is_nothing_to_search():
    result = to_semi_structured(Mixed(), search=512)
    assert (result.packed, result.no_search) == (3, "cutlass has one algorithm for a shape")
    assert {layer.algorithm for layer in result.layers} == {None}


def test_cusparselt_is_asked_for_the_product_of_a_linear_layer_and_the_answer_is_kept(monkeypatch):
    """What needs the device is replaced by what it was asked: the search, and the packing itself."""
    asked = []

    def search(packed, dense, transpose_result):
        asked.append((tuple(packed.shape), tuple(dense.shape), dense.stride(), dense.dtype, transpose_result))
        return 3 + len(asked)

    monkeypatch.setattr(module, "active_backend", lambda device: ("cusparselt", ""))
    monkeypatch.setattr(SparseSemiStructuredTensorCUSPARSELT, "_validate_device_dim_dtype_shape", lambda weight: None)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight[:, : weight.shape[1] * 9 // 16])
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 16)).bfloat16()
    apply_nm_masks(model, NMPattern(2, 4), exclude=["2"])
    strip(model)
    model.append(nn.Linear(64, 32))
    model[3].weight = model[0].weight  # asked once
    result = to_semi_structured(model, search=13)
    # 13 tokens are padded to 16, as torch pads the input; it comes in as the transpose of rows.
    assert asked == [
        ((32, 36), (64, 16), (1, 64), torch.bfloat16, True),
        ((16, 18), (32, 16), (1, 32), torch.bfloat16, True),
    ]
    assert [layer.algorithm for layer in result.layers] == [4, 5, None, 4]
    assert [getattr(model[i].weight, "alg_id_cusparselt", None) for i in range(4)] == [4, 5, None, 4]
    assert str(result.layers[0]) == "0.weight (32, 64) bfloat16: 2:4, algorithm 4"


@pytest.mark.parametrize(
    ("search", "error", "message"),
    [
        (True, ArgumentTypeError, "to be a number of tokens to tune for, or None, but got True"),
        (1.5, ArgumentTypeError, "to be a number of tokens"),
        (0, ConfigurationError, "Expected `search` >= 1"),
    ],
)
def test_a_search_for_no_number_of_tokens_is_refused(search, error, message):
    with pytest.raises(error, match=message):
        to_semi_structured(nn.Linear(64, 64), search=search)
