"""Another learning rate for masked tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial

from typing_extensions import override

from lightning_step.functional import rate_factor
from lightning_step.recipes.base import Recipe, check_power
from lightning_step.recipes.plan import Plan
from lightning_step.recipes.step import STEP
from lightning_step.recipes.wrapper import Wrapper

__all__ = ["RateScale"]


@dataclass(frozen=True)
class RateScale(Wrapper):
    r"""Train masked tensors faster while masks are on, because fewer weights share the work.

    .. math:: \gamma_{\mathrm{masked}} = \gamma\,(m/n)^p

    For whoever has a learning rate that was found for dense training. Works with any optimizer that has a learning rate per
    parameter group. Decoupled weight decay of masked tensors grows with their rate.

    Args:
        recipe: How the masks are learned.
        power: :math:`p`.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe.
        ConfigurationError: If ``recipe`` has no masks, or ``power`` is no number.

    Example:
        >>> from lightning_step import NMPattern, SRSTE
        >>> RateScale(SRSTE(), power=0.5).plan().rate(NMPattern(1, 4), 0.0)
        2.0

    References:
        See `lightning_step.functional.rate_factor`.
    """

    recipe: Recipe = field(default_factory=STEP)
    power: float = 1.0

    def __post_init__(self) -> None:
        self.check_recipe()
        check_power("power", self.power)

    @override
    def plan(self) -> Plan:
        return dataclasses.replace(self.recipe.plan(), rate=partial(rate_factor, power=self.power))
