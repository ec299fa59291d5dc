"""What our callbacks ask of a Lightning ``Trainer`` and its module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_step.errors import ArgumentTypeError, ConfigurationError

__all__ = [
    "builds_late",
    "callbacks_of",
    "check_strategy",
    "check_total_steps",
    "log_interval",
    "steps_logged",
    "total_steps",
]


def check_total_steps(given: int | Sequence[int] | None) -> None:
    """Refuse numbers of steps that are none.

    Args:
        given: Optimizer steps of every optimizer, one number for all or one for each; None: not said.

    Raises:
        ArgumentTypeError: If there is something else than whole numbers.
        ConfigurationError: If one is below 1.

    Example:
        >>> check_total_steps([100, 500])
    """
    each = [given] if given is None or isinstance(given, (int, str)) or not isinstance(given, Sequence) else list(given)
    for steps in each:
        if given is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
            raise ArgumentTypeError(
                "Expected `total_steps` to be an integer, or a list of one for each optimizer (optimizer steps of the whole "
                f"run), but got {given!r}."
            )
        if steps is not None and steps < 1:
            raise ConfigurationError(f"Expected `total_steps` >= 1 (optimizer steps of the whole run), but got {given!r}.")


def total_steps(trainer: pl.Trainer, index: int = 0, given: int | Sequence[int] | None = None) -> int | None:
    """Optimizer steps that one optimizer takes in the whole run.

    Under manual optimization Lightning adds up the steps of all optimizers, and how many a batch brings is up to the user:
    only where a single optimizer runs until ``max_steps`` is the number known.

    Args:
        trainer: A trainer that is about to fit.
        index: Which of its optimizers.
        given: What the user says: one number for every optimizer, or a list of one for each; None: nothing.

    Returns:
        How many; None where nobody knows.

    Raises:
        ConfigurationError: If the list is not as long as the trainer's.

    Example:
        >>> trainer = pl.Trainer(max_steps=100, max_epochs=-1, logger=False, accelerator="cpu")
        >>> total_steps(trainer), total_steps(trainer, 1, [100, 20])
        (100, 20)
    """
    if isinstance(given, int):
        return given
    if given is not None:
        if trainer.optimizers and len(given) != len(trainer.optimizers):
            raise ConfigurationError(
                f"Expected `total_steps` with one entry for each of the {len(trainer.optimizers)} optimizers that "
                f"configure_optimizers returns, but got {list(given)}."
            )
        return given[index]
    module = trainer.lightning_module
    if module is not None and not module.automatic_optimization:
        alone = len(trainer.optimizers) == 1 and trainer.max_epochs == -1 and trainer.max_steps >= 0
        return trainer.max_steps if alone else None
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps >= 0 else None


def steps_logged(trainer: pl.Trainer, in_batch: bool = True) -> int:
    """What Lightning writes on the x-axis after a batch: with several optimizers a batch is one step, not one for each.

    Args:
        trainer: The trainer.
        in_batch: Whether this is asked by a hook that is called when a batch ends, or between batches.

    Returns:
        Steps after this batch.

    Example:
        >>> steps_logged(pl.Trainer(logger=False, accelerator="cpu"))
        0
    """
    module = trainer.lightning_module
    if module is None or module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped + in_batch  # it counts after that hook


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


def check_strategy(strategy: object) -> None:
    """Refuse strategies whose optimizer does not see the model's tensors.

    Args:
        strategy: The trainer's strategy.

    Raises:
        ConfigurationError: For FSDP1 and DeepSpeed.

    Example:
        >>> check_strategy(pl.Trainer(logger=False, accelerator="cpu").strategy)
    """
    for name in (cls.__name__ for cls in type(strategy).__mro__):
        if name in _HIDING:
            raise ConfigurationError(
                f"Expected a strategy that leaves every weight its shape, but got {type(strategy).__name__}: "
                f"{_HIDING[name]}, so groups of a weight cannot be found. Use ModelParallelStrategy with fully_shard "
                "(FSDP2) in configure_model, or DDPStrategy."
            )


_HIDING = {
    "FSDPStrategy": "FSDP1 flattens parameters and gives each process a run of them that begins and ends anywhere",
    "DeepSpeedStrategy": "DeepSpeed steps an optimizer of its own over flat fp32 copies of all parameters",
}
