"""Another learning rate for masked tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from typing_extensions import override

from lightning_step.functional import rate_factor
from lightning_step.pattern import NMPattern
from lightning_step.recipes.base import Recipe, check_power
from lightning_step.recipes.limits import check_limit, resolve_limit
from lightning_step.recipes.plan import Moment, Plan
from lightning_step.recipes.step import STEP
from lightning_step.recipes.wrapper import Wrapper

__all__ = ["RateScale"]


@dataclass(frozen=True)
class RateScale(Wrapper):
    r"""Train masked tensors faster while masks are on, because fewer weights share the work.

    .. math:: \gamma_{\mathrm{masked}} = \gamma\,(m/n)^{p_t}, \qquad p_t = p\,\min\big(1, (t - t_0)/r\big)

    For whoever has a learning rate that was found for dense training. Works with any optimizer that has a learning rate per
    parameter group. Decoupled weight decay of masked tensors grows with their rate.

    The higher rate comes little by little, for the same reason as a warm-up: in the first steps of a network it is too high.

    Args:
        recipe: How the masks are learned.
        power: :math:`p`.
        ramp: :math:`r`, from when masks begin (:math:`t_0`) until the rate is at its highest: optimizer steps (integer) or a
            fraction of all steps (float); 0: at once.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe, or ``ramp`` no number.
        ConfigurationError: If ``recipe`` has no masks, ``power`` is no number, or ``ramp`` is out of range; when fitting
            starts, if it is a fraction of nobody knows what.

    Example:
        >>> from lightning_step import NMPattern, SRSTE
        >>> rule = RateScale(SRSTE(), ramp=100).plan().rate
        >>> [rule(NMPattern(1, 4), 0.0, Moment(t, began=0)) for t in (0, 50, 100, 1000)]
        [1.0, 2.0, 4.0, 4.0]

    References:
        See `lightning_step.functional.rate_factor`.
    """

    recipe: Recipe = field(default_factory=STEP)
    power: float = 1.0
    ramp: int | float = 0.2

    def __post_init__(self) -> None:
        self.check_recipe()
        check_power("power", self.power)
        check_limit("ramp", self.ramp)

    @override
    def plan(self) -> Plan:
        return dataclasses.replace(self.recipe.plan(), rate=self._now)

    def _now(self, pattern: NMPattern, leak: float, moment: Moment) -> float:
        length = resolve_limit("ramp", self.ramp, moment.total_steps)
        gone = moment.t - moment.first
        return rate_factor(pattern, leak, self.power * (min(1.0, gone / length) if length else 1.0))
