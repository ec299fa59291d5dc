"""Statistics of masks against loops over Python numbers."""

import itertools
import math

import pytest
import torch

from lightning_step import NMPattern
from lightning_step.errors import PatternError
from lightning_step.functional import (
    Violation,
    density_update,
    find_violation,
    flip_rate_update,
    kept_magnitude_update,
    ratio_compute,
    violation_update,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]


def random_tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)


def groups_by_loop(weight, m, dim):
    """Every group as ``(index, values)``, in row-major order of the tensor with its group dimension in groups."""
    sizes = list(weight.shape)
    sizes[dim] //= m
    for index in itertools.product(*map(range, sizes)):
        places = [(*index[:dim], index[dim] * m + i, *index[dim + 1 :]) for i in range(m)]
        yield index, [weight[place].item() for place in places]


def violations_by_loop(weight, pattern, dim):
    counted = [(index, sum(v != 0 for v in values)) for index, values in groups_by_loop(weight, pattern.m, dim)]
    return [(index, count) for index, count in counted if count > pattern.n], len(counted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density_counts_nonzeros(dtype):
    weight = random_tensor(6, 8).to(dtype)
    nonzeros = sum(value != 0 for value in weight.double().flatten().tolist())
    assert 0 < nonzeros < 48
    assert density_update(weight).tolist() == [nonzeros, 48]


def test_minus_zero_is_a_zero_and_nan_is_not():
    assert density_update(torch.tensor([-0.0, 0.0, math.nan, math.inf])).tolist() == [2, 4]
    assert find_violation(torch.tensor([-0.0, math.nan, -0.0, 1.0]), NMPattern(2, 4)) is None
    assert find_violation(torch.tensor([-0.0, math.nan, 1.0, 1.0]), NMPattern(2, 4)) == Violation((0,), 3, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 2), NMPattern(3, 4), NMPattern(4, 4)], ids=str)
def test_violations(dtype, dim, pattern):
    weight = random_tensor(4, 8, 12).to(dtype)
    bad, groups = violations_by_loop(weight, pattern, dim % 3)
    assert violation_update(weight, pattern, dim).tolist() == [len(bad), groups]
    expected = Violation(*bad[0], len(bad)) if bad else None
    assert find_violation(weight, pattern, dim) == expected


def test_the_cases_above_hold_patterns_and_break_them():
    found = [len(violations_by_loop(random_tensor(4, 8, 12), NMPattern(n, 4), 2)[0]) for n in (2, 4)]
    assert found[0] > 1
    assert found[1] == 0


@pytest.mark.parametrize("function", [violation_update, find_violation])
def test_a_size_that_m_does_not_divide_is_refused(function):
    with pytest.raises(PatternError, match=r"^Expected m to divide .* size 6 along dim 0 of shape \(6, 4\)"):
        function(torch.ones(6, 4), NMPattern(2, 4), 0)


def test_flip_rate_counts_changed_entries():
    before, after = random_tensor(5, 8, seed=1) > 0, random_tensor(5, 8, seed=2) > 0
    changed = sum(b != a for b, a in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True))
    assert changed > 0
    assert flip_rate_update(before, after).tolist() == [changed, 40]
    assert flip_rate_update(before, before).tolist() == [0, 40]
    assert flip_rate_update(before, ~before).tolist() == [40, 40]


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_kept_magnitude_sums_what_the_mask_keeps(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator).to(dtype).requires_grad_()
    mask = torch.rand(6, 8, generator=generator) < 0.5
    pairs = list(zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True))
    update = kept_magnitude_update(weight, mask)
    assert not update.requires_grad
    assert update.tolist() == pytest.approx(
        [math.fsum(abs(w) for w, kept in pairs if kept), math.fsum(abs(w) for w, _ in pairs)], rel=1e-14
    )


@pytest.mark.parametrize(
    "update",
    [
        density_update,
        lambda w: violation_update(w, NMPattern(2, 4)),
        lambda w: flip_rate_update(w != 0, w > 0),
        lambda w: kept_magnitude_update(w, w > 0),
    ],
    ids=["density", "violation", "flip_rate", "kept_magnitude"],
)
def test_updates_add_up_over_tensors(update):
    weight = random_tensor(12, 8)
    total = sum(update(part) for part in weight.split([1, 4, 7]))
    assert total.shape == (2,)
    assert total.dtype == torch.float64
    assert total.tolist() == update(weight).tolist()


@pytest.mark.parametrize(("pair", "ratio"), [((1.0, 4.0), 0.25), ((3.0, 3.0), 1.0), ((0.0, 0.0), 0.0), ((0.0, 2.0), 0.0)])
def test_ratio(pair, ratio):
    value = ratio_compute(torch.tensor(pair))
    assert type(value) is float
    assert value == ratio


@pytest.mark.parametrize("m", [255, 256, 300])
def test_weights_of_large_groups_are_counted_to_the_end(m):
    """300 counted in a byte would be 44."""
    assert find_violation(torch.ones(1, m), NMPattern(max(m - 256, 1), m)) == Violation((0, 0), m, 1)
    assert find_violation(torch.ones(1, m), NMPattern(m, m)) is None
