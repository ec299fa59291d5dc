"""What the callback is told, the driver does; what a checkpoint says of a pattern, an evaluation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_step import STEP, AtStep, AutoSwitch, NMPattern, Recipe, STEPSparsityCallback, nm_masks
from lightning_step.recipes import GradientRule, Moment, Plan


@dataclass(frozen=True)
class Tightening(Recipe):
    """3:4 until step 8, then what the tensor is to end with."""

    def plan(self) -> Plan:
        def pattern(name: str, final: NMPattern, moment: Moment) -> NMPattern:
            return NMPattern(3, 4) if moment.t < 8 else final

        return Plan(AtStep(0), GradientRule(), pattern=pattern)


@pytest.mark.parametrize(("steps", "n"), [(5, 3), (10, 2)])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluated_checkpoint_has_the_pattern_it_had_when_it_was_written(
    verb: str, steps: int, n: int, tiny: Any, make_trainer: Any, tmp_path: Any
) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=Tightening()), steps=steps)
    trainer.fit(tiny())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = tiny()
    again = make_trainer(STEPSparsityCallback(recipe=Tightening()), limit_val_batches=1)
    getattr(again, verb)(fresh, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert {mask.pattern for mask in nm_masks(fresh).values()} == {NMPattern(n, 4)}
    assert int(fresh.net[0].weight.count_nonzero()) == 16 * 8 * n // 4
    assert torch.equal(fresh.net[0].weight, trainer.lightning_module.net[0].weight)


@pytest.mark.parametrize(("read_every", "step"), [(1, 4), (3, 6), (7, 7)])
def test_samples_are_read_as_often_as_the_callback_is_told(read_every: int, step: int, tiny: Any, make_trainer: Any) -> None:
    recipe = AutoSwitch(window=4, threshold=1.0, t_min=0, t_max=20)
    callback = STEPSparsityCallback(recipe=STEP(recipe), read_every=read_every)
    make_trainer(callback).fit(tiny())
    assert [event.step for event in callback.sparsifiers[0].events] == [step]


def test_samples_are_taken_on_as_many_coordinates_as_the_callback_is_told(tiny: Any, make_trainer: Any) -> None:
    changes = []
    for coordinates in (10, 100_000):
        callback = STEPSparsityCallback(recipe=STEP(AutoSwitch(t_min=20, t_max=20)), max_coordinates=coordinates)
        make_trainer(callback, steps=5).fit(tiny())
        state = callback.sparsifiers[0].state_dict()
        changes.append(str(state["open"]))
    assert changes[0] != changes[1]


def test_a_second_fit_samples_its_own_second_moment_from_the_beginning(tiny: Any, make_trainer: Any) -> None:
    switch = AutoSwitch(window=4, threshold=1e-30, t_min=50, t_max=60)
    module, callback = tiny(), STEPSparsityCallback(recipe=STEP(switch), read_every=1)
    for steps in (6, 3):
        make_trainer(callback, steps=steps).fit(module)
    state = callback.sparsifiers[0].state_dict()
    assert state["t"] == 9  # the steps go on
    assert [len(own["samples"]) for own in state["open"].values()] == [3, 3]  # what the new optimizer did
