"""What our callbacks ask of a Lightning ``Trainer`` and its module."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["builds_late", "callbacks_of", "log_interval", "total_steps"]


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run.

    Args:
        trainer: A trainer that is about to fit.

    Returns:
        How many; None for a run without an end.

    Example:
        >>> total_steps(pl.Trainer(max_steps=100, max_epochs=-1, logger=False, accelerator="cpu"))
        100
    """
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps >= 0 else None


def log_interval(trainer: pl.Trainer) -> int:
    """How often to log.

    Args:
        trainer: The trainer.

    Returns:
        Optimizer steps between two logs; 0: never.

    Example:
        >>> log_interval(pl.Trainer(log_every_n_steps=5, logger=False, accelerator="cpu"))  # no logger
        0
    """
    return int(trainer.log_every_n_steps) if trainer.loggers else 0  # type: ignore[attr-defined]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer.

    Args:
        trainer: The trainer.

    Returns:
        Its callbacks, in the order they are called.

    Example:
        >>> callbacks_of(pl.Trainer(barebones=True, accelerator="cpu"))
        []
    """
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def builds_late(pl_module: pl.LightningModule) -> bool:
    """Whether a module makes layers after the callbacks' ``setup``.

    Args:
        pl_module: The module.

    Returns:
        True if it has a ``setup`` or ``configure_model`` of its own.

    Example:
        >>> builds_late(pl.LightningModule())
        False
    """
    return any(is_overridden(hook, pl_module, pl.LightningModule) for hook in ("setup", "configure_model"))
