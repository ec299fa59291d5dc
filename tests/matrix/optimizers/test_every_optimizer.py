"""Every optimizer under every recipe, step by step against the oracle, in a plain loop."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import STEP, AtStep, AutoSwitch, Sparsifier, strip

STEPS = 25
LOOPS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def train(model: Any, optimizer: Any, batch: Any, start: int, stop: int) -> None:
    for t in range(start, stop):
        x, y = batch(t)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", LOOPS)
def test_a_whole_run_equals_the_one_by_hand(
    how: str, every_recipe: Any, every_optimizer: Any, by_hand: Any, matrix_net: Any, matrix_batch: Any
) -> None:
    (name, recipe), (kind, make) = every_recipe, every_optimizer
    model = matrix_net()
    if how == "fused" and kind in ("NAdam", "RAdam"):
        with pytest.raises(TypeError, match="fused"):  # torch has none
            make(model.parameters(), **LOOPS[how])
        return
    optimizer = make(model.parameters(), **LOOPS[how])
    sparsifier = Sparsifier(model, optimizer, recipe=recipe)
    expected = by_hand(name, kind, [(0.02, (0.9, 0.98))] * STEPS)
    for t in range(STEPS):
        train(model, optimizer, matrix_batch, t, t + 1)
        for key, parameter in model.named_parameters():
            # torch keeps NAdam's product of momenta in single precision
            torch.testing.assert_close(parameter.detach(), expected[t][key], rtol=1e-6, atol=1e-8)
    assert [event.step for event in sparsifier.events] == {"Dense": [], "ASP": [10], "STEP": [10]}.get(name, [0])
    assert strip(model) == ([] if name == "Dense" else ["0.weight", "2.weight"])


def test_a_switch_at_a_sampled_step_is_the_same_for_every_optimizer_as_from_copies_of_v(
    every_optimizer: Any, matrix_net: Any, matrix_batch: Any
) -> None:
    _, make = every_optimizer
    v = [torch.zeros(16 * 8 + 4 * 16, dtype=torch.float64)]
    plain = matrix_net()
    optimizer = make(plain.parameters())
    for t in range(STEPS):
        train(plain, optimizer, matrix_batch, t, t + 1)
        v.append(torch.cat([optimizer.state[plain[i].weight]["exp_avg_sq"].flatten() for i in (0, 2)]))
    z = [float((after - before).abs().mean()) for before, after in itertools.pairwise(v)]
    means = {t: sum(z[t - 3 : t]) / 3 for t in range(3, STEPS + 1)}
    allowed = {t: mean for t, mean in means.items() if t >= 8}
    threshold = sum(sorted(allowed.values())[3:5]) / 2  # halfway: a sample is taken in single precision
    first = next(t for t, mean in allowed.items() if mean < threshold)
    model = matrix_net()
    sparsifier = Sparsifier(
        model,
        stock := make(model.parameters()),
        recipe=STEP(AutoSwitch(window=3, threshold=threshold, t_min=8, t_max=STEPS)),
        read_every=1,
    )
    train(model, stock, matrix_batch, 0, first)
    assert [event.step for event in sparsifier.events] == [first]
    assert sparsifier.events[0].rule == "window mean below threshold"


@pytest.mark.parametrize(("step", "frozen_at"), [(0, 6), (3, 6), (5, 6), (6, 6), (7, 7)])
def test_under_radam_a_switch_waits_until_radam_itself_divides_by_v(
    step: int, frozen_at: int, matrix_net: Any, matrix_batch: Any
) -> None:
    model = matrix_net()
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, recipe=STEP(AtStep(step)))
    for t in range(9):
        train(model, optimizer, matrix_batch, t, t + 1)
        assert sparsifier.phase == (2 if t + 1 >= frozen_at else 1)
    assert [(event.step, event.masks, event.freeze) for event in sparsifier.events] == [(frozen_at, True, True)]


@pytest.mark.parametrize("crash", [4, 10, 14])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    crash: int, every_optimizer: Any, matrix_net: Any, matrix_batch: Any
) -> None:
    def start() -> Any:
        model = matrix_net(torch.float32)
        optimizer = every_optimizer[1](model.parameters())
        return model, optimizer, Sparsifier(model, optimizer, recipe=STEP(AtStep(10)))

    def batch(t: int) -> Any:
        return [part.float() for part in matrix_batch(t)]

    run, resumed = start(), start()
    train(*run[:2], batch, 0, crash)
    for part, other in zip(resumed, run, strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    for model, optimizer, _ in (run, resumed):
        train(model, optimizer, batch, crash, 18)
    for mine, theirs in zip(resumed[0].parameters(), run[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        pairs = resumed[1].state[mine], run[1].state[theirs]
        assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[1])
    assert resumed[2].events == run[2].events


def test_groups_of_their_own_rate_betas_and_decay(every_optimizer: Any, matrix_net: Any, matrix_batch: Any) -> None:
    """Two groups are two optimizers of one group each: frozen steps read their own group."""
    outcomes = []
    for together in (True, False):
        model = matrix_net()
        make, second = every_optimizer[1], {"lr": 0.005, "betas": (0.7, 0.9), "weight_decay": 0.3}
        first, last = model[0].parameters(), model[2].parameters()
        optimizers = [make(first), make(last, **second)]
        if together:
            optimizers = [make([{"params": model[0].parameters()}, {"params": model[2].parameters(), **second}])]
        sparsifiers = [Sparsifier(model, optimizer, recipe=STEP(AtStep(10))) for optimizer in optimizers]
        for t in range(20):
            x, y = matrix_batch(t)
            nn.functional.mse_loss(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(sparsifier.events[0].freeze for sparsifier in sparsifiers)
        outcomes.append(model.state_dict())
    for name, weight in outcomes[0].items():
        torch.testing.assert_close(weight, outcomes[1][name], rtol=1e-12, atol=1e-14)
