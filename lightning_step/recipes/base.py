"""What a recipe is: three answers, and nothing that changes from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.recipes.plan import Plan
from lightning_step.recipes.switches import Switch

__all__ = ["Recipe", "check_lam", "check_power", "check_switch", "describe"]


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
    if isinstance(value, Mapping):
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


def check_power(name: str, power: object) -> None:
    """Refuse a power that would slow masked tensors down, or blow them up.

    Args:
        name: The argument it was given as.
        power: What was given.

    Raises:
        ConfigurationError: If it is not in [0, 2].

    Example:
        >>> check_power("power", 1.0)
    """
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 2:
        raise ConfigurationError(
            f"Expected 0 <= `{name}` <= 2, the power of m/n that the rate of masked tensors is multiplied with, but got "
            f"{power!r}. 0 leaves the rate as it is."
        )


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
