"""From a Lightning ``Trainer`` to a `lightning_step.monitoring.Monitor`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params

from lightning_step.callbacks.trainer import callbacks_of, log_interval
from lightning_step.monitoring import Monitor, MonitorOptions
from lightning_step.monitoring.board import boards_of

__all__ = ["announce", "monitor_options", "saved_hyperparameters"]


def monitor_options(trainer: pl.Trainer, on: bool | int) -> MonitorOptions:
    """What to log, and how often, the same on every process.

    Args:
        trainer: A trainer that is about to fit. The options are those of the SparsityMonitor among its callbacks.
        on: False to log nothing at all; a number for another interval than the trainer's.

    Returns:
        Options with numbers for both intervals.

    Example:
        >>> monitor_options(pl.Trainer(logger=False, accelerator="cpu"), True).every
        0
    """
    given = [getattr(callback, "options", None) for callback in callbacks_of(trainer)]
    chosen = next((options for options in given if isinstance(options, MonitorOptions)), MonitorOptions())
    interval = int(on) if trainer.loggers and on is not True else log_interval(trainer)
    options = chosen.resolve(interval)
    if not boards_of(trainer.loggers if options.every else ()):
        options = replace(options, histograms_every=0)  # nobody can show them
    # Loggers may differ from process to process, but all have to measure at the same steps.
    agreed: MonitorOptions = trainer.strategy.broadcast(options)
    return agreed


def announce(monitor: Monitor, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Hand the monitor what others have to say for TensorBoard's page of hyperparameters.

    Args:
        monitor: The monitor.
        trainer: The trainer.
        pl_module: The module it fits.

    Example:
        >>> trainer = pl.Trainer(logger=False, accelerator="cpu")
        >>> announce(Monitor([], [], MonitorOptions(every=0)), trainer, pl.LightningModule())
    """
    saved = saved_hyperparameters(trainer, pl_module)
    metrics = monitor.options.metrics
    if metrics is None:
        watched = [getattr(callback, "monitor", None) for callback in callbacks_of(trainer)]
        metrics = [name for name in watched if isinstance(name, str)]
        # Lightning logs a scalar of this name beside hyperparameters, for modules to overwrite.
        metrics += ["hp_metric"] * any(getattr(logger, "_default_hp_metric", False) for logger in trainer.loggers if saved)
    monitor.announce(saved, metrics)


def saved_hyperparameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """What module and data module saved with ``save_hyperparameters``, and want to have logged.

    Args:
        trainer: The trainer.
        pl_module: The module it fits.

    Returns:
        Numbers and strings by name, as Lightning's TensorBoardLogger writes them.

    Example:
        >>> saved_hyperparameters(pl.Trainer(logger=False, accelerator="cpu"), pl.LightningModule())
        {}
    """
    saved: dict[str, Any] = {}
    for source in (pl_module, getattr(trainer, "datamodule", None)):
        if source is not None and getattr(source, "_log_hyperparams", False):
            saved |= source.hparams_initial
    saved.pop("_class_path", None)  # LightningCLI's own
    flat: dict[str, Any] = _sanitize_params(_flatten_dict(saved))
    return flat
