"""The switches of a run together: events, when samples are read, and gradients that are not finite."""

import copy
import random
import re

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_step import ASP, STEP, AtStep, AutoSwitch, Sparsifier, Staleness
from lightning_step.recipes import Clock
from lightning_step.watching import SwitchBoard

NEVER = AtStep(10**6)


def make_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model, optimizer, steps, start=0, poison=None):
    """Plain loop; ``poison`` is called with ``t`` before the optimizer step."""
    for t in range(start, steps):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(t))
        (model(x) - x[:, :4].sin()).square().mean().backward()
        if poison is not None:
            poison(t)
        optimizer.step()
        optimizer.zero_grad()


def run(recipe, steps=0, poison=None, **arguments):
    model = make_net()
    optimizer = AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.9))
    sparsifier = Sparsifier(model, optimizer, recipe=recipe, **arguments)
    train(model, optimizer, steps, poison=poison)
    return model, optimizer, sparsifier


# One switch or two --------------------------------------------------------------------------------------------------

SOON, LATE = AutoSwitch(window=2, threshold=1e9, t_min=3, t_max=9), AutoSwitch(window=2, threshold=1e-30, t_min=3, t_max=9)


@pytest.mark.parametrize(
    ("recipe", "events"),
    [
        (STEP(AtStep(4)), [(4, True, True)]),
        (STEP(AtStep(4), masks_from=AtStep(4)), [(4, True, True)]),
        (STEP(SOON, masks_from=AutoSwitch(window=2, threshold=1e9, t_min=3, t_max=9)), [(3, True, True)]),
        (STEP(AtStep(4), masks_from=AtStep(0)), [(0, True, False), (4, False, True)]),
        (STEP(AtStep(4), masks_from=AtStep(6)), [(4, False, True), (6, True, False)]),
        (STEP(SOON, masks_from=LATE), [(3, False, True), (9, True, False)]),
        (STEP(LATE, masks_from=SOON), [(3, True, False), (9, False, True)]),
        (STEP(AtStep(9), masks_from=LATE), [(9, True, False), (9, False, True)]),  # at once, but by two decisions
        (ASP(SOON), [(3, True, False)]),
        (ASP(NEVER), []),
    ],
)
def test_equal_switches_are_one_event_and_others_are_two(recipe, events):
    told = []
    _, _, sparsifier = run(recipe, 12, read_every=1, on_event=told.append)
    assert [(e.step, e.masks, e.freeze) for e in sparsifier.events] == events
    assert told == sparsifier.events
    assert sparsifier.gauges().keys() <= {"phase", "threshold", "variance_change", "window_mean"}


def test_an_event_reads_like_a_sentence():
    _, _, sparsifier = run(STEP(LATE, masks_from=SOON), 12, read_every=1)
    assert re.fullmatch(
        r"optimizer step 3: masks on \(2 tensors\); window mean below threshold: \S+ against 1e\+09 "
        r"\(T_w = 2, T_min = 3, T_max = 9\)",
        str(sparsifier.events[0]),
    )
    assert re.fullmatch(
        r"optimizer step 9: second moment frozen \(2 tensors\); t_max reached: \S+ against 1e-30 "
        r"\(T_w = 2, T_min = 3, T_max = 9\)",
        str(sparsifier.events[1]),
    )


def test_an_event_counts_one_tensor_in_the_singular():
    _, _, sparsifier = run(STEP(AtStep(2)), 2, include=["0"])
    assert str(sparsifier.events[0]).startswith("optimizer step 2: masks on, second moment frozen (1 tensor); fixed")


# When samples are read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("read_every", "step"), [(0, 5), (1, 5), (2, 6), (3, 6), (4, 8), (7, 7), (10, 10), (50, 11)])
def test_reading_seldom_delays_the_decision_to_the_next_reading(read_every, step):
    switch = AutoSwitch(window=5, threshold=1e9, t_min=0, t_max=11)
    _, _, sparsifier = run(STEP(switch), 12, read_every=read_every)
    assert [event.step for event in sparsifier.events] == [step]


@pytest.mark.parametrize(
    "switch", [AutoSwitch(window=4, threshold=2e-4, t_min=6, t_max=30), Staleness(threshold=0.5, t_max=30)]
)
def test_decisions_do_not_depend_on_when_samples_are_read(switch):
    outcomes = []
    for seed in range(4):
        model, optimizer, sparsifier = run(STEP(switch), read_every=5)
        for t in range(32):
            train(model, optimizer, t + 1, t)
            if seed and random.Random(seed * 100 + t).random() < 0.4:
                sparsifier.state_dict()
        outcomes.append((sparsifier.events, sparsifier.state_dict(), [p.tolist() for p in model.parameters()]))
    assert outcomes[0][0][0].step not in (5, 30)
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_measuring_flips_does_not_change_decisions():
    steps = [
        [event.step for event in run(STEP(SOON, masks_from=AtStep(0)), 12, read_every=4, measure_every=k)[2].events]
        for k in (0, 1)
    ]
    assert steps == [[0, 4]] * 2


@pytest.mark.parametrize(("switch", "keep"), [(AutoSwitch(t_min=0, t_max=8), 10), (Staleness(t_max=8), 11)])
def test_a_window_that_cannot_fill_is_noted_before_the_first_step(switch, keep):
    (note,) = run(STEP(switch))[2].notes
    assert note == (
        f"the switch averages {keep} optimizer steps but may wait for 8 at most: T_max will decide "
        "unless it is given a shorter window"
    )
    (event,) = run(STEP(switch), 8)[2].events
    assert event.numbers == "8 samples, window not full (T_w = 10), T_min = 0, T_max = 8"


@pytest.mark.parametrize("recipe", [STEP(AtStep(3)), STEP(SOON), STEP(AutoSwitch(t_min=0, t_max=10))], ids=str)
def test_a_window_that_can_fill_needs_no_note(recipe):
    assert run(recipe)[2].notes == []


def test_the_board_forgets_what_has_begun():
    board = SwitchBoard({"masks": AtStep(2), "freeze": AtStep(5)}, Clock(), None, read_every=4)
    assert [t for t in range(8) if board.due(t)] == [0, 2, 3, 4, 5, 6, 7]
    assert [(roles, decision.step) for roles, decision in board.decide(2)] == [({"masks"}, 2)]
    board.close({"masks"})
    assert [t for t in range(8) if board.due(t)] == [0, 4, 5, 6, 7]
    assert board.state_dict() == {"freeze": {"samples": [], "taken": 0}}
    restored = SwitchBoard({"masks": AtStep(2), "freeze": AtStep(5)}, Clock(), None, read_every=4)
    restored.load_state_dict(board.state_dict())
    assert list(restored.decide(4)) == []
    assert [(roles, decision.step) for roles, decision in restored.decide(5)] == [({"freeze"}, 5)]
    restored.close({"freeze"})
    assert not any(restored.due(t) for t in range(8))
    assert (restored.state_dict(), restored.gauges(), restored.read()) == ({}, {}, 0)


def test_the_gauges_show_what_a_switch_fired_on_until_the_next_step():
    model, optimizer, sparsifier = run(STEP(SOON), 3, read_every=1)
    shown = sparsifier.gauges()
    assert shown.keys() == {"phase", "variance_change", "window_mean", "threshold"}
    assert sparsifier.events[0].numbers.startswith(f"{shown['window_mean']:.3g} against 1e+09 ")
    resumed = run(STEP(SOON))[2]
    resumed.load_state_dict(sparsifier.state_dict())
    assert resumed.gauges() == {"phase": 2.0}  # it fired on nothing here
    train(model, optimizer, 4, 3)
    assert sparsifier.gauges() == {"phase": 2.0}


def test_samples_are_added_up_over_processes_before_the_mean():
    switch = AutoSwitch(window=1, threshold=1e-30, t_min=0, t_max=99)
    alone = run(STEP(switch), 3, read_every=1)[2]
    # Another process, with three times as many coordinates that do not move at all.
    together = run(STEP(switch), 3, read_every=1, reduce=lambda pairs: pairs + torch.tensor([0.0, 3.0 * (128 + 64)]))[2]
    assert together.gauges()["variance_change"] == pytest.approx(alone.gauges()["variance_change"] / 4, rel=1e-6)


# Gradients that are not finite --------------------------------------------------------------------------------------

NO_SAMPLE = (
    r"^Expected finite gradients, but got NaN or infinity before optimizer step 4: no variance sample was taken from it"
)
NOT_FROZEN = r"^Expected a finite second moment at the switch, but got NaN or infinity in '0\.weight' \(and \d more\)"


def poison_at_3(model, value):
    def poison(t):
        if t == 3:
            dict(model.named_parameters())["0.weight"].grad[0, 0] = value

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])  # the square of 1e30 is infinite
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_gradient_that_is_not_finite_gives_no_sample_and_one_warning(mean, value):
    model, optimizer, sparsifier = run(STEP(AutoSwitch(mean, 9, 1e-30, 0, 99)), 3, read_every=1)
    before = sparsifier.state_dict()["open"]
    with pytest.warns(UserWarning, match=NO_SAMPLE) as warned:
        train(model, optimizer, 8, 3, poison_at_3(model, value))
    assert len(warned) == 1
    assert sparsifier.state_dict()["open"] == before
    assert len(before["freeze"]["samples"]) == 3


def test_after_a_bad_step_that_was_undone_samples_go_on():
    model, optimizer, sparsifier = run(STEP(AutoSwitch(window=6, threshold=1e9, t_min=0, t_max=99)), 3, read_every=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.warns(UserWarning, match=NO_SAMPLE):
        train(model, optimizer, 4, 3, poison_at_3(model, float("nan")))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 9, 4)
    assert [(event.step, event.masks, event.freeze) for event in sparsifier.events] == [(7, True, True)]  # six good ones


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize(
    ("recipe", "warnings_expected", "events"),
    [
        (STEP(AtStep(5)), [NOT_FROZEN], []),
        (STEP(AutoSwitch(window=2, threshold=1e9, t_min=5, t_max=9)), [NO_SAMPLE, NOT_FROZEN], []),
        (STEP(AtStep(5), scope="all"), [NOT_FROZEN], []),
        (STEP(AtStep(5), masks_from=AtStep(0)), [NOT_FROZEN], [(0, True, False)]),
    ],
)
def test_a_second_moment_that_is_not_finite_is_not_frozen_and_masks_wait(recipe, warnings_expected, events, value):
    model, optimizer, sparsifier = run(recipe, read_every=1)
    with pytest.warns(UserWarning, match="but got NaN or infinity") as warned:
        train(model, optimizer, 12, poison=poison_at_3(model, value))
    assert len(warned) == len(warnings_expected)
    assert all(re.match(text, str(one.message)) for text, one in zip(warnings_expected, warned, strict=True))
    assert [(e.step, e.masks, e.freeze) for e in sparsifier.events] == events
    assert (sparsifier.frozen, sparsifier.phase) == ([], 2 if events else 1)
