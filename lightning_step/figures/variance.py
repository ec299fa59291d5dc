"""The curve behind a switch: how much the second moment moved, and where masks began and v froze."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_step.figures.canvas import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "VarianceLog", "draw_variance"]


class Curve(NamedTuple):
    """One logged scalar.

    Example:
        >>> Curve((10, 20), (2e-8, 9e-9)).values[-1]
        9e-09
    """

    steps: tuple[int, ...]  # optimizer steps, rising
    values: tuple[float, ...]  # one per step


@dataclass(frozen=True)
class VarianceLog:
    """What one run logged of its switch; a curve may be empty.

    Example:
        >>> log = VarianceLog(Curve((10, 20), (2e-8, 9e-9)), Curve((), ()), Curve((), ()), Curve((10, 20, 30), (1, 2, 2)))
        >>> log.masks_on, log.frozen
        (20, 20)
    """

    change: Curve  # Z, the newest sample
    window_mean: Curve  # what the rule compares; empty before the window is full
    threshold: Curve  # what it is compared with
    phase: Curve  # 1 dense, 2 masks on

    @property
    def masks_on(self) -> int | None:
        """The first logged step with masks on; exact where the run decided as often as it logged.

        Returns:
            The step; None if masks never came on.
        """
        return next((step for step, phase in zip(*self.phase, strict=True) if phase == 2), None)

    @property
    def frozen(self) -> int | None:
        """The step of the last sample, if the run went on behind it: the switch that was watched fired on that sample.

        Returns:
            The step; None if it never fired.
        """
        last = self.change.steps[-1]
        return last if any(step > last for step in self.phase.steps) else None


def draw_variance(log: VarianceLog, marks: Mapping[int, str] | None = None) -> Figure:
    """Draw Z, its window mean and the threshold on a log axis, with the switch marked.

    Args:
        log: What to draw; ``change`` must not be empty.
        marks: What began at which step, where that is known better than from the curves.

    Returns:
        A figure that no window and no global state knows of.

    Raises:
        ConfigurationError: If matplotlib is not installed.

    Example:
        >>> none = Curve((), ())
        >>> draw_variance(VarianceLog(Curve((10, 20), (2e-8, 9e-9)), none, none, none)).axes[0].get_yscale()
        'log'
    """
    figure = blank_figure(8, 4.5)
    axes = figure.add_subplot()
    _draw(axes, log)
    _mark(axes, log, _marks_of(log) if marks is None else marks)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(axes: Axes, log: VarianceLog) -> None:
    if any(value > 0 for curve in (log.change, log.window_mean, log.threshold) for value in curve.values):
        axes.set_yscale("log")
    axes.plot(*log.change, color="#9bb8d3", linewidth=1, label="Z, mean change of v in one step")
    if log.window_mean.steps:
        axes.plot(*log.window_mean, color="#1f4e79", linewidth=2, label="mean of Z over the window")
    if log.threshold.steps:
        value = log.threshold.values[-1]
        axes.axhline(value, color="#c0392b", linestyle="--", linewidth=1.2, label=f"threshold {value:.3g}")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("change of the second moment")
    axes.set_title("How much Adam's second moment still moves")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _marks_of(log: VarianceLog) -> dict[int, str]:
    """Where masks began and where v froze, one mark if that was one event."""
    marks: dict[int, list[str]] = {}
    for step, what in ((log.masks_on, "masks on"), (log.frozen, "v frozen")):
        if step is not None:
            marks.setdefault(step, []).append(what)
    return {step: ", ".join(events) for step, events in marks.items()}


def _mark(axes: Axes, log: VarianceLog, marks: Mapping[int, str]) -> None:
    """Vertical lines at the marks; what comes long after the last is cut short."""
    end = max(log.phase.steps or log.change.steps)
    right = min(end, 2 * max(marks, default=end) or end) or 1  # masks may be on from step 0
    axes.set_xlim(0, right)
    for i, (step, what) in enumerate(sorted(marks.items())):
        before = step > right / 2  # no room for the label behind the line
        axes.axvline(step, color="#2e7d32", linewidth=1.2)
        axes.axvspan(step, right, color="#2e7d32", alpha=0.05, linewidth=0)
        axes.annotate(
            f"step {step} of {end}: {what}",
            (step, 0.95 - 0.08 * i),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if before else 6, 0),
            textcoords="offset points",
            horizontalalignment="right" if before else "left",
            verticalalignment="top",
            color="#2e7d32",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )
