"""Which way a mask is computed, and that the compiled one is the same."""

import logging
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from lightning_step import NMPattern, compiling
from lightning_step.compiling import VARIABLE, compiled
from lightning_step.functional import kernels, magnitude_mask, nm_mask
from lightning_step.functional.kernels import as_magnitudes, as_scores

INF, NAN = torch.inf, torch.nan
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def forgetful():
    yield
    kernels._kernel.cache_clear()
    compiling._failures.clear()
    torch._dynamo.reset()


@pytest.fixture
def asked(monkeypatch):
    """Compiled kernels are asked for, and serve small tensors too; returns what compiles them."""
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(kernels, "_SMALL", -1)
    monkeypatch.setattr(kernels, "_COMPILED_ELEMENTS", {"cpu": 64, "cuda": 64})

    def by(backend):
        monkeypatch.setattr(kernels, "compiled", partial(compiled, backend=backend))

    return by


class Counting:
    """A backend that counts graphs and runs of them."""

    def __init__(self):
        self.graphs, self.runs = 0, 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def with_specials(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    flat = weight.view(-1)
    flat[::7] = flat[1]
    flat[3::11], flat[4::13], flat[5::17], flat[6::19], flat[7::23] = NAN, INF, -INF, -0.0, -NAN
    flat[8::9] = -flat[9]
    return weight


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_magnitudes_are_in_order_and_nan_is_infinity(dtype):
    info = torch.finfo(dtype)
    rising = [0.0, info.smallest_normal / 2, info.smallest_normal, 1.0, 1.0 + info.eps, info.max, INF]
    bits = as_magnitudes(torch.tensor(rising, dtype=dtype))
    assert (bits.diff() > 0).all()
    for sign in (1, -1):
        assert torch.equal(as_magnitudes(sign * torch.tensor([*rising, NAN], dtype=dtype)), torch.cat([bits, bits[-1:]]))


def test_other_types_are_compared_as_they_are():
    assert as_magnitudes(torch.tensor([-3, 2])).tolist() == [3, 2]
    assert as_scores(torch.tensor([-3, 2])).tolist() == [-3, 2]
    assert as_scores(torch.tensor([NAN, -INF, -0.0])).tolist() == [INF, -INF, 0.0]


def test_subnormal_numbers_differ_also_where_the_processor_flushes_them():
    weight = torch.tensor([[1e-40, 2e-40, 0.0, 3e-40]]).repeat(200, 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        mask = magnitude_mask(weight, NMPattern(2, 4))
    finally:
        torch.set_flush_denormal(False)
    assert mask.unique(dim=0).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("shape", "dim"), [((24, 8, 3, 5), 1), ((24, 8, 5), 0), ((16, 72), 1), ((72, 16), 0)])
def test_the_mask_lies_in_memory_as_the_weight_does(shape, dim, monkeypatch):
    monkeypatch.setattr(kernels, "_SMALL", -1)
    expected = magnitude_mask(weight := with_specials(shape, torch.float32), NMPattern(2, 4), dim)
    last = weight.movedim(dim, -1).contiguous().movedim(-1, dim)  # another layout, as channels_last is one
    mask = magnitude_mask(last, NMPattern(2, 4), dim)
    assert torch.equal(mask, expected)
    assert (expected.stride(), mask.stride()) == (weight.stride(), last.stride())
    holes = torch.stack([weight, weight], dim=-1)[..., 0]
    assert torch.equal(magnitude_mask(holes, NMPattern(2, 4), dim), expected)


@pytest.mark.parametrize("shape", [(1, 64), (40, 8), (8, 1, 5), (64, 1)])
def test_dimensions_of_length_one_are_no_trouble(shape, monkeypatch):
    weight = with_specials(shape, torch.float32)
    expected = magnitude_mask(weight, NMPattern(2, 4), dim := weight.shape.index(max(weight.shape)))
    monkeypatch.setattr(kernels, "_SMALL", -1)
    assert torch.equal(magnitude_mask(weight, NMPattern(2, 4), dim), expected)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script.*. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 8)])
def test_the_compiled_mask_is_the_same(asked, n, m):
    asked("inductor")
    for dtype in (torch.float32, torch.bfloat16) if m == 4 else (torch.float32,):
        weight = with_specials((9, 24), dtype)  # three blocks, and a rest
        mask = magnitude_mask(weight, NMPattern(n, m))
        assert torch.equal(mask, nm_mask(weight.abs(), NMPattern(n, m)))
    assert not compiling._failures


def test_one_graph_serves_every_matrix_in_every_mode(asked):
    asked(backend := Counting())
    for rows in (8, 16, 17, 40):
        for mode in (torch.enable_grad, torch.no_grad, torch.enable_grad):
            with mode():
                weight = nn.Parameter(with_specials((rows, 16), torch.float32))
                assert torch.equal(magnitude_mask(weight, NMPattern(2, 4)), nm_mask(weight.abs(), NMPattern(2, 4)))
    assert (backend.graphs, backend.runs) == (1, 3 * (2 + 4 + 4 + 10))


def test_many_patterns_do_not_use_up_the_limit_of_graphs(asked):
    asked(backend := Counting())
    weight = with_specials((8, 96), torch.float32)
    patterns = [NMPattern(n, m) for m in (3, 4, 6) for n in range(1, m)]
    for pattern in patterns:
        assert torch.equal(magnitude_mask(weight, pattern), nm_mask(weight.abs(), pattern))
    assert backend.graphs == len(patterns) > torch._dynamo.config.recompile_limit


@pytest.mark.parametrize(
    ("value", "shape", "dtype", "function"),
    [
        (None, (8, 16), torch.float32, magnitude_mask),
        ("0", (8, 16), torch.float32, magnitude_mask),
        ("1", (3, 16), torch.float32, magnitude_mask),
        ("1", (8, 16), torch.float32, nm_mask),
        ("1", (8, 16), torch.int32, magnitude_mask),
    ],
    ids=["unset", "off", "small", "scores", "integers"],
)
def test_nothing_is_compiled_unasked_or_without_need(asked, monkeypatch, value, shape, dtype, function):
    asked(backend := Counting())
    monkeypatch.delenv(VARIABLE) if value is None else monkeypatch.setenv(VARIABLE, value)
    function(torch.ones(shape, dtype=dtype), NMPattern(2, 4))
    assert backend.graphs == 0


def test_without_a_compiler_the_mask_is_made_eagerly_and_the_log_says_so_once(asked, caplog):
    def backend(graph, inputs):
        raise InvalidCxxCompiler

    asked(backend)
    weight = with_specials((8, 16), torch.float32)
    with caplog.at_level(logging.WARNING, logger="lightning_step"):
        for n in (1, 2, 1):
            assert torch.equal(magnitude_mask(weight, NMPattern(n, 4)), nm_mask(weight.abs(), NMPattern(n, 4)))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "kernels are not compiled, and run slower"
    ]


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 16), NMPattern(3, 12)], ids=str)
def test_within_a_graph_of_somebody_it_is_traced_in_one_piece(asked, pattern):
    asked(backend := Counting())
    weight = with_specials((8, 48), torch.float32)
    traced = torch.compile(magnitude_mask, backend="aot_eager", fullgraph=True)(weight, pattern)
    assert torch.equal(traced, nm_mask(weight.abs(), pattern))
    assert torch.equal(torch.vmap(lambda w: magnitude_mask(w, pattern))(weight), traced)
    assert backend.graphs == 0
