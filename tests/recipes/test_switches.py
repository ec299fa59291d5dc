"""Every switch against brute force over copies of Adam's second moment."""

import math
import re

import pytest
import torch
from torch.optim import Adam, AdamW, NAdam, RAdam

from lightning_step import STEP, AtStep, AutoSwitch, RelativeNorm, Sparsifier, Staleness
from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.recipes import Clock

STEPS = 30
MASKED = ("0.weight", "2.weight")
ADAMS = {
    "AdamW": lambda model: AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.8), weight_decay=0.3),
    "Adam": lambda model: Adam(model.parameters(), lr=0.02, betas=(0.9, 0.8), weight_decay=0.3, maximize=False),
    "two groups": lambda model: AdamW(
        [{"params": model[0].parameters(), "betas": (0.9, 0.6)}, {"params": model[2].parameters()}],
        lr=0.02,
        betas=(0.9, 0.9),
    ),
}


def masked_second_moments(model, adam):
    return torch.cat([adam.state[p]["exp_avg_sq"].flatten() for name, p in model.named_parameters() if name in MASKED])


def scale(t):
    """Of the loss: v first falls and then rises, so that every criterion is met at some steps and not at others."""
    return 0.7 ** min(t, 14) * 1.6 ** max(0, t - 14)


@pytest.fixture
def copies(net, train):
    """v of all masked coordinates before the first step and after each: copied from a run without a sparsifier."""

    def copies(make_adam):
        model = net()
        adam = make_adam(model)
        v = [torch.zeros(16 * 8 + 4 * 16, dtype=torch.float64)]
        for t in range(STEPS):
            train(model, adam, t + 1, t, scale)
            v.append(masked_second_moments(model, adam))
        return v

    return copies


def arithmetic(v, t, window):
    return sum((v[s] - v[s - 1]).abs().mean().item() for s in range(t - window + 1, t + 1)) / window if t >= window else None


def geometric(v, t, window):
    logs = [(v[s] - v[s - 1]).abs().log().mean().exp().item() for s in range(t - window + 1, t + 1) if t >= window]
    return sum(logs) / window if t >= window else None


def relative_norm(v, t, window):
    return abs(v[t].norm().item() / v[t - 1].norm().item() - 1) if t >= 2 else None


def staleness(v, t, window):
    return v[t].sum().item() / v[t - window].sum().item() if t > window else None


def corrected(v, make_adam, net):
    """v without its bias, which the group with the longest memory sets: a weighted mean over the steps so far."""
    beta2 = max(group["betas"][1] for group in make_adam(net()).param_groups)
    return [v[0], *(v[t] / ((1 - beta2) * sum(beta2**i for i in range(t))) for t in range(1, len(v)))]


CRITERIA = {  # the criterion by brute force, whether it fires below or above, and the switch
    "arithmetic": (arithmetic, 1, lambda x, w, lo, hi: AutoSwitch("arithmetic", w, x, lo, hi), "window mean below"),
    "geometric": (geometric, 1, lambda x, w, lo, hi: AutoSwitch("geometric", w, x, lo, hi), "window mean below"),
    "relative norm": (relative_norm, 1, lambda x, w, lo, hi: RelativeNorm(x, lo, hi), "relative norm change below"),
    "staleness": (staleness, -1, lambda x, w, lo, hi: Staleness(x, w, lo, hi), "norm ratio above"),
}


def thresholds(values):
    """Halfway between neighbouring observed values, from one that is crossed by few to one crossed by most."""
    ordered = sorted(value for value in values if value is not None)
    return [(ordered[i - 1] + ordered[i]) / 2 for i in (1, len(ordered) // 3, 2 * len(ordered) // 3, len(ordered) - 1)]


@pytest.mark.parametrize(("read_every", "t_min", "window"), [(1, 0, 4), (1, 9, 1), (3, 5, 2), (7, 0, 3), (50, 0, 3)])
@pytest.mark.parametrize("make_adam", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_it_fires_where_brute_force_says(net, train, copies, criterion, make_adam, read_every, t_min, window):
    brute_force, sign, make_switch, rule = CRITERIA[criterion]
    v, t_max = copies(make_adam), STEPS - 1
    v = corrected(v, make_adam, net) if criterion == "staleness" else v
    values = [brute_force(v, t, window) for t in range(1, STEPS)]
    for threshold in thresholds(values):
        met = [t for t, x in enumerate(values, 1) if x is not None and sign * x < sign * threshold]
        fires = next((t for t in met if t >= t_min and t % read_every == 0), t_max)
        model = net()
        stock = make_adam(model)
        switch = make_switch(threshold, window, t_min, t_max)
        sparsifier = Sparsifier(model, stock, recipe=STEP(switch, masks_from=AtStep(STEPS)), read_every=read_every)
        for t in range(fires):
            assert sparsifier.events == []
            if window > 1:
                sparsifier.state_dict()  # reads the samples early, which must not matter
            train(model, stock, t + 1, t, scale)
        (event,) = sparsifier.events
        reason = f"{rule} threshold" if fires in met else "t_max reached"
        assert (event.step, event.rule, event.freeze, event.masks) == (fires, reason, True, False)
        value, against, setting = re.fullmatch(r"(\S+) against (\S+) \((.*)\)", event.numbers).groups()
        assert float(value) == pytest.approx(values[fires - 1], rel=6e-3)
        assert against == f"{threshold:.3g}"
        detail = "one step" if criterion == "relative norm" else f"T_w = {window}"
        assert setting == f"{detail}, T_min = {t_min}, T_max = {t_max}"


def test_the_thresholds_above_are_met_early_late_and_not_at_once(copies):
    v = copies(ADAMS["AdamW"])
    for brute_force, sign, _, _ in CRITERIA.values():
        values = [brute_force(v, t, 3) for t in range(1, STEPS)]
        first = [
            next(t for t, x in enumerate(values) if x is not None and sign * x < sign * threshold)
            for threshold in thresholds(values)
        ]
        assert len(set(first)) > 1


@pytest.mark.parametrize("make_adam", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("masks_from", [AtStep(0), AtStep(6), AtStep(99)], ids=str)
def test_the_gauges_are_the_newest_sample_and_the_window_mean(net, train, make_adam, masks_from):
    model, v = net(), [torch.zeros(192, dtype=torch.float64)]
    stock = make_adam(model)
    recipe = STEP(AutoSwitch(window=4, threshold=1e-30, t_max=99, t_min=0), masks_from=masks_from, lam=5.0)
    sparsifier = Sparsifier(model, stock, recipe=recipe, read_every=1)
    for t in range(1, 12):
        train(model, stock, t, t - 1, scale)
        v.append(masked_second_moments(model, stock))
        expected = {"variance_change": arithmetic(v, t, 1), "window_mean": arithmetic(v, t, 4), "threshold": 1e-30}
        known = {name: value for name, value in expected.items() if value is not None}
        assert sparsifier.gauges() == pytest.approx({"phase": float(sparsifier.phase), **known}, rel=1e-5)


@pytest.mark.parametrize("make_adam", [Adam, AdamW, NAdam, RAdam])
@pytest.mark.parametrize(("window", "beta2"), [(5, 0.999), (20, 0.99)])
def test_staleness_does_not_take_the_warm_up_of_v_for_its_rest(net, train, make_adam, window, beta2):
    """Gradients that shrink by a tenth a step: the corrected v falls all the while, but the raw one first rises."""
    model = net()
    stock = make_adam(model.parameters(), lr=1e-9, betas=(0.9, beta2))
    sparsifier = Sparsifier(model, stock, recipe=STEP(Staleness(window=window, t_max=60)), read_every=1)
    raw = []
    for t in range(60):
        train(model, stock, t + 1, t, lambda t: 0.9**t)
        raw.append(masked_second_moments(model, stock).sum().item())
    assert raw[window] / raw[0] > 0.96, "uncorrected it would fire as soon as its window is full"
    (event,) = sparsifier.events
    assert (event.step, event.rule) == (60, "t_max reached")


# Defaults and limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [AutoSwitch(t_min=0, t_max=40), Staleness(threshold=9.0, t_max=40)])
def test_window_and_threshold_come_from_the_group_with_the_longest_memory(net, train, switch):
    model = net()
    groups = [
        {"params": model[0].parameters(), "betas": (0.9, 0.9), "eps": 1e-20},
        {"params": model[2].parameters(), "betas": (0.9, 0.95), "eps": 1e-16},
    ]
    stock = AdamW(groups, lr=0.02)
    sparsifier = Sparsifier(model, stock, recipe=STEP(switch))
    assert sparsifier.gauges()["threshold"] == (1e-20 if isinstance(switch, AutoSwitch) else 9.0)
    train(model, stock, 40)
    (event,) = sparsifier.events
    assert event.rule == "t_max reached"
    assert "(T_w = 20, T_min = 0, T_max = 40)" in event.numbers


@pytest.mark.parametrize(
    ("switch", "total_steps", "limits"),
    [
        (AtStep(7), None, (7, 7)),
        (AtStep(0.25), 400, (100, 100)),
        (AtStep(1), 400, (1, 1)),
        (AtStep(1.0), 400, (400, 400)),
        (AutoSwitch(), 1000, (100, 500)),
        (AutoSwitch(t_min=3, t_max=0.5), 10, (3, 5)),
        (AutoSwitch(t_min=0.5, t_max=5), 10, (5, 5)),
        (AutoSwitch(t_min=10, t_max=20), None, (10, 20)),
        (RelativeNorm(), 10, (0, 5)),
        (Staleness(t_max=8), None, (0, 8)),
    ],
    ids=str,
)
def test_whole_numbers_are_steps_and_floats_are_fractions(switch, total_steps, limits):
    watcher = switch.start(Clock(total_steps, beta2=0.999, eps=1e-8))
    assert (watcher.t_min, watcher.t_max) == limits


@pytest.mark.parametrize(
    ("switch", "name", "value"),
    [
        (AtStep(0.5), "step", 0.5),
        (AutoSwitch(t_max=9), "t_min", 0.1),
        (RelativeNorm(), "t_max", 0.5),
        (Staleness(), "t_max", 0.5),
    ],
    ids=str,
)
def test_a_fraction_of_an_unlimited_run_is_refused(switch, name, value):
    message = rf"because {name}={value} is a fraction of it, but got an unlimited run \(max_steps=-1\), or one under "
    message += rf"manual .* Set max_steps or max_epochs; under manual .* pass `total_steps`, .*; or give {name} as a whole"
    with pytest.raises(ConfigurationError, match=message):
        switch.start(Clock(None, beta2=0.999, eps=1e-8))


SWITCHES_WITH_LIMITS = [AutoSwitch, RelativeNorm, Staleness]
LIMITS = [(AtStep, "step"), *((switch, name) for switch in SWITCHES_WITH_LIMITS for name in ("t_min", "t_max"))]


@pytest.mark.parametrize("switch", SWITCHES_WITH_LIMITS)
@pytest.mark.parametrize(("t_min", "t_max"), [(6, 5), (0.6, 0.5)])
def test_limits_of_one_kind_are_compared_at_construction(switch, t_min, t_max):
    with pytest.raises(ConfigurationError, match=f"^Expected `t_min` <= `t_max`, but got t_min={t_min} and t_max={t_max}"):
        switch(t_min=t_min, t_max=t_max)


@pytest.mark.parametrize("switch", SWITCHES_WITH_LIMITS)
@pytest.mark.parametrize(("t_min", "t_max", "low", "high"), [(6, 0.5, 6, 5), (0.6, 5, 6, 5)])
def test_limits_of_two_kinds_are_compared_at_the_start(switch, t_min, t_max, low, high):
    mixed = switch(t_min=t_min, t_max=t_max)
    message = rf"t_min={t_min} \(step {low}\) and t_max={t_max} \(step {high}\) in a run of 10 optimizer steps"
    with pytest.raises(ConfigurationError, match=message):
        mixed.start(Clock(10, beta2=0.9, eps=1e-8))
    assert mixed.start(Clock(100 if t_max == 0.5 else 5, beta2=0.9, eps=1e-8)).t_max in (50, 5)


@pytest.mark.parametrize("value", ["10", None, True, 1 + 0j])
@pytest.mark.parametrize(("switch", "name"), LIMITS)
def test_limits_that_are_no_numbers(switch, name, value):
    with pytest.raises(
        ArgumentTypeError, match=rf"^Expected `{name}` to be an integer .* but got {re.escape(repr(value))}\.$"
    ):
        switch(**{name: value})


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, math.inf, math.nan])
@pytest.mark.parametrize(("switch", "name"), LIMITS)
def test_limits_out_of_range(switch, name, value):
    with pytest.raises(ConfigurationError, match=rf"^Expected `{name}` to be a step >= 0 .* but got {value}\.$"):
        switch(**{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoSwitch("median"), "^Expected `mean` to be 'arithmetic' or 'geometric', but got 'median'"),
        (lambda: AutoSwitch(window=0), r"^Expected `window` to be an integer >= 1 \(optimizer steps\), but got 0"),
        (lambda: AutoSwitch(window=2.5), "^Expected `window` to be an integer >= 1 .* but got 2.5"),
        (lambda: Staleness(window=0), "^Expected `window` to be an integer >= 1 .* but got 0"),
        (lambda: Staleness(window="9"), "^Expected `window` to be an integer >= 1 .* but got '9'"),
        (lambda: AutoSwitch(threshold=0.0), "^Expected `threshold` > 0, but got 0.0"),
        (lambda: AutoSwitch(threshold=math.nan), "^Expected `threshold` > 0, but got nan"),
        (lambda: RelativeNorm(threshold=-1), "^Expected `threshold` > 0, but got -1"),
        (lambda: Staleness(threshold=0), "^Expected `threshold` > 0, but got 0"),
    ],
)
def test_other_arguments_out_of_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
