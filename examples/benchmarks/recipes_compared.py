"""The rows of the comparison: a name, and the recipe it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from typing_extensions import override

from lightning_step import ASP, SRSTE, STEP, AtStep, AutoSwitch, Dense, Recipe, Switch
from lightning_step.recipes import Freeze, GradientRule, Plan


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    make: Callable[[float], Recipe]  # from lam
    has_lam: bool = True
    masked: bool = True


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


PATTERNS = ("2:4", "1:8")

ROWS = {
    "dense": Row(lambda lam: Dense(), has_lam=False, masked=False),
    "ASP": Row(lambda lam: ASP(), has_lam=False),
    "SR-STE": Row(lambda lam: SRSTE(lam)),
    "STEP": Row(step),
    "STEP, masks from the start, v frozen at 30 %": Row(
        lambda lam: replace(step(lam), switch=AtStep(0.3), masks_from=AtStep(0))
    ),
}

ABLATIONS = {
    "switch at 10 %": Row(lambda lam: replace(step(lam), switch=AtStep(0.1))),
    "switch at 30 %": Row(lambda lam: replace(step(lam), switch=AtStep(0.3))),
    "v frozen for all parameters": Row(lambda lam: replace(step(lam), scope="all")),
    "the usual lam, 2e-4": Row(lambda lam: step(2e-4), has_lam=False),
    "the paper's preconditioner": Row(lambda lam: replace(step(lam), form="paper")),
    "no bound on the step": Row(lambda lam: replace(step(lam), max_step=float("inf"))),
    "v not frozen": Row(lambda lam: Parts(lam, mask=True, freezes=False)),
    "no masks, v frozen": Row(lambda lam: Parts(lam, mask=False, freezes=True)),
}
