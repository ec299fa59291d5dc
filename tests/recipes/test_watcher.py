"""A watcher on its own, against decisions worked out from the list of all samples."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_step import AtStep, AutoSwitch, RelativeNorm, Staleness
from lightning_step.errors import ConfigurationError
from lightning_step.recipes import Clock, Decision, Reading, Watcher

CLOCK = Clock(100, beta2=0.9, eps=1e-8)
SAMPLES = st.lists(st.integers(1, 1600).map(lambda i: i / 16), min_size=1, max_size=30)  # their sums are exact


def arithmetic_is_below(samples, window, threshold):
    return len(samples) >= window and sum(samples[-window:]) / window < threshold


def change_is_below(samples, window, threshold):
    return len(samples) >= 2 and abs(samples[-1] - samples[-2]) / samples[-2] < threshold


def ratio_is_above(samples, window, threshold):
    return len(samples) > window and samples[-1] / samples[-1 - window] >= threshold


CRITERIA = {
    "AutoSwitch": (arithmetic_is_below, lambda w, x, lo, hi: AutoSwitch("geometric", w, x, lo, hi)),
    "RelativeNorm": (change_is_below, lambda w, x, lo, hi: RelativeNorm(x, lo, hi)),
    "Staleness": (ratio_is_above, lambda w, x, lo, hi: Staleness(x, w, lo, hi)),
}


@pytest.mark.parametrize(("fires", "make_switch"), CRITERIA.values(), ids=CRITERIA)
@given(SAMPLES, st.integers(1, 6), st.floats(0.0625, 64.0), st.integers(0, 35), st.integers(0, 35))
@settings(max_examples=100, deadline=None)
def test_decisions_follow_from_the_samples(fires, make_switch, samples, window, threshold, limit, other):
    t_min, t_max = sorted((limit, other))
    watcher = make_switch(window, threshold, t_min, t_max).start(Clock())
    for t, sample in enumerate(samples, 1):
        watcher.observe(sample)
        fired = fires(samples[:t], window, threshold)
        decision = watcher.decide(t)
        assert (decision is not None) == (t >= t_min and (fired or t >= t_max))
        if decision is not None:
            assert decision.step == t
            assert (decision.rule == "t_max reached") == (not fired)


@pytest.mark.parametrize("make_switch", [make for _, make in CRITERIA.values()], ids=CRITERIA)
@given(SAMPLES, st.integers(1, 6), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_a_restored_watcher_decides_as_the_undisturbed_one(make_switch, samples, window, crash):
    switch = make_switch(window, 1.0, 0, 99)
    undisturbed, restored = switch.start(CLOCK), switch.start(CLOCK)
    for sample in samples[:crash]:
        undisturbed.observe(sample)
    restored.load_state_dict(json.loads(json.dumps(undisturbed.state_dict())))
    for t, sample in enumerate(samples[crash:], crash + 1):
        undisturbed.observe(sample)
        restored.observe(sample)
        assert restored.decide(t) == undisturbed.decide(t)
    assert restored.gauges() == undisturbed.gauges()
    assert restored.state_dict() == undisturbed.state_dict()


@pytest.mark.parametrize(
    ("switch", "statistic", "keep"),
    [
        (AtStep(3), None, 0),
        (AutoSwitch(window=5), "arithmetic", 5),
        (AutoSwitch("geometric"), "geometric", 10),
        (RelativeNorm(), "l2", 2),
        (Staleness(window=5), "l1", 6),
        (Staleness(), "l1", 11),
    ],
    ids=str,
)
def test_it_keeps_the_newest_samples_it_needs_and_no_more(switch, statistic, keep):
    watcher = switch.start(CLOCK)
    assert (watcher.statistic, watcher.keep) == (statistic, keep)
    for sample in range(50):
        watcher.observe(sample)
    grown = [1 - CLOCK.beta2 ** (i + 1) if statistic == "l1" else 1 for i in range(50)]  # the bias of v
    samples = [i / grown[i] for i in range(50 - keep, 50)]
    assert watcher.state_dict() == {"samples": pytest.approx(samples, rel=1e-12), "taken": 50}


@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999])
def test_the_default_window_is_the_memory_of_v(beta2):
    expected = round(1 / (1 - beta2), 3)  # 1/(1-.999) is 999.9999999999991 in floating point
    assert AutoSwitch().start(Clock(9, beta2=beta2, eps=1e-8)).keep == expected
    assert Staleness().start(Clock(9, beta2=beta2)).keep == expected + 1


@pytest.mark.parametrize(
    ("switch", "clock", "argument"),
    [
        (AutoSwitch(threshold=1.0), Clock(9), "window"),
        (AutoSwitch(window=9), Clock(9), "threshold"),
        (Staleness(), Clock(9), "window"),
    ],
    ids=str,
)
def test_a_default_that_needs_beta2_or_eps_is_refused_without(switch, clock, argument):
    message = rf"from which `{argument}` takes its default, but got one without\. Give the switch its `{argument}`\.$"
    with pytest.raises(ConfigurationError, match=message):
        switch.start(clock)


def test_switches_with_all_arguments_need_no_second_moment():
    for switch in (AtStep(3), AutoSwitch(window=2, threshold=1.0), RelativeNorm(), Staleness(window=2)):
        assert switch.start(Clock(10)).decide(10) is not None


def test_a_fixed_step_says_so_and_never_comes_early_or_late():
    watcher = AtStep(3).start(Clock())
    assert [watcher.decide(t) for t in (0, 1, 2)] == [None] * 3
    assert watcher.decide(3) == Decision(3, "fixed step reached", "step 3")
    assert watcher.decide(5) == Decision(5, "fixed step reached", "step 3")  # what could not begin at 3
    assert watcher.gauges() == {}


def test_gauges_appear_one_by_one():
    watcher = AutoSwitch(window=2, threshold=0.5).start(CLOCK)
    assert watcher.gauges() == {"threshold": 0.5}
    watcher.observe(3.0)
    assert watcher.gauges() == {"threshold": 0.5, "variance_change": 3.0}
    watcher.observe(1.0)
    assert watcher.gauges() == {"threshold": 0.5, "variance_change": 1.0, "window_mean": 2.0}


@pytest.mark.parametrize("switch", [RelativeNorm(t_max=9), Staleness(window=1, t_max=9)], ids=str)
def test_a_second_moment_of_zeros_is_no_evidence(switch):
    watcher = switch.start(Clock())
    for _ in range(3):
        watcher.observe(0.0)
    assert watcher.decide(3) is None
    assert watcher.decide(9).rule == "t_max reached"


def test_a_rule_of_ones_own():
    def rule(samples):
        return Reading(math.fsum(samples) > 5, math.fsum(samples), 5.0, "much seen", "all of it")

    watcher = Watcher("l1", 3, rule, t_min=0, t_max=100)
    for t, sample in enumerate([9.0, 1.0, 1.0], 1):
        watcher.observe(sample)
        assert watcher.decide(t) == Decision(
            t, "much seen", f"{sum([9.0, 1.0, 1.0][:t]):.3g} against 5 (all of it, T_min = 0, T_max = 100)"
        )
    watcher.observe(1.0)  # the 9 is forgotten
    assert watcher.decide(4) is None
