"""Phase and window mean on whatever progress bar a Lightning ``Trainer`` has.

Note [Beside the metrics]
    Every bar of Lightning's, and whoever builds on one, shows what is in ``trainer.progress_bar_metrics``. We put plain
    numbers in there ourselves. ``self.log(..., prog_bar=True, logger=False)`` would do the same by way of tensors, which a
    bar has to fetch from the device, and would make our values metrics of the model: ``ModelCheckpoint`` would offer them
    as monitors, and a sweep would find them in ``trainer.callback_metrics``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_step.sparsifier import Sparsifier

__all__ = ["Progress"]


class Progress:
    """Keeps the progress bar up to date, at steps where there is something new to show.

    ``phase`` is 1 or 2. ``ratio`` is the window mean over the threshold, once the window is full and as long as a switch
    waits for it to fall below 1; the value it fired on stays for one step. With several optimizers it is ``phase/0``,
    ``phase/1`` and so on. A metric of the same name that the model itself shows on the bar is left alone.

    Args:
        sparsifiers: One per optimizer that holds masked tensors.
        read_every: Optimizer steps between two readings of the samples.

    Example:
        >>> Progress([], 10).values()
        {}
    """

    def __init__(self, sparsifiers: Sequence[Sparsifier], read_every: int) -> None:
        self._sparsifiers = sparsifiers
        self._read_every = max(1, read_every)
        self._seen: list[Any] = []
        self._shown: set[str] = set()

    def update(self, trainer: pl.Trainer) -> None:
        """After every batch: show what is new. See Note [Beside the metrics].

        Args:
            trainer: The trainer.
        """
        moment = [self._moment(sparsifier) for sparsifier in self._sparsifiers]
        if moment == self._seen or trainer.progress_bar_callback is None:
            return
        self._seen, values = moment, self.values()
        metrics: dict[str, Any] = trainer.progress_bar_metrics
        for name in self._shown - set(values):
            if isinstance(metrics.get(name), _Shown):
                del metrics[name]
        for name, value in values.items():
            if name not in metrics or isinstance(metrics[name], _Shown):
                metrics[name] = value
        self._shown = set(values)

    def values(self) -> dict[str, float]:
        """What to show now, without waiting for the device.

        Returns:
            Numbers by name.
        """
        shown: dict[str, float] = {}
        for i, sparsifier in enumerate(self._sparsifiers):
            end = f"/{i}" if len(self._sparsifiers) > 1 else ""
            shown[f"phase{end}"] = _Whole(sparsifier.phase)
            gauges = sparsifier.gauges()
            mean, threshold = gauges.get("window_mean"), gauges.get("threshold")
            if mean is not None and threshold:
                shown[f"ratio{end}"] = _Ratio(mean / threshold)
        return shown

    def _moment(self, sparsifier: Sparsifier) -> tuple[int, int, bool]:
        """Changes when samples were read, when something has switched, and in the step after that."""
        events = sparsifier.events
        return sparsifier.t // self._read_every, len(events), bool(events) and sparsifier.t > events[-1].step


class _Shown:
    """What we have put on the bar, to tell it from what others have."""


class _Whole(_Shown, int):
    """A number without decimals, also on a bar that writes every number with three."""

    def __format__(self, spec: str) -> str:
        return str(int(self))

    __str__ = int.__repr__


class _Ratio(_Shown, float):
    """Three digits that count, also on a bar that writes three decimals."""

    def __format__(self, spec: str) -> str:
        return format(float(self), ".3g")

    def __str__(self) -> str:
        return format(float(self), ".3g")
