"""The change of v and its statistics against clones of v from torch.optim.Adam and loops over numbers."""

import math

import pytest
import torch

from lightning_step.errors import ConfigurationError
from lightning_step.functional import second_moment_change, statistic_compute, statistic_update, window_length, window_mean

STATISTICS = ["arithmetic", "geometric", "l1", "l2"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments_of_adam(steps, beta2, **settings):
    """Run torch's Adam and yield effective gradient, v before and v after every step."""
    parameter = torch.nn.Parameter(normal(4, 8))
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, beta2), **settings)
    v = torch.zeros(4, 8, dtype=torch.float64)
    for t in range(steps):
        parameter.grad = normal(4, 8, seed=t + 1)
        effective = parameter.grad + settings.get("weight_decay", 0.0) * parameter.detach()
        optimizer.step()
        before, v = v, optimizer.state[parameter]["exp_avg_sq"].clone()
        yield effective, before, v


def value_by_loop(change, v, statistic):
    changes, moments = change.flatten().tolist(), v.flatten().tolist()
    if statistic == "arithmetic":
        return math.fsum(abs(x) for x in changes) / len(changes)
    if statistic == "geometric":
        moved = [abs(x) for x in changes if x != 0]
        return math.exp(math.fsum(math.log(x) for x in moved) / len(moved))
    if statistic == "l1":
        return math.fsum(abs(x) for x in moments) / len(moments)
    return math.sqrt(math.fsum(x * x for x in moments) / len(moments))


def value(change, v, statistic):
    return statistic_compute(*statistic_update(change, v, statistic).tolist(), statistic)


@pytest.mark.parametrize("beta2", [0.999, 0.9, 0.5])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}], ids=["plain", "coupled_decay"])
def test_change_is_the_difference_of_two_clones_of_v(beta2, settings):
    for grad, before, after in moments_of_adam(50, beta2, **settings):
        change = second_moment_change(grad, before, beta2)
        torch.testing.assert_close(change, after - before, rtol=1e-12, atol=1e-15 * after.max().item())


def test_change_takes_beta2_as_a_tensor():
    change = second_moment_change(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor(0.75))
    assert change.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_change_keeps_dtype_and_inputs(dtype):
    grad, v = normal(4).to(dtype), normal(4, seed=1).abs().to(dtype)
    before = grad.clone(), v.clone()
    assert second_moment_change(grad, v, 0.9).dtype == dtype
    assert torch.equal(grad, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_of_a_run_of_adam(statistic):
    for _, before, after in moments_of_adam(20, 0.99):
        expected = value_by_loop(after - before, after, statistic)
        assert value(after - before, after, statistic) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("parts", [[1, 299], [100, 100, 100], [7, 1, 200, 92]])
def test_updates_add_up_over_any_split(statistic, parts):
    change, v = normal(300) / 100, normal(300, seed=1).square()
    change[::7] = 0
    pieces = zip(change.split(parts), v.split(parts), strict=True)
    total = sum(statistic_update(c, x, statistic) for c, x in pieces)
    whole = statistic_update(change, v, statistic)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0)
    assert statistic_compute(*total.tolist(), statistic) == pytest.approx(value_by_loop(change, v, statistic), rel=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_update_is_two_float32_numbers(statistic):
    pair = statistic_update(normal(4, 8, dtype=torch.bfloat16), normal(4, 8, dtype=torch.bfloat16), statistic)
    assert (pair.shape, pair.dtype) == ((2,), torch.float32)
    assert pair[1] == 32


def test_geometric_mean_leaves_out_coordinates_that_did_not_move():
    change = torch.tensor([0.0, 1e-4, -0.0, -1e-8])
    assert statistic_update(change, change, "geometric")[1] == 2
    assert value(change, change, "geometric") == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_change_at_all_is_zero(statistic):
    assert value(torch.zeros(3), torch.zeros(3), statistic) == 0.0


def test_a_subnormal_change_counts_as_the_smallest_normal_number():
    change = torch.tensor([1e-44, -1e-40])  # some devices flush these to zero, whose logarithm is not finite
    assert statistic_update(change, change, "geometric")[1] == 2
    assert value(change, change, "geometric") == pytest.approx(torch.finfo(torch.float32).tiny, rel=1e-5, abs=0)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows(statistic, bad):
    tensor = torch.tensor([bad, 1.0])
    assert not math.isfinite(value(tensor, tensor, statistic))


@pytest.mark.parametrize(
    ("statistic", "total", "count", "expected"),
    [
        ("arithmetic", 6.0, 4.0, 1.5),
        ("geometric", math.log(8.0), 3.0, 2.0),
        ("geometric", 800.0, 1.0, math.inf),
        ("l1", 6.0, 4.0, 1.5),
        ("l2", 36.0, 4.0, 3.0),
        ("arithmetic", 0.0, 0.0, 0.0),
        ("geometric", 0.0, 0.0, 0.0),
    ],
)
def test_compute(statistic, total, count, expected):
    assert statistic_compute(total, count, statistic) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("beta2", "length"), [(0.999, 1000), (0.99, 100), (0.9999, 10000), (0.95, 20), (0.9, 10), (0.5, 2), (0.0, 1)]
)
def test_window_length_rounds(beta2, length):
    assert window_length(beta2) == length


@pytest.mark.parametrize("beta2", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_window_length_needs_a_decay_below_one(beta2):
    with pytest.raises(ConfigurationError, match=rf"^Expected 0 <= beta2 < 1, but got {beta2}\. Give the optimizer"):
        window_length(beta2)


def test_window_mean_waits_until_the_window_is_full():
    samples = [float(i * i) for i in range(8)]
    means = [window_mean(samples[:count], 3) for count in range(9)]
    assert means[:3] == [None, None, None]
    assert means[3:] == [(samples[i] + samples[i - 1] + samples[i - 2]) / 3 for i in range(2, 8)]


def test_window_mean_is_rounded_once():
    assert window_mean([1e16, 1.0, -1e16], 3) == 1 / 3
    assert window_mean([5.0, 0.1, 0.2, 0.3], 3) == window_mean([0.3, 0.2, 0.1], 3)


@pytest.mark.parametrize("scale", [1e-3, 2.0])
def test_samples_of_gaussian_gradients_are_of_the_size_the_theory_gives(scale):
    beta2, size = 0.999, 4000
    generator = torch.Generator().manual_seed(0)
    v = torch.full((size,), scale**2, dtype=torch.float64)
    samples = {"arithmetic": [], "geometric": []}
    for t in range(2000):
        grad = scale * torch.randn(size, generator=generator, dtype=torch.float64)
        change = second_moment_change(grad, v, beta2)
        v += change
        for statistic, values in samples.items() if t >= 1900 else ():
            values.append(value(change, v, statistic))
    unit = (1 - beta2) * scale**2
    assert window_mean(samples["arithmetic"], 100) == pytest.approx(0.968 * unit, rel=0.02)
    assert window_mean(samples["geometric"], 100) == pytest.approx(0.659 * unit, rel=0.02)
