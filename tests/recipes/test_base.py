"""What recipes are made of: plain frozen values, and their description."""

import dataclasses
import json
import math

import pytest
import torch

from lightning_step import ASP, SRSTE, STEP, AtStep, AutoSwitch, NMPattern, Recipe, Switch
from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.recipes import Clock, Freeze, GradientRule, Moment, Plan, RelativeNorm, Staleness, describe
from lightning_step.recipes.base import check_lam


def test_a_recipe_is_described_down_to_its_switches():
    assert describe(STEP(AutoSwitch(t_max=7, t_min=1), lam=0.5, masks_from=AtStep(0), max_step=2.0)) == {
        "type": "STEP",
        "switch": {
            "type": "AutoSwitch",
            "mean": "arithmetic",
            "window": None,
            "threshold": None,
            "t_min": 1,
            "t_max": 7,
        },
        "lam": 0.5,
        "masks_from": {"type": "AtStep", "step": 0},
        "scope": "masked",
        "form": "adam",
        "max_step": 2.0,
    }


@dataclasses.dataclass(frozen=True)
class Nested:
    inner: object
    kind: object = SRSTE


def test_anything_becomes_plain_values():
    value = Nested((NMPattern(1, 4), {3: [AtStep(2), None, True]}, torch.float32))
    assert describe(value) == {
        "type": "Nested",
        "inner": [
            {"type": "NMPattern", "n": 1, "m": 4},
            {"3": [{"type": "AtStep", "step": 2}, None, True]},
            "torch.float32",
        ],
        "kind": repr(SRSTE),  # a class is no instance
    }
    assert json.loads(json.dumps(describe(value))) == describe(value)


@pytest.mark.parametrize("value", [None, 1, 0.5, "masked", False, math.inf])
def test_plain_values_describe_themselves(value):
    assert describe(value) == value
    assert type(describe(value)) is type(value)


@pytest.mark.parametrize("lam", [-1e-300, -math.inf, math.nan])
def test_a_strength_below_zero_is_refused(lam):
    with pytest.raises(
        ConfigurationError, match=rf"^Expected `lam` >= 0, but got {lam}\. It pulls pruned weights towards zero"
    ):
        check_lam(lam)


@pytest.mark.parametrize("lam", [0, 0.0, 1e-300, 5])
def test_a_strength_of_zero_or_more_is_fine(lam):
    assert SRSTE(lam).lam == lam


@pytest.mark.parametrize("switch", [AtStep(3), AutoSwitch(), RelativeNorm(), Staleness()], ids=str)
def test_switches_are_frozen_values(switch):
    assert hash(dataclasses.replace(switch)) == hash(switch)
    assert dataclasses.replace(switch, **{dataclasses.fields(switch)[-1].name: 1}) != switch
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        setattr(switch, dataclasses.fields(switch)[0].name, 1)


@pytest.mark.parametrize("value", [GradientRule("masked"), Freeze(AtStep(1))], ids=str)
def test_answers_are_frozen_values(value):
    assert (dataclasses.replace(value), hash(dataclasses.replace(value))) == (value, hash(value))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        setattr(value, dataclasses.fields(value)[0].name, None)


def test_defaults_of_the_answers():
    assert GradientRule("masked") == GradientRule(through="masked", lam=0.0, fixed=False)
    assert Freeze(AtStep(1)) == Freeze(when=AtStep(1), scope="masked", form="adam", max_step=None)


def test_a_recipe_has_to_have_a_plan():
    with pytest.raises(TypeError, match=r"abstract.*plan"):
        type("Half", (Recipe,), {})()


def test_a_plan_is_a_frozen_value_with_plain_defaults():
    plan = Plan(AtStep(1))
    assert (plan.gradient, plan.freeze) == (GradientRule("straight_through"), None)
    assert plan.pattern("any", NMPattern(1, 4), Moment(7)) == NMPattern(1, 4)
    assert (plan.fade(Moment(7)), plan.allocate) == (0, None)
    assert dataclasses.replace(plan) == plan
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        plan.masks = None


def test_a_switch_has_to_start():
    with pytest.raises(TypeError, match=r"abstract.*start"):
        type("Half", (Switch,), {})()


def test_a_clock_knows_nothing_unless_told():
    assert Clock() == Clock(total_steps=None, beta2=None, eps=None)
    assert (Clock(9, 0.9, 1e-8).need_beta2(), Clock(9, 0.9, 1e-8).need_eps()) == (0.9, 1e-8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ASP(0.5), "at"),
        (lambda: STEP(switch=300), "switch"),
        (lambda: STEP(masks_from=0), "masks_from"),
        (lambda: STEP(AutoSwitch), "switch"),
    ],
)
def test_a_bare_number_in_the_place_of_a_switch_is_refused_at_construction(make, name):
    with pytest.raises(ArgumentTypeError, match=rf"Expected `{name}` to be a switch, but got .* Write AtStep\(500\)"):
        make()
