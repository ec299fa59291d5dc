"""Zeros by bits are those by selection."""

import pytest
import torch
from torch import nn

from lightning_step.functional import apply_mask, bits, pruned_part, straight_through
from lightning_step.functional.bits import INTEGERS, as_laid_out, keep_, kept_part

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -3.0]


@pytest.fixture(autouse=True, params=[(0, 5), (0, 2**15), (2**12, 5)], ids=["blocks", "one block", "selection"])
def small(request, monkeypatch):
    for name, value in zip(("_SMALL", "_BLOCK"), request.param, strict=True):
        monkeypatch.setattr(bits, name, value)


def case(dtype, shape=(4, 6)):
    weight = torch.tensor(SPECIAL, dtype=torch.float64).repeat(3).reshape(shape).to(dtype)
    return weight, torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4), (1, 24), (24, 1), (24,)])
def test_every_bit_is_kept_and_the_rest_is_plus_zero(dtype, shape):
    weight, mask = case(dtype, shape)
    bits_before, zero = weight.clone(), torch.zeros((), dtype=dtype)
    for laid in (
        lambda t: t,
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        for other in (laid, lambda t: t):  # masks that lie as the weight does, and that do not
            w, m = laid(weight), other(mask)
            assert same_bits(kept_part(w, m), torch.where(mask, weight, zero))
            assert same_bits(kept_part(w, m, of=False), torch.where(mask, zero, weight))
            assert same_bits(weight, bits_before)
            keep_(written := w.clone(), m)
            assert same_bits(written, torch.where(mask, weight, zero))


def test_what_is_kept_of_holes_is_dense_and_what_is_transposed_stays_so():
    weight, mask = case(torch.float32)
    assert kept_part(weight.t(), mask.t()).stride() == weight.t().stride()


@pytest.mark.parametrize("grad", [True, False])
def test_the_functions_that_use_it_are_those_of_before(grad):
    weight, mask = case(torch.float32)
    weight = nn.Parameter(weight, requires_grad=grad)
    zero = torch.zeros(())
    for ours, theirs in (
        (apply_mask(weight, mask), torch.where(mask, weight, zero)),
        (straight_through(weight, mask), torch.where(mask, weight, zero)),
        (pruned_part(weight, mask), torch.where(mask, zero, weight.detach())),
    ):
        assert same_bits(ours.detach(), theirs.detach())
    assert (apply_mask(weight, mask).requires_grad, straight_through(weight, mask).requires_grad) == (grad, grad)
    assert not pruned_part(weight, mask).requires_grad


def test_a_mask_of_another_shape_or_dtype_is_not_read_as_bits():
    weight, mask = case(torch.float32)
    assert torch.equal(kept_part(weight.nan_to_num(), mask[:1]), torch.where(mask[:1], weight.nan_to_num(), 0.0))
    with pytest.raises(RuntimeError, match="bool"):
        kept_part(weight, mask.int())


def test_dimensions_come_in_the_order_of_memory():
    assert as_laid_out(torch.ones(2, 3, 4).permute(2, 0, 1)) == [1, 2, 0]


@pytest.mark.parametrize("small", [(0, 5), (0, 2**15)], ids=["blocks", "one block"], indirect=True)
def test_a_block_takes_one_product(small):
    weight, mask = case(torch.float32)
    blocks = 5 if bits._BLOCK == 5 else 1  # of 24 elements
    for verb, more in ((keep_, []), (lambda *args: kept_part(*args, of=False), ["aten::__xor__"])):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            verb(weight, mask)
        called = [event.name for event in profiler.events() if event.cpu_parent is None]
        work = [name for name in called if name not in ("aten::detach", "aten::view", "aten::split", "aten::empty_like")]
        assert len(work) == blocks * (1 + len(more)), called
        assert all(name in ("aten::mul", "aten::mul_", *more) for name in work), called
