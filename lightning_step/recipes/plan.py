"""The three answers of a recipe, as plain frozen values and functions of the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_step.functional import Layer, PreconditionForm
from lightning_step.parametrization import Gradient
from lightning_step.pattern import NMPattern
from lightning_step.recipes.switches import Switch

__all__ = [
    "AllocationRule",
    "FadeRule",
    "Freeze",
    "GradientRule",
    "Moment",
    "PatternRule",
    "Plan",
    "RateRule",
    "Scope",
    "final_pattern",
    "full_strength",
    "given_rate",
]

Scope = Literal["masked", "all"]
"""Whose second moment is frozen: that of the ``masked`` tensors, or of ``all`` the optimizer holds."""


@dataclass(frozen=True)
class GradientRule:
    r"""How the gradient passes a mask.

    Args:
        through: ``"straight_through"`` to every weight, or ``"masked"``.
        lam: Strength of the SR-STE term :math:`\lambda\,(1-\Pi)\odot w`, added once per optimizer step.
        fixed: The mask is made once, when masks begin, and kept: pruned weights are held at zero.

    Example:
        >>> GradientRule(lam=2e-4).fixed
        False
    """

    through: Gradient = "straight_through"
    lam: float = 0.0
    fixed: bool = False


@dataclass(frozen=True)
class Freeze:
    """When and how the second moment becomes a preconditioner.

    Args:
        when: The switch.
        scope: Whose second moment.
        form: How D is made from v.
        max_step: Largest move of one coordinate in learning rates; None: Adam's own bound.

    Example:
        >>> from lightning_step import AtStep
        >>> Freeze(AtStep(100)).scope
        'masked'
    """

    when: Switch
    scope: Scope = "masked"
    form: PreconditionForm = "adam"
    max_step: float | None = None


class Moment(NamedTuple):
    """Where a run is.

    Example:
        >>> Moment(120, began=100, total_steps=400).t
        120
    """

    t: int  # optimizer steps taken
    began: int | None = None  # steps taken when masks began; None before
    total_steps: int | None = None  # optimizer steps of the whole run; None if nobody knows

    @property
    def first(self) -> int:
        """Steps taken when masks began, or now: masks that have not begun would do so now."""
        return self.t if self.began is None else self.began


PatternRule = Callable[[str, NMPattern, Moment], NMPattern]
"""Which n:m a tensor has now, from its name, the n:m it is to end with, and the moment."""

FadeRule = Callable[[Moment], float]
"""What pruned weights are multiplied with now: 0 for a mask at full strength, 1 for none at all."""

AllocationRule = Callable[[Sequence[str], Sequence[Layer]], Sequence[NMPattern]]
"""Which n:m each tensor is to end with, from names and statistics of all; asked once, when masks begin."""


RateRule = Callable[[NMPattern, float, Moment], float]
"""What the learning rate of a masked tensor is multiplied with: from its n:m, what pruned weights are multiplied with, and
the moment."""


def final_pattern(name: str, pattern: NMPattern, moment: Moment) -> NMPattern:
    """The rule of most recipes: every tensor has the n:m it is to end with, from the start.

    Args:
        name: Full name of the tensor.
        pattern: The n:m it is to end with.
        moment: Where the run is.

    Returns:
        ``pattern``.

    Example:
        >>> str(final_pattern("fc.weight", NMPattern(2, 4), Moment(0)))
        '2:4'
    """
    return pattern


def full_strength(moment: Moment) -> float:
    """The rule of most recipes: what is pruned is zero, from the start.

    Args:
        moment: Where the run is.

    Returns:
        0.

    Example:
        >>> full_strength(Moment(0))
        0.0
    """
    return 0.0


def given_rate(pattern: NMPattern, leak: float, moment: Moment) -> float:
    """The rule of most recipes: masked tensors are trained at the rate of all others.

    Args:
        pattern: The n:m now.
        leak: What pruned weights are multiplied with.
        moment: Where the run is.

    Returns:
        1.

    Example:
        >>> given_rate(NMPattern(2, 4), 0.0, Moment(0))
        1.0
    """
    return 1.0


@dataclass(frozen=True)
class Plan:
    """A recipe's three answers.

    Args:
        masks: When masks begin; None: never.
        gradient: How the gradient passes once masks are on.
        freeze: When the second moment freezes, and how. A switch equal to ``masks`` is one event. None: never, then any
            torch optimizer will do.
        pattern: Which n:m has a tensor now. From the last step of a run on it has to be the one it is to end with.
        fade: What pruned weights are multiplied with now. From the last step of a run on it has to be 0.
        rate: What the learning rate of a masked tensor is multiplied with, while masks are on.
        allocate: Which n:m each tensor is to end with; None: the one the user gave it.

    Example:
        >>> from lightning_step import STE
        >>> STE().plan().masks
        AtStep(step=0)
    """

    masks: Switch | None
    gradient: GradientRule = GradientRule()
    freeze: Freeze | None = None
    pattern: PatternRule = final_pattern
    fade: FadeRule = full_strength
    rate: RateRule = given_rate
    allocate: AllocationRule | None = None
