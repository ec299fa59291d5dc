"""Which of a run's scalars are losses, and what they were in each phase."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve
from lightning_step.reports.runs import Run

__all__ = ["PhaseLosses", "is_validation", "loss_curves", "phase_losses"]


class PhaseLosses(NamedTuple):
    """One loss before and after masks came on; None where it was not logged, or never was finite.

    Example:
        >>> PhaseLosses(2.0, 3.0, 1.5, 1.5).final
        1.5
    """

    before: float | None  # the last one while dense
    worst: float | None  # the highest with masks on
    final: float | None
    best: float | None


def loss_curves(run: Run, tags: Sequence[str] = ()) -> dict[str, Curve]:
    """The losses of a run, those of training first.

    Args:
        run: The run.
        tags: Which scalars they are; by default all whose name holds "loss", without the means over an epoch of what was
            logged in each step, too.

    Returns:
        Curves by tag.

    Raises:
        ConfigurationError: If the run logged none of the tags.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> log = EventLog({tag: Curve((1,), (2.0,)) for tag in ("val_loss", "lr", "train_loss_epoch", "train_loss_step")})
        >>> list(loss_curves(Run("a", Path("a"), log)))
        ['train_loss_step', 'val_loss']
    """
    scalars = run.log.scalars
    if tags:
        found = [tag for tag in tags if tag in scalars]
        if not found and scalars:
            raise ConfigurationError(
                f"Expected a scalar of run {run.name!r} for --loss, but got {list(tags)}. It logged: "
                f"{', '.join(sorted(scalars)[:12])}."
            )
    else:
        found = [tag for tag in scalars if re.search("loss", tag, re.IGNORECASE) and "sparsity/" not in tag]
        found = [tag for tag in found if not (tag.endswith("_epoch") and f"{tag[: -len('_epoch')]}_step" in found)]
    return {tag: scalars[tag] for tag in sorted(found, key=lambda tag: (is_validation(tag), tag))}


def is_validation(tag: str) -> bool:
    """Whether a scalar is of data that was not trained on, by its name.

    Args:
        tag: Its name.

    Returns:
        True for validation and test.

    Example:
        >>> is_validation("val/loss"), is_validation("train_loss")
        (True, False)
    """
    return re.search(r"val|test|eval", tag, re.IGNORECASE) is not None


def phase_losses(curve: Curve, masks_on: int | None) -> PhaseLosses:
    """What a loss was before masks came on, at worst afterwards, and at the end.

    Args:
        curve: The loss.
        masks_on: After which optimizer step; None if they never did.

    Returns:
        Four values.

    Example:
        >>> phase_losses(Curve((9, 19, 29), (2.0, 3.0, 1.5)), 10)
        PhaseLosses(before=2.0, worst=3.0, final=1.5, best=1.5)
    """
    points = [(step, value) for step, value in zip(*curve, strict=True) if math.isfinite(value)]
    dense = [value for step, value in points if masks_on is None or step < masks_on]
    sparse = [value for step, value in points if masks_on is not None and step >= masks_on]
    values = [value for _, value in points]
    return PhaseLosses(
        dense[-1] if dense and masks_on is not None else None,
        max(sparse, default=None),
        values[-1] if values else None,
        min(values, default=None),
    )
