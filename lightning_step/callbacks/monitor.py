"""The Lightning callback that says what to log of a run."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_step.callbacks.trainer import callbacks_of
from lightning_step.errors import ConfigurationError
from lightning_step.monitoring import MonitorOptions

__all__ = ["SparsityMonitor"]


class SparsityMonitor(pl.Callback):
    """Says what `STEPSparsityCallback` logs, and how often. Without one it logs as the defaults here say.

    Every logger of the trainer gets the scalars; TensorBoard gets histograms, a chart, text, a figure and hyperparameters,
    too. Nothing is measured between two logs, and nothing at all without a logger. What is logged is described in
    `lightning_step.monitoring`.

    Args:
        every: Optimizer steps between two logs; 0: never; None: the trainer's ``log_every_n_steps``. Steps at which
            something switches are logged as well, and so is the last.
        histograms_every: Optimizer steps between two histograms of every masked tensor; 0: none; None: ten times ``every``.
        per_layer: Also log flip rate, kept magnitude and norms of the second moment of every masked tensor by itself.
        text: Recipe, layer table and the reason of every switch on TensorBoard's text page.
        layout: One chart of TensorBoard's custom scalars with Z, its window mean, the threshold and the switch. Turn it off
            if the model lays out custom scalars itself: TensorBoard reads one layout per run.
        figure: The variance curve among TensorBoard's images, at every switch and at the end (needs matplotlib).
        hparams: TensorBoard's page of hyperparameters: those saved by the model and the recipe, with the final metrics.
        metrics: Tags of further final metrics for that page; None: what the trainer's callbacks monitor.

    Raises:
        ArgumentTypeError: If an interval is no integer.
        ConfigurationError: If an interval is negative or one does not divide the other; at ``setup``, if there are two of
            these, or no STEPSparsityCallback.

    Example:
        >>> SparsityMonitor(every=100, per_layer=True).options.every
        100
    """

    def __init__(
        self,
        every: int | None = None,
        histograms_every: int | None = None,
        per_layer: bool = False,
        text: bool = True,
        layout: bool = True,
        figure: bool = True,
        hparams: bool = True,
        metrics: list[str] | None = None,
    ) -> None:
        self.options = MonitorOptions(every, histograms_every, per_layer, text, layout, figure, hparams, metrics)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called first in every stage. Makes sure that there is somebody to listen to, and nobody who says otherwise."""
        others = callbacks_of(trainer)
        if sum(isinstance(callback, SparsityMonitor) for callback in others) > 1:
            raise ConfigurationError("Expected one SparsityMonitor per Trainer, but got several. Leave one.")
        if not any(hasattr(callback, "sparsifiers") for callback in others):
            raise ConfigurationError(
                "Expected a STEPSparsityCallback beside the SparsityMonitor, because it makes what there is to see, but got "
                f"{[type(callback).__name__ for callback in others]}. Add one to the trainer's callbacks."
            )
