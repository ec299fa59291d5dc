"""Allocations against brute force over all of them, and against formulas worked out by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_step import NMPattern
from lightning_step.functional import (
    Layer,
    choices_of,
    cost,
    erk_allocation,
    magnitude_allocation,
    magnitude_mask,
    order_statistics,
    search_allocation,
)

FORMS = {"erk": erk_allocation, "magnitude": magnitude_allocation, "search": search_allocation}
every_form = pytest.mark.parametrize("allocate", FORMS.values(), ids=FORMS)


@st.composite
def layer(draw):
    m = draw(st.sampled_from([2, 4, 8]))
    shape = (draw(st.integers(1, 9)), m * draw(st.integers(1, 5)))
    ranked = sorted(draw(st.lists(st.floats(0, 4), min_size=m, max_size=m)), reverse=True)
    n, uses = draw(st.integers(1, m)), draw(st.sampled_from([1.0, 3.0, 49.0]))
    return Layer(shape, NMPattern(n, m), uses, tuple(ranked), tuple(a * a for a in ranked))


networks = st.lists(layer(), min_size=1, max_size=4)


def spent(layers, patterns):
    assert [pattern.m for pattern in patterns] == [each.pattern.m for each in layers]
    return sum(math.prod(e.shape) * p.n / p.m * e.uses for e, p in zip(layers, patterns, strict=True))


def error(each, n):
    total = sum(each.squares)
    return sum(each.squares[n:]) / total if total else 1 - n / each.pattern.m


def everything(layers):
    return itertools.product(*([NMPattern(n, each.pattern.m) for n in choices_of(each.pattern)] for each in layers))


# Statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((5, 8), 1), ((8, 3), 0), ((4, 8, 3, 3), 1), ((16, 2), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_order_statistics_are_what_masks_keep(shape, dim, dtype):
    weight = torch.randn(shape, dtype=dtype)
    sums = order_statistics(weight, NMPattern(1, 4), dim)
    assert (sums.shape, sums.dtype) == ((2, 4), torch.float64)
    for n in range(1, 5):
        kept = weight[magnitude_mask(weight, NMPattern(n, 4), dim)].double()
        assert sums[0, :n].sum().item() == pytest.approx(kept.abs().sum().item(), rel=1e-6)
        assert sums[1, :n].sum().item() == pytest.approx(kept.square().sum().item(), rel=1e-6)


def test_parts_add_up_to_the_whole():
    weight = torch.randn(6, 8)
    parts = [order_statistics(part, NMPattern(2, 4)) for part in (weight[:1], weight[1:5], weight[5:])]
    assert torch.allclose(sum(parts), order_statistics(weight, NMPattern(2, 4)), rtol=1e-12)
    assert torch.equal(order_statistics(weight[:0], NMPattern(2, 4)), torch.zeros(2, 4, dtype=torch.float64))


def test_a_weight_that_is_no_number_counts_as_zero():
    weight = torch.tensor([math.nan, 2.0, -1.0, 0.5])
    assert order_statistics(weight, NMPattern(1, 4)).tolist() == [[2, 1, 0.5, 0], [4, 1, 0.25, 0]]


@pytest.mark.parametrize(
    ("pattern", "choices"),
    [((1, 2), (1, 2)), ((2, 4), (1, 2, 4)), ((3, 4), (1, 2, 3, 4)), ((2, 6), (1, 2, 4, 6)), ((16, 16), (1, 2, 4, 8, 16))],
)
def test_the_choices(pattern, choices):
    assert choices_of(NMPattern(*pattern)) == choices


def test_the_cost_is_what_is_kept_times_its_uses():
    assert [cost(Layer((6, 8, 3, 3), NMPattern(2, 4), 49.0), n) for n in (1, 4)] == [108 * 49, 432 * 49]


# Every form ---------------------------------------------------------------------------------------------------------


@every_form
@given(networks, st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_kept_and_nothing_more_would_fit(allocate, layers, share):
    least, dense = (sum(cost(e, n) for e, n in zip(layers, kept, strict=True)) for kept in zip(*ends(layers), strict=True))
    budget = least + share * (dense - least)
    patterns = allocate(layers, budget)
    assert spent(layers, patterns) <= budget * (1 + 1e-6)
    assert all(p.n in choices_of(e.pattern) for e, p in zip(layers, patterns, strict=True))
    room = budget - spent(layers, patterns)
    for each, pattern in zip(layers, patterns, strict=True):
        larger = [n for n in choices_of(each.pattern) if n > pattern.n]
        helps = allocate is not search_allocation or (larger and error(each, larger[0]) < error(each, pattern.n) - 1e-9)
        if larger and helps:
            assert cost(each, larger[0]) - cost(each, pattern.n) > room - 1e-6 * budget


def ends(layers):
    return [(choices_of(e.pattern)[0], e.pattern.m) for e in layers]


@every_form
def test_one_layer_alone_gets_what_it_had(allocate):
    for n in (1, 2, 3, 4, 8):
        each = Layer((4, 16), NMPattern(n, 8), magnitudes=(1.0,) * 8, squares=(1.0,) * 8)
        assert allocate([each], cost(each, n)) == [NMPattern(n, 8)]


@every_form
def test_a_share_that_binary_numbers_miss_is_enough(allocate):
    each = Layer((10, 10), NMPattern(3, 10))
    assert allocate([each], 0.3 * 100) == allocate([each], 29.999999999999996) == [NMPattern(3, 10)]


@every_form
def test_layers_of_zeros_share_alike(allocate):
    layers = [Layer((4, 16), NMPattern(2, 8), magnitudes=(0.0,) * 8, squares=(0.0,) * 8)] * 4
    assert allocate(layers, sum(cost(each, 2) for each in layers)) == [NMPattern(2, 8)] * 4


@every_form
def test_uses_make_weights_dear(allocate):
    same = {"magnitudes": (4.0, 3.0, 2.0, 1.0), "squares": (16.0, 9.0, 4.0, 1.0)}
    layers = [Layer((8, 16), NMPattern(2, 4), uses, **same) for uses in (100.0, 1.0)]
    dear, cheap = allocate(layers, sum(cost(each, 2) for each in layers))
    assert dear.n <= 2 <= cheap.n
    if allocate is magnitude_allocation:
        assert cheap.n == 4


# Each form ----------------------------------------------------------------------------------------------------------


@given(networks, st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_no_exchange_betters_the_search_and_it_is_near_the_best_there_is(layers, share):
    least, dense = (sum(cost(e, n) for e, n in zip(layers, kept, strict=True)) for kept in zip(*ends(layers), strict=True))
    budget = least + share * (dense - least)
    patterns = search_allocation(layers, budget)

    def total(chosen):
        return sum(error(e, p.n) for e, p in zip(layers, chosen, strict=True))

    allowed = [chosen for chosen in everything(layers) if spent(layers, chosen) <= budget * (1 + 1e-9)]
    for chosen in allowed:
        moves = [
            choices_of(e.pattern).index(p.n) - choices_of(e.pattern).index(q.n)
            for e, p, q in zip(layers, chosen, patterns, strict=True)
        ]
        if sorted(move for move in moves if move) in ([1], [-1, 1]):
            assert total(chosen) >= total(patterns) - 1e-9
    # What greedy and exchanges leave on the table is less than the largest single step.
    steps = [error(e, a) - error(e, b) for e in layers for a, b in itertools.pairwise(choices_of(e.pattern))]
    assert total(patterns) - min(map(total, allowed)) <= max(steps, default=0) + 1e-9


def test_the_search_takes_from_the_layer_that_has_little_to_lose():
    peaked, flat = (9.0, 0.2, 0.1, 0.0), (1.0, 1.0, 1.0, 1.0)
    layers = [Layer((8, 16), NMPattern(2, 4), squares=each) for each in (peaked, flat, peaked)]
    assert [p.n for p in search_allocation(layers, 8 * 16 * 1.5)] == [1, 4, 1]


def test_the_search_exchanges_where_greed_has_gone_wrong():
    """Tightening the large layer first leaves room that only giving up the small one can use."""
    large = Layer((10, 4), NMPattern(4, 4), squares=(1.0, 0.36, 0.34, 0.3))
    small = Layer((4, 4), NMPattern(4, 4), squares=(1.0, 0.4, 0.3, 0.3))
    best = min(
        (chosen for chosen in everything([large, small]) if spent([large, small], chosen) <= 44),
        key=lambda chosen: error(large, chosen[0].n) + error(small, chosen[1].n),
    )
    assert tuple(search_allocation([large, small], 44)) == best


def test_erk_follows_the_formula():
    """Densities from the equation of the paper, solved by bisection, then rounded down to powers of two."""
    shapes = [(256, 256), (64, 256), (512, 64), (32, 64)]
    layers = [Layer(shape, NMPattern(2, 16)) for shape in shapes]
    budget = sum(cost(each, 2) for each in layers)

    def densities(kappa):
        return [min(1.0, kappa * sum(shape) / math.prod(shape)) for shape in shapes]

    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        over = sum(d * math.prod(s) for d, s in zip(densities(middle), shapes, strict=True)) > budget
        low, high = (low, middle) if over else (middle, high)
    wanted = densities(low)
    for got, density in zip(erk_allocation(layers, budget), wanted, strict=True):
        below = 2 ** math.floor(math.log2(density * 16))
        assert got.n >= below
    assert [p.n for p in erk_allocation(layers, budget)] == [1, 4, 2, 16]  # what rounding leaves goes to the last, alone


def test_magnitudes_are_compared_with_the_mean_of_their_layer():
    """Twice as large weights change nothing; a layer whose large weights are large keeps fewer of them."""
    peaked, flat = (8.0, 0.0, 0.0, 0.0), (2.0, 2.0, 2.0, 2.0)
    for scale in (1.0, 1000.0):
        layers = [Layer((8, 16), NMPattern(2, 4), magnitudes=tuple(scale * a for a in peaked))]
        layers += [Layer((8, 16), NMPattern(2, 4), magnitudes=flat)]
        assert [p.n for p in magnitude_allocation(layers, 8 * 16 * 3 / 4)] == [1, 2]
        assert [p.n for p in magnitude_allocation(layers, 8 * 16 * 5 / 4)] == [1, 4]
