"""The switch by drift against copies of v, and on losses of every scale, beside AutoSwitch."""

import functools
import json
import math

import pytest
import torch
from torch.optim import Adam, AdamW, NAdam

from lightning_step import ASP, STEP, AtStep, AutoSwitch, Concentration, Sparsifier
from lightning_step.errors import ConfigurationError
from lightning_step.functional import expected_drift, make_sketch, sketch
from lightning_step.recipes import Clock

STEPS, MASKED, BETA2 = 60, ("0.weight", "2.weight"), 0.9
ADAMS = {
    "Adam": lambda model, eps=1e-8: Adam(model.parameters(), lr=0.02, betas=(0.9, BETA2), eps=eps, weight_decay=0.0),
    "AdamW": lambda model, eps=1e-8: AdamW(model.parameters(), lr=0.02, betas=(0.9, BETA2), eps=eps, weight_decay=0.3),
    "NAdam": lambda model, eps=1e-8: NAdam(model.parameters(), lr=0.02, betas=(0.9, BETA2), eps=eps),
}
WAITS = AtStep(10**9)


def masked(model):
    return [p for name, p in model.named_parameters() if name in MASKED]


def one_step(model, stock, batch, t, scale=1.0):
    """Gives back the squared gradients of the masked coordinates."""
    x, y = batch(t, next(model.parameters()).dtype)
    (torch.nn.functional.mse_loss(model(x), y) * scale).backward()
    squares = torch.cat([p.grad.detach().square().flatten() for p in masked(model)])
    stock.step()
    stock.zero_grad()
    return squares


def ratios_from_copies(net, batch, make_adam, lag, every):
    """Formula by formula, from copies of v and of all gradients; only the sketch is the package's own."""
    model = net()
    stock = make_adam(model)
    v, squares, found = [torch.zeros(192, dtype=torch.float64)], [None], {}
    for t in range(1, STEPS + 1):
        squares.append(one_step(model, stock, batch, t - 1))
        v.append(torch.cat([stock.state[p]["exp_avg_sq"].flatten().clone() for p in masked(model)]))
        if t % every == 0 and t - lag >= every:
            noise = steps = 0.0
            for s in range(t - lag + 1, t + 1):
                corrected = v[s] / (1 - BETA2**s)
                noise += float(((squares[s] - corrected) ** 2 / (4 * corrected)).sum())
                weights = [(1 - BETA2) * BETA2**i / (1 - BETA2**s) for i in range(s)]
                steps += 1 - 2 * weights[0] + sum(w * w for w in weights)
            moved = (v[t] / (1 - BETA2**t)).sqrt() - (v[t - lag] / (1 - BETA2 ** (t - lag))).sqrt()
            length = float(sketch(moved, make_sketch(torch.arange(192))).square().sum())
            found[t] = length * steps / noise / expected_drift(t, lag, BETA2)
    return found


def fired(net, batch, switch, make_adam, scale=1.0, eps=1e-8, read_every=1):
    """When, by which rule, and everything that was seen on the way."""
    model, seen = net(), []
    stock = make_adam(model, eps)
    sparsifier = Sparsifier(model, stock, recipe=STEP(switch, masks_from=WAITS), read_every=read_every)
    for t in range(STEPS):
        one_step(model, stock, batch, t, scale)
        seen.append(sparsifier.gauges())
        if sparsifier.events:
            break
    (event,) = sparsifier.events
    return event.step, event.rule, seen, model


# Where it fires -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_adam", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize(("window", "lag", "every"), [(10, 10, 1), (None, 10, 1), (3, 3, 1), (35, 36, 2)])
def test_it_fires_where_copies_of_v_say(net, batch, make_adam, window, lag, every):
    ratios = ratios_from_copies(net, batch, make_adam, lag, every)
    ordered = sorted(ratios.values())
    for place in (1, len(ordered) // 2, len(ordered) - 1):
        threshold = (ordered[place - 1] + ordered[place]) / 2
        expected = next(t for t, ratio in ratios.items() if ratio < threshold)
        switch = Concentration(threshold, window, t_min=0, t_max=STEPS)
        step, rule, seen, _ = fired(net, batch, switch, make_adam)
        assert (step, rule) == (expected, "drift of v within its noise")
        for t, gauges in enumerate(seen, 1):
            known = ratios.get(t - t % every)  # it is made at every anchor, and stays until the next
            assert ("window_mean" in gauges) == (known is not None)
            assert gauges["threshold"] == threshold
            if known is not None:
                assert gauges["window_mean"] == pytest.approx(known, rel=2e-3)
                assert 0 < gauges["variance_change"] < 2


def test_limits_and_reading_hold_it_back(net, batch):
    switch = Concentration(1e9, window=4, t_min=13, t_max=40)
    assert [fired(net, batch, switch, ADAMS["Adam"], read_every=n)[0] for n in (1, 5, 11, 50)] == [13, 15, 22, 40]
    step, rule, *_ = fired(net, batch, Concentration(1e-9, window=4, t_min=0, t_max=21), ADAMS["Adam"], read_every=4)
    assert (step, rule) == (21, "t_max reached")


def test_the_event_says_what_was_compared(net, batch):
    model = net()
    stock = ADAMS["Adam"](model)
    sparsifier = Sparsifier(model, stock, recipe=STEP(Concentration(1e9, window=40, t_min=0, t_max=50)), read_every=1)
    assert "T_max will decide" not in str(sparsifier.notes)
    for t in range(42):
        one_step(model, stock, batch, t)
    (event,) = sparsifier.events
    ratio = sparsifier.gauges()["window_mean"]
    assert event.step == 42  # anchors are two steps apart: 2 and 42
    assert event.numbers == f"{ratio:.3g} against 1e+09 (lag = 40, T_min = 0, T_max = 50)"


def test_a_window_longer_than_the_run_is_told_before_the_first_step(net):
    model = net()
    recipe = STEP(Concentration(window=100, t_min=0, t_max=50))
    (note,) = Sparsifier(model, ADAMS["Adam"](model), recipe=recipe).notes
    assert "may wait for 50 at most: T_max will decide" in note


# Scale --------------------------------------------------------------------------------------------------------------


@functools.cache
def thresholds(net, batch):
    """One that Concentration crosses in the middle of the run, and the same for AutoSwitch."""
    ratios = ratios_from_copies(net, batch, ADAMS["Adam"], 10, 1)
    step = next(t for t, ratio in ratios.items() if t > 25 and ratio == min(r for s, r in ratios.items() if s <= t))
    before = min(ratio for t, ratio in ratios.items() if t < step)
    _, _, seen, _ = fired(net, batch, AutoSwitch(window=10, threshold=1e-30, t_min=0, t_max=STEPS), ADAMS["Adam"])
    means = [gauges["window_mean"] for gauges in seen if "window_mean" in gauges]
    return math.sqrt(ratios[step] * before), step, sorted(means)[len(means) // 2]


@pytest.mark.parametrize("eps", ["of the same scale", 1e-12])
@pytest.mark.parametrize("scale", [0.01, 2.0**-7, 1.0, 2.0**7, 100.0])
def test_it_fires_at_the_same_step_whatever_the_loss_is_multiplied_with(net, batch, scale, eps):
    """Adam itself does not know the scale as long as its eps has it, too, or is negligible."""
    threshold, expected, _ = thresholds(net, batch)
    eps = 1e-8 * scale if eps == "of the same scale" else eps
    switch = Concentration(threshold, window=10, t_min=0, t_max=STEPS)
    step, rule, *_ = fired(net, batch, switch, ADAMS["Adam"], scale, eps)
    assert (step, rule) == (expected, "drift of v within its noise")


def test_autoswitch_does_not(net, batch):
    *_, threshold = thresholds(net, batch)
    switch = AutoSwitch(window=10, threshold=threshold, t_min=0, t_max=STEPS)
    fires = {scale: fired(net, batch, switch, ADAMS["Adam"], scale, 1e-8 * scale)[:2] for scale in (0.01, 1.0, 100.0)}
    assert fires[0.01] == (10, "window mean below threshold")  # as soon as the window is full
    assert 10 < fires[1.0][0] < STEPS
    assert fires[100.0] == (STEPS, "t_max reached")


@pytest.mark.parametrize("power", [-20, -7, 7, 20])
def test_powers_of_two_change_not_one_bit_of_what_it_sees(power, batch, net):
    scale = 2.0**power

    def small():
        return net(torch.float32)

    switch = Concentration(1e-9, window=10, t_min=0, t_max=STEPS)
    plain = fired(small, batch, switch, ADAMS["Adam"])
    scaled = fired(small, batch, switch, ADAMS["Adam"], scale, 1e-8 * scale)
    assert len(plain[2]) == STEPS
    assert scaled[2] == plain[2]
    for ours, theirs in zip(scaled[3].parameters(), plain[3].parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Odd gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_zeros_are_no_evidence_and_do_no_harm(kept):
    """Only ``kept`` of 64 coordinates ever have a gradient, and they have it in one step of three."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 8, bias=False)
    stock = Adam(layer.parameters(), lr=0.01, betas=(0.9, 0.9))
    sparsifier = Sparsifier(layer, stock, recipe=ASP(Concentration(1e-9, window=5, t_min=0, t_max=30)), read_every=1)
    for t in range(30):
        grad = torch.zeros(64)
        grad[:kept] = torch.randn(kept) * (t % 3 == 0)
        layer._parameters["weight"].grad = grad.reshape(8, 8)
        gauges = sparsifier.gauges()
        assert all(math.isfinite(value) for value in gauges.values())
        assert ("window_mean" in gauges) == (kept > 0 and t > 5)
        stock.step()
    (event,) = sparsifier.events
    assert (event.step, event.rule) == (30, "t_max reached")
    assert ("window not full" in event.numbers) == (kept == 0)


def test_gradients_that_never_change_are_at_rest(net):
    layer = torch.nn.Linear(8, 8, bias=False)
    stock = Adam(layer.parameters(), lr=0.01, betas=(0.9, 0.9))
    recipe = ASP(Concentration(window=5, t_min=0, t_max=99))
    sparsifier = Sparsifier(layer, stock, recipe=recipe, read_every=1)
    for _ in range(12):
        layer._parameters["weight"].grad = torch.linspace(0.1, 1.0, 64).reshape(8, 8) * (1 + 0.01 * torch.randn(8, 8))
        stock.step()
    assert [event.rule for event in sparsifier.events] == ["drift of v within its noise"]


# What it remembers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 20, 45])
@pytest.mark.parametrize("crash", [0, 1, 4, 23, 46, 49])
def test_a_restored_one_goes_on_as_the_undisturbed_one(window, crash):
    samples = torch.rand(70, 130, dtype=torch.float64).add(0.5).tolist()
    switch, clock = Concentration(0.5, window=window, t_min=0, t_max=65), Clock(100, beta2=0.9)
    undisturbed, restored = switch.start(clock), switch.start(clock)
    for sample in samples[:crash]:
        undisturbed.observe(tuple(sample))
    restored.load_state_dict(json.loads(json.dumps(undisturbed.state_dict())))
    for t, sample in enumerate(samples[crash:], crash + 1):
        undisturbed.observe(tuple(sample))
        restored.observe(tuple(sample))
        assert restored.decide(t) == undisturbed.decide(t)
        assert restored.gauges() == undisturbed.gauges()
    assert restored.state_dict() == undisturbed.state_dict()


@pytest.mark.parametrize(("beta2", "anchors"), [(0.999, 17), (0.99, 18), (0.9, 11), (0.0, 2)])
def test_it_remembers_few_numbers_however_long_the_window(beta2, anchors):
    watcher = Concentration().start(Clock(10**5, beta2=beta2))
    for _ in range(2100):
        watcher.observe((1.0,) * 130)
    assert len(watcher.state_dict()["samples"]) == anchors
    assert abs(watcher.lag - 1 / (1 - beta2)) <= 1 / (1 - beta2) / 20


def test_it_needs_a_second_moment_even_with_a_window():
    with pytest.raises(ConfigurationError, match="Expected an optimizer with beta2 and eps"):
        Concentration(window=5).start(Clock(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, r"Expected `threshold` > 0, but got 0\.0\. 1 is rest"),
        ({"threshold": math.nan}, "Expected `threshold` > 0, but got nan"),
        ({"window": 0}, r"Expected `window` to be an integer >= 1 \(optimizer steps\), but got 0"),
        ({"window": 2.5}, r"Expected `window` to be an integer >= 1 \(optimizer steps\), but got 2\.5"),
        ({"t_min": 0.6, "t_max": 0.5}, r"Expected `t_min` <= `t_max`, but got t_min=0\.6 and t_max=0\.5"),
        ({"t_max": 1.5}, "Expected `t_max` to be a step >= 0 .* but got 1.5"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        Concentration(**arguments)
