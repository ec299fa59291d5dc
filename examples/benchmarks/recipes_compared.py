"""The rows of the comparison: a name, and the recipe it stands for.

`ROWS` get a rate and a lam of their own, from the task's grid. `CHANGES` change one thing in a row, at that row's rate and
lam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from typing_extensions import override

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Concentration,
    Dense,
    DenseTail,
    Layerwise,
    MaskDecay,
    RateScale,
    Recipe,
    RelativeNorm,
    Staleness,
    StructureDecay,
    Switch,
    default_recipe,
)
from lightning_step.recipes import Freeze, GradientRule, Plan


@dataclass(frozen=True)
class Entry:
    """One row of the tables.

    Args:
        make: The recipe, from lam.
        has_lam: Whether it has one, to be tuned.
        masked: Whether it has a pattern.
        optimizer: What trains it.
        steps: How many times the task's steps.
        of: Of a change: the row it changes.
        untuned: Run at the best rate of dense training and nowhere else, at the lam that it has by itself.
        lam: Of a change: the lam it sets, instead of that of its row.
        recipe: Its legend in figures; None: its name.
        switch: The fraction of the run at which it is made to switch.
        frozen: Whether v is frozen, where the point is that.
        change: What else is changed.
    """

    make: Callable[[float], Recipe]
    has_lam: bool = True
    masked: bool = True
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    steps: int = 1
    of: str | None = None
    untuned: bool = False
    lam: float | None = None
    recipe: str | None = None
    switch: float | None = None
    frozen: bool | None = None
    change: str | None = None


@dataclass(frozen=True)
class Parts(Recipe):
    """STEP taken apart: masks without a freeze, or a freeze without masks. Only a control; no one should train with it."""

    lam: float
    mask: bool
    freezes: bool
    switch: Switch = field(default_factory=AutoSwitch)

    @override
    def plan(self) -> Plan:
        masks = self.switch if self.mask else None
        return Plan(masks, GradientRule(lam=self.lam), Freeze(self.switch) if self.freezes else None)


def step(lam: float) -> STEP:
    """STEP at its defaults but for lam."""
    return STEP(lam=lam)


def early(lam: float) -> STEP:
    """STEP that leaves time for what comes after the switch."""
    return STEP(AtStep(0.1), lam)


def default(lam: float | None = None, power: float | None = None, ramp: float | None = None) -> RateScale:
    """The default recipe, at another lam, power or ramp."""
    recipe = default_recipe()
    assert isinstance(recipe, RateScale)
    assert isinstance(recipe.recipe, STEP)
    inner = recipe.recipe if lam is None else replace(recipe.recipe, lam=lam)
    return RateScale(inner, recipe.power if power is None else power, recipe.ramp if ramp is None else ramp)


def at_once(lam: float | None = None, power: float | None = None) -> RateScale:
    """What the default was before its rate came on little by little."""
    return default(lam, power, ramp=0)


def paper(lam: float) -> STEP:
    """As it was published, which has no lam."""
    return STEP(lam=0.0, form="paper", max_step=float("inf"))


def untuned(recipe: Recipe) -> Entry:
    """What somebody gets who changes nothing but the callback."""
    return Entry(lambda lam: recipe, has_lam=False, untuned=True)


def in_default(change: str, make: Callable[[float], Recipe], of: str | None = None) -> Entry:
    """A change in the default recipe, or in another row."""
    return Entry(make, of=of or DEFAULT, recipe=of or DEFAULT, change=change)


def freezing(share: float, of: str, ramp: float | None = None) -> Entry:
    """The default recipe, or what it was, made to freeze v at a fraction of the run."""

    def make(lam: float) -> Recipe:
        return replace(default(lam, ramp=ramp), recipe=STEP(AtStep(share), lam, AtStep(0)))

    return Entry(make, of=of, recipe=of, switch=share)


def in_step(change: str, make: Callable[[float], Recipe]) -> Entry:
    """A change in STEP."""
    return Entry(make, of="STEP", recipe="STEP", change=change)


def switching(share: float) -> Entry:
    """STEP that is made to switch at a fraction of the run."""
    return Entry(lambda lam: replace(step(lam), switch=AtStep(share)), of="STEP", recipe="STEP", switch=share)


def pulling(lam: float) -> Entry:
    """STEP with a lam that is not tuned."""
    return Entry(step, of="STEP", lam=lam, recipe="STEP", change=f"lam {lam:g}")


DEFAULT = "the default"
AT_ONCE = "the default without its ramp"
FROM_START = "STEP, masks from the start, v frozen at 30 %"

ROWS = {
    "dense": Entry(lambda lam: Dense(), has_lam=False, masked=False),
    "ASP": Entry(lambda lam: ASP(), has_lam=False),
    "STE": Entry(lambda lam: STE(), has_lam=False),
    "SR-STE": Entry(lambda lam: SRSTE(lam)),
    "STEP": Entry(step),
    "STEP, nothing else said": Entry(lambda lam: STEP(), has_lam=False),
    "STEP, as in the paper": Entry(paper, has_lam=False),
    FROM_START: Entry(lambda lam: replace(step(lam), switch=AtStep(0.3), masks_from=AtStep(0))),
    DEFAULT: Entry(default),
    AT_ONCE: Entry(at_once),
    "STEP + StructureDecay": Entry(lambda lam: StructureDecay(early(lam), end=0.45)),
    "STEP + MaskDecay": Entry(lambda lam: MaskDecay(early(lam), end=0.45)),
    "STEP + DenseTail": Entry(lambda lam: DenseTail(step(lam))),
    "STEP + Layerwise": Entry(lambda lam: Layerwise(step(lam))),
    "SR-STE + RateScale": Entry(lambda lam: RateScale(SRSTE(lam))),
    "SR-STE + StructureDecay": Entry(lambda lam: StructureDecay(SRSTE(lam))),
    "SR-STE + MaskDecay": Entry(lambda lam: MaskDecay(SRSTE(lam))),
    "SR-STE + MaskDecay, exponential": Entry(lambda lam: MaskDecay(SRSTE(lam), fading="exponential")),
    "SR-STE + DenseTail": Entry(lambda lam: DenseTail(SRSTE(lam))),
    "SR-STE + Layerwise": Entry(lambda lam: Layerwise(SRSTE(lam), by="erk")),
    f"{DEFAULT}, untuned": untuned(default_recipe()),
    f"{AT_ONCE}, untuned": untuned(at_once()),
    f"{AT_ONCE}, root of m/n, untuned": untuned(at_once(power=0.5)),
    "SR-STE, untuned": untuned(SRSTE()),
    "ASP, untuned": untuned(ASP()),
    "STEP, as in the paper, untuned": untuned(paper(0.0)),
    "dense, SGD": Entry(lambda lam: Dense(), has_lam=False, masked=False, optimizer="SGD", recipe="dense"),
    "SR-STE, SGD": Entry(lambda lam: SRSTE(lam), optimizer="SGD", recipe="SR-STE"),
}

CHANGES = {
    "dense, twice the steps": Entry(
        lambda lam: Dense(), False, False, steps=2, of="dense", recipe="dense", change="twice the steps"
    ),
    **{f"switch at {share} %": switching(share / 100) for share in (5, 10, 20, 30, 40, 50, 60)},
    "switch by AutoSwitch, geometric mean": in_step(
        "AutoSwitch, geometric mean", lambda lam: replace(step(lam), switch=AutoSwitch(mean="geometric"))
    ),
    "switch by RelativeNorm": in_step("RelativeNorm", lambda lam: replace(step(lam), switch=RelativeNorm())),
    "switch by Staleness": in_step("Staleness", lambda lam: replace(step(lam), switch=Staleness())),
    "switch by Concentration": in_step("Concentration", lambda lam: replace(step(lam), switch=Concentration())),
    "v frozen for all parameters": in_step("v frozen for all parameters", lambda lam: replace(step(lam), scope="all")),
    **{f"lam {lam:g}": pulling(lam) for lam in (0.0, 1e-3, 4e-3, 1.6e-2)},
    "the usual lam, 2e-4": replace(pulling(2e-4), change="lam 2e-4"),
    "the paper's preconditioner": in_step("the paper's preconditioner", lambda lam: replace(step(lam), form="paper")),
    "no bound on the step": in_step("no bound on the step", lambda lam: replace(step(lam), max_step=float("inf"))),
    "steps of at most 1": in_step("steps of at most 1", lambda lam: replace(step(lam), max_step=1.0)),
    "the paper's preconditioner, no bound": in_step(
        "the paper's preconditioner, no bound", lambda lam: replace(step(lam), form="paper", max_step=float("inf"))
    ),
    "v not frozen": Entry(lambda lam: Parts(lam, mask=True, freezes=False), of="STEP", recipe="STEP", frozen=False),
    **{f"v frozen at {share} %": freezing(share / 100, AT_ONCE, ramp=0) for share in (10, 30, 50, 70)},
    "v live": in_default("v live", lambda lam: RateScale(SRSTE(lam), ramp=0), AT_ONCE),
    "no scaled rate": in_default("no scaled rate", lambda lam: default(lam).recipe, AT_ONCE),
    "rate times the root of m/n": in_default("rate times the root of m/n", lambda lam: at_once(lam, power=0.5), AT_ONCE),
    "without its ramp, + StructureDecay": in_default("+ StructureDecay", lambda lam: StructureDecay(at_once(lam)), AT_ONCE),
    "without its ramp, + MaskDecay": in_default("+ MaskDecay", lambda lam: MaskDecay(at_once(lam)), AT_ONCE),
    **{f"default, v frozen at {share} %": freezing(share / 100, DEFAULT) for share in (10, 30, 70)},
    "default, v live": in_default("v live", lambda lam: RateScale(SRSTE(lam))),
    "default, no scaled rate": in_default("no scaled rate", lambda lam: default(lam).recipe),
    "default, root of m/n": in_default("root of m/n", lambda lam: default(lam, power=0.5)),
    "default, ramp of 10 %": in_default("ramp of 10 %", lambda lam: default(lam, ramp=0.1)),
    "default, ramp of 30 %": in_default("ramp of 30 %", lambda lam: default(lam, ramp=0.3)),
    "default + StructureDecay": in_default("+ StructureDecay", lambda lam: StructureDecay(default(lam))),
    "default + MaskDecay": in_default("+ MaskDecay", lambda lam: MaskDecay(default(lam))),
    "default + DenseTail": in_default("+ DenseTail", lambda lam: DenseTail(default(lam))),
    "default + Layerwise": in_default("+ Layerwise", lambda lam: Layerwise(default(lam))),
    "no masks, v frozen": in_step("no masks", lambda lam: Parts(lam, mask=False, freezes=True)),
}

ENTRIES = ROWS | CHANGES
