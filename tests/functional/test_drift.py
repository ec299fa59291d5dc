"""Drift against noise: simulations of v with gradients whose distribution is known, and sketches against copies."""

import math

import pytest
import torch

from lightning_step.functional import (
    drift_noise,
    drift_update,
    expected_drift,
    make_sketch,
    sketch,
    squared_distance,
    statistic_size,
    statistic_update,
)

WIDTH = 127


def by_loop(values, numbers):
    """The same hash, in Python's own integers."""
    sums = [0.0] * WIDTH
    for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
        x = number & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        sums[number % WIDTH] += -value if (x ^ (x >> 16)) & 1 else value
    return sums


# The sketch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [torch.arange(1000), torch.arange(5) * 127, torch.tensor([2**31, 7, 2**32 - 1])])
def test_a_sketch_is_the_signed_sums_of_the_definition(numbers):
    values = torch.randn(len(numbers), dtype=torch.float64)
    assert sketch(values, make_sketch(numbers)).tolist() == pytest.approx(by_loop(values, numbers), abs=1e-12)


def test_parts_on_several_processes_add_up_to_the_sketch_of_the_whole():
    values, numbers = torch.randn(1000, dtype=torch.float64), torch.randperm(5000)[:1000]
    parts = [sketch(values[part], make_sketch(numbers[part])) for part in (slice(0, 1), slice(1, 900), slice(900, 1000))]
    torch.testing.assert_close(sum(parts), sketch(values, make_sketch(numbers)))
    assert torch.equal(sketch(values[:0], make_sketch(numbers[:0])), torch.zeros(WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("heavy", [False, True])
def test_sketches_are_as_far_apart_as_what_they_are_made_of(heavy):
    """Over 40 vectors the mean is right within 4 %, and each is within 13 % or so."""
    made, ratios = make_sketch(torch.arange(20_000)), []
    for _ in range(40):
        one, other = torch.randn(2, 20_000, dtype=torch.float64)
        other = other.pow(3) if heavy else other
        near = squared_distance(sketch(one, made).tolist(), sketch(other, made).tolist())
        ratios.append(near / float((one - other).square().sum()))
    ratios = torch.tensor(ratios)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.06)
    assert 0.06 < float(ratios.std()) < 0.25


def test_signs_do_not_follow_the_columns_of_a_matrix():
    """All of one column, or of one row, is a vector like any other."""
    made = make_sketch(torch.arange(256 * 127))
    for place in (0, 5):
        for chosen in (torch.arange(256) * 127 + place, torch.arange(127) + 127 * place):
            values = torch.zeros(256 * 127)
            values[chosen] = 1.0
            length = float(sketch(values, made).square().sum()) / len(chosen)
            assert length < 12  # unsigned it would be 256 for the column, all of it in one sum


# The update ---------------------------------------------------------------------------------------------------------


def test_the_update_is_its_definition():
    grad, v = torch.randn(300), torch.rand(300)
    made = make_sketch(torch.arange(300))
    fourth, count, squares, total, *sums = drift_update(grad, v, made).tolist()
    assert (fourth, count) == (pytest.approx(float((grad**4 / v).sum()), rel=1e-5), 300)
    assert (squares, total) == (pytest.approx(float((grad**2).sum())), pytest.approx(float(v.sum())))
    assert sums == pytest.approx(by_loop(v.sqrt(), torch.arange(300)), rel=1e-4, abs=1e-5)
    assert len(sums) + 4 == statistic_size("drift")
    assert len(statistic_update(grad, v, "l2")) == statistic_size("l2")


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-20, 1.0, 2.0**20, 2.0**50])
def test_the_update_scales_exactly_and_neither_underflows_nor_overflows(scale):
    grad, v = torch.randn(300), torch.rand(300)
    made = make_sketch(torch.arange(300))
    one, other = drift_update(grad, v, made), drift_update(grad * scale, v * scale**2, made)
    factors = torch.cat([torch.tensor([scale**2, 1, scale**2, scale**2]), torch.full((WIDTH,), scale)])
    assert torch.equal(other, one * factors)


def test_coordinates_without_a_second_moment_count_for_nothing():
    made = make_sketch(torch.arange(4))
    some = drift_update(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]), made)
    assert torch.isfinite(some).all()
    assert some[:4].tolist() == [17, 4, 5, 2]
    assert torch.equal(drift_update(torch.zeros(4), torch.zeros(4), made)[4:], torch.zeros(WIDTH))


# The theory ---------------------------------------------------------------------------------------------------------


def simulate(beta2, steps, lag, size=lambda t: 1.0, draw=torch.randn, coordinates=3000):
    """Observed drift of the root of v over what it should be at rest, from copies of v, at every step."""
    scales = torch.randn(coordinates).exp().double()
    made = make_sketch(torch.arange(coordinates))
    v, roots, noise, ratios = torch.zeros(coordinates, dtype=torch.float64), {}, {}, {}
    for t in range(1, steps + 1):
        grad = draw(coordinates).double() * scales * size(t)
        v = beta2 * v + (1 - beta2) * grad**2
        fourth, _, squares, total = drift_update(grad, v, made)[:4].tolist()
        noise[t] = drift_noise(fourth, squares, total, t, beta2)
        roots[t] = (v / (1 - beta2**t)).sqrt()
        if t > lag:
            sums = [math.fsum(noise[s][i] for s in range(t - lag + 1, t + 1)) for i in (0, 1)]
            moved = float((roots[t] - roots[t - lag]).square().sum())
            ratios[t] = moved / (sums[0] / sums[1] * expected_drift(t, lag, beta2))
    return ratios


def laplace(count):
    return torch.distributions.Laplace(0.0, 1.0).sample((count,))


@pytest.mark.parametrize("draw", [torch.randn, laplace])
@pytest.mark.parametrize(("beta2", "lag"), [(0.99, 100), (0.98, 20), (0.99, 300)])
def test_at_rest_the_ratio_is_about_one_from_the_first_step_it_is_known(draw, beta2, lag):
    ratios = simulate(beta2, lag + 300, lag, draw=draw)
    late = [ratio for t, ratio in ratios.items() if t > lag + 60]
    assert sum(late) / len(late) == pytest.approx(1, abs=0.25)
    assert all(0.4 < ratio < 2.2 for t, ratio in ratios.items() if t > lag + 20)


def test_the_ratio_tells_drift_from_noise():
    """Gradients that shrink to a half over one lag, and those that shrink by a twentieth."""
    fast = simulate(0.99, 400, 100, size=lambda t: 0.5 ** (t / 100))
    slow = simulate(0.99, 400, 100, size=lambda t: 0.95 ** (t / 100))
    assert min(ratio for t, ratio in fast.items() if t > 150) > 8
    assert max(ratio for t, ratio in slow.items() if t > 150) < 3


def test_the_factor_is_the_variance_of_a_difference_of_weighted_means():
    """Written out as weights on independent draws."""
    for beta2, t, lag in ((0.9, 1, 0), (0.9, 5, 3), (0.99, 150, 100), (0.5, 40, 1)):

        def weights(steps, beta2=beta2, t=t):
            raw = [(1 - beta2) * beta2 ** (steps - s) if s <= steps else 0.0 for s in range(1, t + 1)]
            return [w / sum(raw) for w in raw]

        late, early = weights(t), weights(t - lag)
        assert expected_drift(t, lag, beta2) == pytest.approx(
            sum((a - b) ** 2 for a, b in zip(late, early, strict=True)), rel=1e-9, abs=1e-12
        )


def test_a_gradient_that_never_changes_has_no_noise():
    v, grad = torch.zeros(5), torch.arange(1.0, 6.0)
    for t in range(1, 30):
        v = 0.9 * v + 0.1 * grad**2
        fourth, _, squares, total = drift_update(grad, v, make_sketch(torch.arange(5)))[:4].tolist()
        assert drift_noise(fourth, squares, total, t, 0.9)[0] == pytest.approx(0, abs=1e-5 * total)
