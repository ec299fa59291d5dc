"""What the driver says while a model trains: that something began, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_step.pattern import NMPattern

__all__ = ["SwitchEvent", "bad_gradient", "bad_moment", "how_many", "no_moment"]


@dataclass(frozen=True)
class SwitchEvent:
    """Masks began, or the second moment froze, or both.

    Example:
        >>> print(SwitchEvent(100, True, True, "t_max reached", "T_max = 100", "8 tensors"))
        optimizer step 100: masks on, second moment frozen (8 tensors); t_max reached: T_max = 100
    """

    step: int  # optimizer steps taken
    masks: bool
    freeze: bool
    rule: str
    numbers: str
    what: str

    @property
    def begins(self) -> str:
        """What begins, in a few words."""
        return ", ".join(["masks on"] * self.masks + ["second moment frozen"] * self.freeze)

    def __str__(self) -> str:
        return f"optimizer step {self.step}: {self.begins} ({self.what}); {self.rule}: {self.numbers}"


def how_many(count: int, chosen: Sequence[NMPattern] = ()) -> str:
    """Which tensors an event is about.

    Args:
        count: How many.
        chosen: The patterns that were chosen for them just now, if any were.

    Returns:
        Readable.

    Example:
        >>> how_many(1), how_many(3, [NMPattern(2, 4), NMPattern(1, 4), NMPattern(2, 4)])
        ('1 tensor', '3 tensors: 1 of 1:4, 2 of 2:4')
    """
    parts = [f"{number} of {pattern}" for pattern, number in sorted(Counter(chosen).items())]
    return f"{count} tensor{'s' * (count != 1)}" + (f": {', '.join(parts)}" if parts else "")


def bad_gradient(t: int) -> str:
    """A gradient was not finite.

    Args:
        t: Optimizer steps taken.

    Returns:
        The warning.

    Example:
        >>> bad_gradient(4)[:60]
        'Expected finite gradients, but got NaN or infinity before op'
    """
    return (
        f"Expected finite gradients, but got NaN or infinity before optimizer step {t}: no variance sample was "
        "taken from it. Clip gradients, lower the learning rate, or find the layer with "
        "Trainer(detect_anomaly=True)."
    )


def bad_moment(names: Sequence[str], t: int) -> str:
    """A second moment that should freeze is not finite.

    Args:
        names: Parameters whose second moment is not finite.
        t: Optimizer steps taken.

    Returns:
        The warning.

    Example:
        >>> bad_moment(["fc.weight"], 4)[:62]
        'Expected a finite second moment at the switch, but got NaN or '
    """
    return (
        f"Expected a finite second moment at the switch, but got NaN or infinity in {names[0]!r} (and {len(names) - 1} "
        f"more) at optimizer step {t}: nothing is frozen. Go back to a checkpoint from before."
    )


def no_moment(names: Sequence[str], t: int) -> str:
    """None of the tensors to freeze has seen a gradient other than zero.

    Args:
        names: The parameters that should freeze.
        t: Optimizer steps taken.

    Returns:
        The warning.

    Example:
        >>> no_moment(["fc.weight"], 4)[:50]
        'Expected a second moment above zero at the switch,'
    """
    return (
        f"Expected a second moment above zero at the switch, but got zeros in all {len(names)} tensors to freeze (the first "
        f"is {names[0]!r}) after optimizer step {t}: no gradient but zero has reached them. The switch waits, "
        "and so does all that begins with it. Check that the loss depends on these tensors, or `exclude` them."
    )
