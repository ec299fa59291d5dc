"""n:m masks against brute force over every mask of a group."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_step.functional.kernels as kernels
import lightning_step.functional.mask as mask_module
from lightning_step import NMPattern
from lightning_step.errors import PatternError
from lightning_step.functional import apply_mask, as_groups, magnitude_mask, magnitude_masks, nm_mask

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
PATTERNS = [NMPattern(*nm) for nm in ((2, 4), (1, 4), (1, 2), (3, 8), (4, 4), (1, 8), (5, 9), (1, 16), (3, 12))]
TIED_VALUES = [-INF, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0009765625, INF, NAN]


def exact(score):
    """The score as an integer that may be summed without rounding; NaN counts as plus infinity."""
    if math.isnan(score) or score == INF:
        return 2**3000
    return -(2**3000) if score == -INF else int(Fraction(score) * 2**1074)


def best_mask_of_group(scores, n):
    """Try every mask; of equal sums the one with the lowest places wins, because `max` returns the first."""
    values = [exact(s) for s in scores]
    kept = max(itertools.combinations(range(len(values)), n), key=lambda places: sum(values[p] for p in places))
    return [place in kept for place in range(len(values))]


def oracle(scores, pattern, dim):
    rows = scores.detach().double().movedim(dim, -1)
    kept = [best_mask_of_group(group, pattern.n) for group in rows.reshape(-1, pattern.m).tolist()]
    return torch.tensor(kept, dtype=torch.bool).reshape(rows.shape).movedim(-1, dim)


@st.composite
def cases(draw):
    m = draw(st.integers(2, 10))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = m * draw(st.integers(1, 2))
    score = st.one_of(st.sampled_from(TIED_VALUES), st.floats(width=16))
    values = draw(st.lists(score, min_size=math.prod(shape), max_size=math.prod(shape)))
    scores = torch.tensor(values, dtype=torch.float64).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    back = [order.index(axis) for axis in range(len(shape))]
    return scores.permute(order).contiguous().permute(back), NMPattern(draw(st.integers(1, m)), m), dim


@given(cases())
@settings(max_examples=150, deadline=None)
def test_mask_is_the_best_of_all_masks(case):
    scores, pattern, dim = case
    assert torch.equal(nm_mask(scores, pattern, dim), oracle(scores, pattern, dim))


@given(cases())
@settings(max_examples=50, deadline=None)
def test_magnitude_mask_is_the_best_of_all_masks_of_magnitudes(case):
    weight, pattern, dim = case
    assert torch.equal(magnitude_mask(weight, pattern, dim), oracle(weight.double().abs(), pattern, dim))


PATHS = {  # limits between the ways to compute a mask, set so that one of them serves every size
    "sorted": {"_NETWORK_MAX_M": 1},
    "network": {"_SMALL": -1, "_NETWORK_MAX_M": 1000},
    "blocks": {"_SMALL": -1, "_NETWORK_MAX_M": 1000, "block_elements": lambda: 2},
}
every_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture
def by(monkeypatch):
    """Make one way serve from now on."""
    return lambda path: [monkeypatch.setattr(kernels, name, value) for name, value in PATHS[path].items()]


@every_path
@pytest.mark.parametrize("function", [nm_mask, magnitude_mask])
@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_path_gives_the_same_mask(function, path, case):
    scores, pattern, dim = case
    expected = oracle(scores.double().abs() if function is magnitude_mask else scores, pattern, dim)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATHS[path].items():
            patch.setattr(kernels, name, value)
        assert torch.equal(function(scores, pattern, dim), expected)


@every_path
@pytest.mark.parametrize(
    ("n", "scores", "kept"),
    [
        (2, [3, -1, 2, 0], [1, 0, 1, 0]),
        (2, [-4, -3, -2, -1], [0, 0, 1, 1]),
        (2, [1, 1, 1, 1], [1, 1, 0, 0]),
        (1, [0, 0, 0, 0], [1, 0, 0, 0]),
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
        (4, [1, 2, 3, 4], [1, 1, 1, 1]),
        (2, [0, 1, 1, 1], [0, 1, 1, 0]),
        (1, [-0.0, 0.0, -0.0, 0.0], [1, 0, 0, 0]),
        (2, [0.0, -0.0, 0.0, -0.0], [1, 1, 0, 0]),
        (2, [-INF, -INF, -INF, -INF], [1, 1, 0, 0]),
        (1, [INF, NAN, INF, NAN], [1, 0, 0, 0]),
        (1, [9, NAN, 9, INF], [0, 1, 0, 0]),
        (2, [NAN, 9, INF, NAN], [1, 0, 1, 0]),
    ],
)
def test_literal_groups(by, path, n, scores, kept):
    by(path)
    assert nm_mask(torch.tensor(scores), NMPattern(n, 4)).int().tolist() == kept


@every_path
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_neighbouring_numbers_of_a_dtype_are_not_ties(by, path, dtype):
    by(path)
    info = torch.finfo(dtype)
    pairs = torch.tensor([[1, 1 + info.eps], [0, info.smallest_normal], [info.max, INF], [-INF, info.min]], dtype=dtype)
    assert nm_mask(pairs, NMPattern(1, 2)).tolist() == [[False, True]] * 4


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_all_equal_groups_keep_the_first_n(pattern):
    kept = [[True] * pattern.n + [False] * (pattern.m - pattern.n)] * 2
    assert nm_mask(torch.ones(2, pattern.m), pattern).tolist() == kept


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exactly_n_are_kept_among_many_ties_in_bfloat16(pattern):
    weight = torch.randn(512, 9 * 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    magnitude = weight.abs().reshape(-1, pattern.m)
    assert (magnitude[:, :1] == magnitude[:, 1:]).any()  # there are ties to break
    groups = magnitude_mask(weight, pattern).reshape(-1, pattern.m)
    assert (groups.sum(1) == pattern.n).all()
    smallest_kept = magnitude.masked_fill(~groups, INF).amin(1)
    largest_dropped = magnitude.masked_fill(groups, -INF).amax(1)
    assert (smallest_kept >= largest_dropped).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("m", [4, 12])
def test_integer_scores(dtype, m):
    scores = torch.randint(0, 2, (8, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(nm_mask(scores, NMPattern(2, m)), oracle(scores, NMPattern(2, m), -1))


@pytest.mark.parametrize("m", [4, 16])
def test_scores_are_not_modified_and_get_no_gradient(m):
    scores = torch.tensor([NAN, INF, -0.0, -1.0] * 4, requires_grad=True)
    bits = scores.detach().view(torch.int32).clone()
    mask = nm_mask(scores, NMPattern(2, m))
    assert torch.equal(scores.detach().view(torch.int32), bits)
    assert mask.dtype == torch.bool
    assert not mask.requires_grad


def test_a_tensor_without_groups_has_an_empty_mask():
    assert nm_mask(torch.empty(0, 4), NMPattern(2, 4)).shape == (0, 4)


@pytest.mark.parametrize("function", [as_groups, nm_mask, magnitude_mask])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 4)], ids=str)
def test_a_size_that_m_does_not_divide_is_refused(function, pattern):
    message = rf"^Expected m to divide .* got size 6 along dim 1 of shape \(4, 6\) for the pattern {pattern}\. Exclude"
    with pytest.raises(PatternError, match=message):
        function(torch.ones(4, 6), pattern, -1)


@pytest.mark.parametrize(("shape", "dim"), [((4, 4), 2), ((4, 4), -3), ((), -1), ((), 0)])
def test_a_dimension_that_does_not_exist_is_refused(shape, dim):
    with pytest.raises(PatternError, match=rf"^Expected `dim` to name .* got dim={dim} for {len(shape)}-D\.$"):
        as_groups(torch.ones(shape), NMPattern(2, 4), dim)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_as_groups_is_a_view_that_splits_one_dimension(dim):
    tensor = torch.arange(8 * 4 * 12).reshape(12, 4, 8).transpose(0, 2)  # (8, 4, 12), not contiguous
    groups = as_groups(tensor, NMPattern(2, 4), dim)
    moved = groups.movedim(dim % 3, 0).movedim(dim % 3 + 1, 1)  # (k, 4, ...)
    for place in range(tensor.shape[dim]):
        assert torch.equal(moved[place // 4, place % 4], tensor.select(dim, place))
    assert groups.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [-1.0, -0.0, INF, -INF, NAN, 1e-40])
def test_apply_mask_leaves_plus_zero_where_it_drops(dtype, value):
    masked = apply_mask(torch.full((3,), value, dtype=dtype), torch.zeros(3, dtype=torch.bool))
    assert masked.dtype == dtype
    assert (masked == 0).all()
    assert not masked.signbit().any()


def test_apply_mask_keeps_what_it_keeps_bit_for_bit():
    weight = torch.tensor([-0.0, NAN, -INF, 1e-40, -3.0])
    masked = apply_mask(weight, torch.ones(5, dtype=torch.bool))
    assert torch.equal(masked.view(torch.int32), weight.view(torch.int32))
    assert masked.data_ptr() != weight.data_ptr()


def test_apply_mask_masks_the_gradient_too():
    weight = torch.tensor([1.0, INF, 2.0], requires_grad=True)
    (apply_mask(weight, torch.tensor([True, False, False])) * 3).sum().backward()
    assert weight.grad.tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("limits", [{}, {"SMALL": 40}, {"TOGETHER": 1}, {"TOGETHER": 100}], ids=str)
def test_several_masks_are_what_each_is_by_itself(limits, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setitem(getattr(mask_module, name), "cpu", value)
    generator = torch.Generator().manual_seed(0)
    shapes = [((8, 8), 1), ((8, 8), 0), ((8, 8), -1), ((4, 8, 3, 3), 1), ((4, 8, 3, 3), 1), ((16,), 0), ((2, 24), 1)]
    weights = [torch.randn(shape, generator=generator).round(decimals=1) for shape, _ in shapes]
    weights[1] = weights[1].half()
    weights[4] = weights[4].to(memory_format=torch.channels_last)
    weights[2] = weights[2].t()
    dims = [dim for _, dim in shapes]
    for pattern in (NMPattern(2, 4), NMPattern(1, 8), NMPattern(4, 4)):
        together = magnitude_masks(weights, pattern, dims)
        for weight, dim, mask in zip(weights, dims, together, strict=True):
            assert torch.equal(mask, magnitude_mask(weight, pattern, dim))
            assert (mask.dtype, mask.stride()) == (torch.bool, magnitude_mask(weight, pattern, dim).stride())


def test_of_several_masks_one_that_cannot_be_is_refused():
    assert magnitude_masks([], NMPattern(2, 4), []) == []
    with pytest.raises(PatternError, match="size 6 along dim 1"):
        magnitude_masks([torch.ones(4, 8), torch.ones(4, 6)], NMPattern(2, 4), [1, 1])
    for dim in (2, -3):
        with pytest.raises(PatternError, match=f"dim={dim}"):
            magnitude_masks([torch.ones(4, 8)], NMPattern(2, 4), [dim])
