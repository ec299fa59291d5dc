"""Hands what can be seen of the masks and of the second moment to loggers, when it is time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_step.monitoring.board import Board, boards_of
from lightning_step.monitoring.histograms import histograms
from lightning_step.monitoring.history import VarianceHistory
from lightning_step.monitoring.measure import measure
from lightning_step.monitoring.options import MonitorOptions
from lightning_step.monitoring.texts import hyperparameters, panel
from lightning_step.sparsifier import Sparsifier

__all__ = ["Monitor"]

_FINAL = ("phase", "ratio", "v_near_zero", "flip_rate", "density", "kept_magnitude")


class _Logger(Protocol):
    """All that is asked of a logger."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


class Monitor:
    """Watches the drivers of one model. Between two logs it does nothing and waits for nothing.

    Every process that trains the model needs one and has to call it alike: shards are added up over processes.

    Args:
        sparsifiers: One per optimizer that holds masked tensors, made with ``measure_every`` equal to ``options.every``.
        loggers: Whom to tell. TensorBoard is told more than others.
        options: What to log, and how often; both intervals are numbers.

    Example:
        >>> import torch
        >>> from lightning_step import SRSTE
        >>> class Prints:
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, sorted(metrics)[0], metrics["sparsity/density"])
        >>> model = torch.nn.Linear(8, 4)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=SRSTE(), measure_every=1)
        >>> Monitor([sparsifier], [Prints()], MonitorOptions(every=1, histograms_every=0)).observe(1)
        1 sparsity/density 0.5
    """

    def __init__(self, sparsifiers: Sequence[Sparsifier], loggers: Sequence[_Logger], options: MonitorOptions) -> None:
        self.options = options
        self._sparsifiers = sparsifiers
        self._loggers = loggers
        self._every = options.every or 0
        self._histories = [VarianceHistory() for _ in sparsifiers]
        self._seen = [0] * len(sparsifiers)  # switches of each that are logged already
        self._logged_at = self._drawn_at = -1

    @property
    def stems(self) -> list[str]:
        """What the tags of every optimizer begin with."""
        several = len(self._sparsifiers) > 1
        return [f"sparsity/{i}" if several else "sparsity" for i in range(len(self._sparsifiers))]

    def announce(self, parameters: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Fill TensorBoard's page of hyperparameters, before anybody else does.

        Args:
            parameters: Hyperparameters that are not ours.
            metrics: Tags of final metrics that are not ours.
        """
        if self._every and self.options.hparams:
            ours = [f"{stem}/{name}" for stem in self.stems for name in _FINAL]
            for board in self._boards():
                board.begin({**parameters, **hyperparameters(self._sparsifiers)}, [*ours, *metrics])

    def start(self, step: int) -> None:
        """Training starts, or goes on: what there is to say before the first step.

        Args:
            step: Where on the x-axis; it was logged by whoever took it.
        """
        self._logged_at = step
        self._seen = [len(sparsifier.events) for sparsifier in self._sparsifiers]
        if self._every:
            samples = ["threshold" in sparsifier.gauges() for sparsifier in self._sparsifiers]
            for board in self._boards():
                if self.options.layout and any(samples):
                    board.layout([stem for stem, has in zip(self.stems, samples, strict=True) if has])
                self._describe(board, step)

    def observe(self, step: int) -> None:
        """After every batch: log when it is time, and when something has switched.

        Args:
            step: Where on the x-axis.
        """
        seen, self._seen = self._seen, [len(sparsifier.events) for sparsifier in self._sparsifiers]
        switched = [now > before for now, before in zip(self._seen, seen, strict=True)]
        if self._every and step and step != self._logged_at and (step % self._every == 0 or any(switched)):
            self._log(step, switched)

    def finish(self, step: int) -> None:
        """Training has ended: log what was not logged yet, and draw the whole curve.

        Args:
            step: Where on the x-axis.
        """
        if not self._every or not step:
            return
        if step != self._logged_at:
            self._log(step, [False] * len(self._sparsifiers))
        boards = self._boards()
        self._draw(boards, step)
        for board in boards if self.options.hparams else ():
            board.end()

    def state_dict(self) -> list[dict[str, Any]]:
        """The curves drawn so far, as plain values.

        Returns:
            One per optimizer; nothing if nothing was logged.
        """
        states = [history.state_dict() for history in self._histories]
        return states if any(any(state.values()) for state in states) else []

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on with curves from before.

        Args:
            state: From `state_dict`.
        """
        for history, own in zip(self._histories, state, strict=False):
            history.load_state_dict(own)

    def _boards(self) -> list[Board]:
        return boards_of(self._loggers)

    def _log(self, step: int, switched: Sequence[bool]) -> None:
        self._logged_at = step
        readings = measure(self._sparsifiers)  # on every process, also where nobody is told
        metrics: dict[str, float] = {}
        for stem, reading, history in zip(self.stems, readings, self._histories, strict=True):
            history.add(step, reading.scalars)
            metrics |= {f"{stem}/{name}": value for name, value in reading.scalars.items()}
            for name, values in reading.layers.items() if self.options.per_layer else ():
                metrics |= {f"{stem}/layer/{name}/{key}": value for key, value in values.items()}
        for logger in self._loggers:
            logger.log_metrics(metrics, step=step)
        boards = self._boards()
        for board in boards:
            for stem, reading in zip(self.stems, readings, strict=True):
                board.logarithms(stem, reading.scalars, step)
        if any(switched):
            self._mark(boards, switched, step)
        every = self.options.histograms_every
        if every and (step % every == 0 or any(switched)):
            self._count(boards, step)

    def _mark(self, boards: Sequence[Board], switched: Sequence[bool], step: int) -> None:
        for board in boards:
            for stem, history, fresh in zip(self.stems, self._histories, switched, strict=True):
                if fresh:
                    board.mark(stem, history.log(), step)
            self._describe(board, step)
        self._draw(boards, step)

    def _describe(self, board: Board, step: int) -> None:
        if self.options.text:
            board.text("sparsity/recipe", panel(self._sparsifiers), step)

    def _draw(self, boards: Sequence[Board], step: int) -> None:
        if not self.options.figure or step == self._drawn_at:
            return
        self._drawn_at = step
        for stem, history, sparsifier in zip(self.stems, self._histories, self._sparsifiers, strict=True):
            marks = {event.step: event.begins for event in sparsifier.events}
            for board in boards:
                board.variance(f"{stem}/variance", history.log(), marks, step)

    def _count(self, boards: Sequence[Board], step: int) -> None:
        for stem, sparsifier in zip(self.stems, self._sparsifiers, strict=True):
            counted = histograms(sparsifier)  # on every process
            for board in boards:
                board.histograms(stem, counted, step)
