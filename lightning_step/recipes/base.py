"""What a recipe is: three answers, and nothing that changes from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.functional import PreconditionForm
from lightning_step.parametrization import Gradient
from lightning_step.pattern import NMPattern
from lightning_step.recipes.switches import Switch

__all__ = [
    "Freeze",
    "GradientRule",
    "PatternRule",
    "Plan",
    "Recipe",
    "Scope",
    "check_lam",
    "check_switch",
    "describe",
    "final_pattern",
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


PatternRule = Callable[[str, NMPattern, int], NMPattern]
"""Which n:m a tensor has now, from its name, the n:m it is to end with, and the optimizer steps taken."""


def final_pattern(name: str, pattern: NMPattern, t: int) -> NMPattern:
    """The rule of most recipes: every tensor has the n:m it is to end with, from the start.

    Args:
        name: Full name of the tensor.
        pattern: The n:m it is to end with.
        t: Optimizer steps taken.

    Returns:
        ``pattern``.

    Example:
        >>> str(final_pattern("fc.weight", NMPattern(2, 4), 0))
        '2:4'
    """
    return pattern


@dataclass(frozen=True)
class Plan:
    """A recipe's three answers.

    Args:
        masks: When masks begin; None: never.
        gradient: How the gradient passes once masks are on.
        freeze: When the second moment freezes, and how. A switch equal to ``masks`` is one event. None: never, then any
            torch optimizer will do.
        pattern: Which n:m has a tensor now.

    Example:
        >>> from lightning_step import STE
        >>> STE().plan().masks
        AtStep(step=0)
    """

    masks: Switch | None
    gradient: GradientRule = GradientRule()
    freeze: Freeze | None = None
    pattern: PatternRule = final_pattern


class Recipe(ABC):
    """Which n:m has a tensor now; how does the gradient pass; when do masks begin and when does v freeze.

    Recipes are frozen dataclasses of plain values: configuration that can be written in YAML. One that varies another
    wraps it and replaces a part of its plan.

    Example:
        >>> from lightning_step import SRSTE
        >>> SRSTE(lam=1e-3).plan().gradient.lam
        0.001
    """

    @abstractmethod
    def plan(self) -> Plan:
        """The three answers.

        Returns:
            The plan.
        """


def describe(value: object) -> Any:
    """A recipe as plain values, to store in checkpoints and manifests and to compare.

    Args:
        value: A recipe, a switch, or one of their fields.

    Returns:
        Dictionaries, lists, numbers and strings only.

    Example:
        >>> from lightning_step import SRSTE
        >>> describe(SRSTE())["type"]
        'SRSTE'
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float)) or value is None else repr(value)


def check_lam(lam: float) -> None:
    """Refuse a strength that is negative or no number.

    Args:
        lam: Strength of the SR-STE term.

    Raises:
        ConfigurationError: If it is below 0 or NaN.

    Example:
        >>> check_lam(2e-4)
    """
    if not lam >= 0:
        raise ConfigurationError(f"Expected `lam` >= 0, but got {lam!r}. It pulls pruned weights towards zero.")


def check_switch(name: str, value: object) -> None:
    """Refuse what is no switch, above all a bare number.

    Args:
        name: The argument it was given as.
        value: What was given.

    Raises:
        ArgumentTypeError: If it is no `Switch`.

    Example:
        >>> from lightning_step import AtStep
        >>> check_switch("at", AtStep(0.5))
    """
    if not isinstance(value, Switch):
        raise ArgumentTypeError(
            f"Expected `{name}` to be a switch, but got {value!r}. Write AtStep(500) for an optimizer step, AtStep(0.5) for "
            "a fraction of all, or AutoSwitch()."
        )
