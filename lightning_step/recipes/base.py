"""What a recipe is: three answers, and nothing that changes from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from lightning_step.errors import ConfigurationError
from lightning_step.functional import PreconditionForm
from lightning_step.parametrization import Gradient
from lightning_step.pattern import NMPattern
from lightning_step.recipes.switches import Switch

__all__ = ["Freeze", "GradientRule", "Recipe", "Scope", "check_lam", "describe"]

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
        >>> GradientRule("straight_through", lam=2e-4).fixed
        False
    """

    through: Gradient
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


class Recipe(ABC):
    """Which n:m has a tensor now; how does the gradient pass; when do masks begin and when does v freeze.

    Subclasses are frozen dataclasses of plain values: a recipe is configuration and can be written in YAML.

    Example:
        >>> from lightning_step import SRSTE
        >>> SRSTE(lam=1e-3).gradient().lam
        0.001
    """

    @abstractmethod
    def pattern(self, name: str, pattern: NMPattern, t: int) -> NMPattern:
        """Which n:m a tensor has now.

        Args:
            name: Full name of the tensor.
            pattern: The n:m it is to end with.
            t: Optimizer steps taken.

        Returns:
            The n:m after step ``t``.
        """

    @abstractmethod
    def gradient(self) -> GradientRule:
        """How the gradient passes once masks are on.

        Returns:
            The rule.
        """

    @abstractmethod
    def masks(self) -> Switch | None:
        """When masks begin.

        Returns:
            The switch; None: never.
        """

    @abstractmethod
    def freeze(self) -> Freeze | None:
        """When the second moment freezes, and how. An equal switch to that of `masks` is one event.

        Returns:
            The freeze; None: never, then any torch optimizer will do.
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
