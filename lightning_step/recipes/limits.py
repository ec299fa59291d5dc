"""Moments of a run that a user names: a step, or a fraction of all steps."""

from __future__ import annotations

from typing import TypedDict

from lightning_step.errors import ArgumentTypeError, ConfigurationError

__all__ = ["Limits", "check_limit", "check_order", "resolve_limit", "resolve_limits"]


class Limits(TypedDict):
    """Between which optimizer steps a switch fires.

    Example:
        >>> Limits(t_min=10, t_max=50)["t_max"]
        50
    """

    t_min: int
    t_max: int


def check_limit(name: str, value: int | float) -> None:
    """Refuse what is neither a step nor a fraction.

    Args:
        name: The argument it was given as.
        value: An integer counts optimizer steps; a float in [0, 1] is a fraction of all.

    Raises:
        ArgumentTypeError: If it is no number.
        ConfigurationError: If it is out of range.

    Example:
        >>> check_limit("t_max", 0.5)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(
            f"Expected `{name}` to be an integer (optimizer steps) or a float (fraction of all steps), but got {value!r}."
        )
    if not value >= 0 or (isinstance(value, float) and value > 1):
        raise ConfigurationError(
            f"Expected `{name}` to be a step >= 0 (integer) or a fraction from 0.0 to 1.0 (float), but got {value!r}."
        )


def check_order(t_min: int | float, t_max: int | float) -> None:
    """Refuse the limits of a switch where the first comes after the last.

    Args:
        t_min: Never before.
        t_max: At the latest.

    Raises:
        ArgumentTypeError: If one is no number.
        ConfigurationError: If one is out of range, or they are in the wrong order. A step and a fraction cannot be compared
            before the run is known.

    Example:
        >>> check_order(0.1, 500)
    """
    check_limit("t_min", t_min)
    check_limit("t_max", t_max)
    if type(t_min) is type(t_max) and t_min > t_max:
        raise ConfigurationError(
            f"Expected `t_min` <= `t_max`, but got t_min={t_min} and t_max={t_max}. The switch is never before t_min and "
            "at t_max at the latest."
        )


def resolve_limit(name: str, value: int | float, total_steps: int | None) -> int:
    """The optimizer step a limit stands for.

    Args:
        name: The argument it was given as.
        value: The limit.
        total_steps: Optimizer steps of the whole run; None if nobody knows.

    Returns:
        The step.

    Raises:
        ConfigurationError: If it is a fraction of nobody knows what.

    Example:
        >>> resolve_limit("t_max", 0.5, 300)
        150
    """
    if isinstance(value, int):
        return value
    if total_steps is None:
        raise ConfigurationError(
            f"Expected a known number of optimizer steps, because {name}={value} is a fraction of it, but got an unlimited "
            "run (max_steps=-1), or one under manual optimization, which counts the steps of all optimizers together. Set "
            "max_steps or max_epochs; under manual optimization and in a plain loop pass `total_steps`, the steps that the "
            f"optimizer of the masked tensors takes; or give {name} as a whole number of optimizer steps."
        )
    return round(value * total_steps)


def resolve_limits(t_min: int | float, t_max: int | float, total_steps: int | None) -> Limits:
    """The optimizer steps that the limits of a switch stand for.

    Args:
        t_min: Never before.
        t_max: At the latest.
        total_steps: Optimizer steps of the whole run; None if nobody knows.

    Returns:
        Both.

    Raises:
        ConfigurationError: If one is a fraction of nobody knows what, or they are in the wrong order.

    Example:
        >>> resolve_limits(0.1, 50, 300)
        {'t_min': 30, 't_max': 50}
    """
    low, high = resolve_limit("t_min", t_min, total_steps), resolve_limit("t_max", t_max, total_steps)
    if low > high:
        raise ConfigurationError(
            f"Expected `t_min` <= `t_max`, but got t_min={t_min} (step {low}) and t_max={t_max} (step {high}) "
            f"in a run of {total_steps} optimizer steps."
        )
    return {"t_min": low, "t_max": high}
