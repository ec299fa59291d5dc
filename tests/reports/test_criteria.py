"""The steps are those at which the package's own watchers decide on the same samples."""

from __future__ import annotations

import math
import random

import pytest

from lightning_step.figures import Curve
from lightning_step.recipes import AutoSwitch, Clock, RelativeNorm, Staleness, Switch
from lightning_step.reports.criteria import (
    MAX_STEPS,
    Firing,
    Limits,
    Samples,
    relative_norm_firing,
    staleness_firing,
    window_firing,
)


def norms(seed: int, beta2: float, steps: int) -> tuple[list[float], list[float]]:
    """L1 and L2 norms of a second moment fed with random gradients, which now and then burst."""
    rng = random.Random(seed)
    sizes = rng.choice([[1.0], [0.01, 1.0, 30.0]])
    v, l1, l2 = [0.0] * 4, [], []
    for _ in range(steps):
        v = [beta2 * each + (1 - beta2) * rng.gauss(0, rng.choice(sizes)) ** 2 for each in v]
        l1.append(sum(v) / 4)
        l2.append(math.sqrt(sum(each * each for each in v) / 4))
    return l1, l2


def decided(switch: Switch, samples: list[float], beta2: float) -> tuple[int, bool]:
    """When the package's own watcher fires, asked after every step, and whether T_max made it."""
    watcher = switch.start(Clock(len(samples), beta2, 1e-8))
    for t, sample in enumerate(samples, 1):
        watcher.observe(sample)
        decision = watcher.decide(t)
        if decision is not None:
            return t, decision.rule == "t_max reached"
    raise AssertionError("a watcher fires at t_max")


def computed(switch: RelativeNorm | Staleness, samples: list[float], beta2: float, every: int) -> Firing:
    steps = tuple(range(every, len(samples) + 1, every))
    logged = Samples(Curve(steps, tuple(samples[step - 1] for step in steps)), beta2)
    watcher = switch.start(Clock(len(samples), beta2, 1e-8))
    limits = Limits(watcher.t_min, watcher.t_max, len(samples))
    if isinstance(switch, RelativeNorm):
        return relative_norm_firing(logged, switch.threshold, limits)
    return staleness_firing(logged, switch.window or round(1 / (1 - beta2)), switch.threshold, limits)


SWITCHES = [
    RelativeNorm(),
    RelativeNorm(0.05, t_min=7, t_max=0.9),
    RelativeNorm(0.9),
    Staleness(),
    Staleness(1.1, window=3, t_min=9),
    Staleness(0.5, window=7, t_max=0.9),
    Staleness(4.0),
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.97])
def test_of_a_log_of_every_step_the_very_step_is_found(switch: RelativeNorm | Staleness, beta2: float) -> None:
    forced = 0
    for seed in range(20):
        samples = norms(seed, beta2, 20 + 5 * seed)[isinstance(switch, RelativeNorm)]
        step, by_t_max = decided(switch, samples, beta2)
        firing = computed(switch, samples, beta2, 1)
        assert (firing.latest, firing.forced) == (step, by_t_max)
        assert by_t_max or firing.earliest == step
        forced += by_t_max
    assert forced < 20 or (isinstance(switch, Staleness) and switch.threshold > 1), "mostly the criterion itself fires"


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("every", [2, 5, 10])
def test_of_a_thin_log_the_step_lies_between_the_bounds(switch: RelativeNorm | Staleness, every: int) -> None:
    for seed in range(40):
        samples = norms(seed, 0.9, 60 + 5 * seed)[isinstance(switch, RelativeNorm)]
        step, by_t_max = decided(switch, samples, 0.9)
        firing = computed(switch, samples, 0.9, every)
        assert firing.latest is not None
        assert step <= firing.latest
        assert by_t_max or (firing.earliest is not None and firing.earliest <= step)


def test_at_the_usual_settings_a_thin_log_says_nearly_as_much() -> None:
    late, soon = [], []
    for seed in range(10):
        l1, l2 = norms(seed, 0.99, 400)
        first = computed(RelativeNorm(), l2, 0.99, 10)
        exact, thin = (computed(Staleness(), l1, 0.99, every) for every in (1, 2))
        assert first.latest is not None
        assert exact.latest is not None
        assert thin.latest is not None
        soon.append(first.latest)
        late.append(thin.latest - exact.latest)
    assert sorted(late)[5] <= 2
    assert sorted(soon)[5] <= 31


def test_the_window_mean_is_judged_where_it_was_logged() -> None:
    rng = random.Random(0)
    samples = [rng.uniform(0, 2) / (1 + 0.02 * t) for t in range(200)]
    switch = AutoSwitch(window=10, threshold=0.7, t_min=20, t_max=0.9)
    step, forced = decided(switch, samples, 0.9)
    means = [math.fsum(samples[t - 10 : t]) / 10 for t in range(10, 201)]
    firing = window_firing(Curve(tuple(range(10, 201)), tuple(means)), 0.7, Limits(20, 180, 200))
    assert not forced
    assert firing == Firing(step, step)
    thin = window_firing(Curve(tuple(range(10, 201, 10)), tuple(means[::10])), 0.7, Limits(20, 180, 200))
    assert thin.latest is not None
    assert step <= thin.latest


def test_nothing_is_claimed_beyond_what_is_known() -> None:
    still, none = Samples(Curve((10, 20), (1.0, 1.0)), 0.9), Samples(Curve((), ()), 0.9)
    assert (
        str(relative_norm_firing(none, 0.5, Limits(0, 50, 40))) == "not before step 2; the log does not tell whether later"
    )
    assert staleness_firing(still, 30, 0.96, Limits(0, 50, 20)) == Firing(None, None)
    assert str(staleness_firing(still, 30, 0.96, Limits(0, 20, 20))) == "step 20 (T_max)"
    assert str(window_firing(Curve((), ()), 1.0, Limits(0, 50, 20))) == "not as far as the log tells"
    huge = Limits(0, MAX_STEPS + 10, MAX_STEPS + 10)
    assert relative_norm_firing(none, 0.5, huge).latest is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_value_that_no_norm_has_is_passed_over(bad: float) -> None:
    with_it = Samples(Curve((1, 2, 3), (1.0, bad, 1.0)), 0.9)
    without = Samples(Curve((1, 3), (1.0, 1.0)), 0.9)
    limits = Limits(0, 3, 3)
    assert relative_norm_firing(with_it, 0.5, limits) == relative_norm_firing(without, 0.5, limits)
