"""What TensorBoard shows and other loggers cannot: histograms, text, pictures, a chart of several curves, hyperparameters.

Note [Whose hyperparameters]
    Of a run's hyperparameters TensorBoard believes what it reads first, and Lightning writes those of the module and the
    data module when fitting starts, if they were saved with ``save_hyperparameters``. So ours go to the same folder a moment
    earlier and bring those along. Metrics are named, not written a second time: TensorBoard shows the last value of the
    scalar of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_step.errors import ConfigurationError
from lightning_step.figures import VarianceLog, draw_variance
from lightning_step.monitoring.histograms import Histogram

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "boards_of"]

_LOGGED = ("variance_change", "window_mean", "threshold")
_WRITER = "torch.utils.tensorboard.writer.SummaryWriter"


class Board:
    """One TensorBoard folder.

    Args:
        writer: Writes to it.
        prefix: What its logger puts before every tag.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     Board(writer).text("sparsity/recipe", "`SRSTE()`", 0)
    """

    def __init__(self, writer: SummaryWriter, prefix: str = "") -> None:
        self._writer = writer
        self._prefix = prefix

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write to the text page.

        Args:
            tag: Under which name.
            markdown: The text.
            step: Where on the x-axis.
        """
        self._writer.add_text(self._prefix + tag, markdown, step)

    def layout(self, stems: Sequence[str]) -> None:
        """Put the curves of `logarithms` into one chart for every optimizer.

        Args:
            stems: What the tags of every optimizer begin with.
        """
        # TensorBoard reads regular expressions that have to match from the start, so the end has to be said.
        charts = {
            f"{stem}: log10 of Z, its window mean and the threshold": [
                "Multiline",
                [f"^{re.escape(f'{self._prefix}{stem}/log10/{name}')}$" for name in (*_LOGGED, "switch")],
            ]
            for stem in stems
        }
        self._writer.add_custom_scalars({"sparsity": charts})

    def logarithms(self, stem: str, scalars: Mapping[str, float], step: int) -> None:
        """Log decimal logarithms of Z, its window mean and the threshold: a chart of several curves has no log axis.

        Args:
            stem: What the tags begin with.
            scalars: Values by name. What has no logarithm is left out.
            step: Where on the x-axis.
        """
        for name in _LOGGED:
            if scalars.get(name, 0) > 0:
                self._writer.add_scalar(f"{self._prefix}{stem}/log10/{name}", log10(scalars[name]), step)

    def mark(self, stem: str, log: VarianceLog, step: int) -> None:
        """Mark a switch: two points over the height of the curves make an upright line.

        They are one step apart. Of two at the same step TensorBoard's fast loader, which is its default, shows the second.

        Args:
            stem: What the tags begin with.
            log: The curves so far.
            step: Where on the x-axis.
        """
        heights = [log10(v) for curve in (log.change, log.window_mean, log.threshold) for v in curve.values if v > 0]
        for at, height in ((step - 1, min(heights)), (step, max(heights))) if heights else ():
            self._writer.add_scalar(f"{self._prefix}{stem}/log10/switch", height, at)

    def histograms(self, stem: str, histograms: Iterable[Histogram], step: int) -> None:
        """Write histograms.

        Args:
            stem: What the tags begin with.
            histograms: From `lightning_step.monitoring.histograms`.
            step: Where on the x-axis.
        """
        for each in histograms:
            middles = [(left + right) / 2 for left, right in zip(each.edges, each.edges[1:], strict=False)]
            self._writer.add_histogram_raw(
                f"{self._prefix}{stem}/{each.kind}/{each.name}",
                min=each.edges[0],
                max=each.edges[-1],
                num=sum(each.counts),
                # Of the bins' middles: no page of TensorBoard reads these two.
                sum=sum(x * n for x, n in zip(middles, each.counts, strict=True)),
                sum_squares=sum(x * x * n for x, n in zip(middles, each.counts, strict=True)),
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def variance(self, tag: str, log: VarianceLog, marks: Mapping[int, str], step: int) -> None:
        """Draw the variance curve. Without matplotlib, or without a curve, there is nothing to do.

        Args:
            tag: Under which name.
            log: The curves.
            marks: Steps to mark, and what happened there.
            step: Where on the x-axis.
        """
        if not log.change.steps:
            return
        try:
            figure = draw_variance(log, marks)
        except ConfigurationError:  # no matplotlib: pictures are an extra
            return
        canvas: Any = figure.canvas
        canvas.draw()
        self._writer.add_image(self._prefix + tag, np.asarray(canvas.buffer_rgba()), step, dataformats="HWC")

    def begin(self, parameters: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Fill the page of hyperparameters. See Note [Whose hyperparameters].

        Args:
            parameters: Numbers and strings by name.
            metrics: Tags of the scalars whose last values are shown beside them.
        """
        experiment, start, _ = self._hparams(parameters, metrics)
        self._add(experiment, start)

    def end(self) -> None:
        """Say on the page of hyperparameters that the run is complete."""
        self._add(self._hparams({}, ())[2])
        self._writer.flush()

    def _add(self, *summaries: Any) -> None:
        for summary in summaries:
            self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def _hparams(self, parameters: Mapping[str, Any], metrics: Sequence[str]) -> tuple[Any, Any, Any]:
        from torch.utils.tensorboard.summary import hparams

        named = dict.fromkeys([self._prefix + tag if tag.startswith("sparsity/") else tag for tag in metrics])
        experiment, start, end = hparams(dict(parameters), named)  # type: ignore[no-untyped-call]
        return experiment, start, end


def boards_of(loggers: Iterable[object]) -> list[Board]:
    """The TensorBoard folders among some loggers.

    Args:
        loggers: Lightning loggers.

    Returns:
        One for each whose ``experiment`` is a ``SummaryWriter``; none on any process but the first.

    Example:
        >>> boards_of([])
        []
    """
    boards = []
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        # By name: where nobody has imported TensorBoard's writer, there is none.
        if any(f"{cls.__module__}.{cls.__qualname__}" == _WRITER for cls in type(writer).__mro__):
            prefix = getattr(logger, "_prefix", "")
            joint = getattr(logger, "LOGGER_JOIN_CHAR", "-") if prefix else ""
            boards.append(Board(writer, f"{prefix}{joint}"))
    return boards
