"""What every wrapper refuses, and that it changes nothing but what it is about."""

import dataclasses

import pytest

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Dense,
    DenseTail,
    Layerwise,
    MaskDecay,
    RateScale,
    StructureDecay,
)
from lightning_step.errors import ArgumentTypeError, ConfigurationError

KINDS = [StructureDecay, MaskDecay, Layerwise, DenseTail, RateScale]
CHANGES = {StructureDecay: "pattern", MaskDecay: "fade", Layerwise: "allocate", DenseTail: "pattern", RateScale: "rate"}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("recipe", [STE(), SRSTE(lam=0.5), STEP(AtStep(3), scope="all"), ASP(AtStep(3))], ids=repr)
def test_the_other_answers_are_those_of_the_recipe(kind, recipe):
    if kind is MaskDecay and isinstance(recipe, ASP):
        return
    plan, inner = kind(recipe).plan(), recipe.plan()
    for field in dataclasses.fields(plan):
        same = getattr(plan, field.name) == getattr(inner, field.name)
        assert same == (field.name != CHANGES[kind]), field.name


@every_kind
def test_without_a_recipe_it_wraps_step(kind):
    assert kind().recipe == STEP()
    assert kind().plan().masks == AutoSwitch()


@every_kind
@pytest.mark.parametrize("value", [STE, "STE", None, 3])
def test_what_is_no_recipe_is_refused(kind, value):
    with pytest.raises(ArgumentTypeError, match=rf"^Expected `recipe` of {kind.__name__} to be a recipe, .*with brackets"):
        kind(value)


@every_kind
def test_a_recipe_without_masks_is_refused(kind):
    with pytest.raises(ConfigurationError, match=rf"^Expected `recipe` of {kind.__name__} to have masks, but got Dense\(\)"):
        kind(Dense())


@every_kind
def test_one_kind_twice_is_refused_however_deep(kind):
    for between in (lambda recipe: recipe, *(k for k in KINDS if k is not kind)):
        with pytest.raises(ConfigurationError, match=rf"^Expected one {kind.__name__} around a recipe, but got a second"):
            kind(between(kind(STE())))


@every_kind
@pytest.mark.parametrize("other", KINDS)
def test_two_kinds_compose_in_either_order(kind, other):
    if kind is not other:
        plans = [outer(inner(STE())).plan() for outer, inner in ((kind, other), (other, kind))]
        for plan in plans:
            assert all(getattr(plan, CHANGES[k]) != getattr(STE().plan(), CHANGES[k]) for k in (kind, other))


@pytest.mark.parametrize("power", [-0.1, 2.1, float("nan"), "1", None, True])
def test_a_power_that_would_slow_down_or_blow_up_is_refused(power):
    with pytest.raises(ConfigurationError, match=r"^Expected 0 <= `power` <= 2, .* but got"):
        RateScale(STE(), power)
