"""Figures of what one run or several logged over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_step.figures import Curve, VarianceLog, blank_figure, draw_variance
from lightning_step.reports.drawing import COLOURS, INK, draw_curve, drawable, dress, label, legend_below, legend_columns
from lightning_step.reports.firings import Verdict
from lightning_step.reports.groups import Mark, MaskedGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "Picture", "draw_lines", "draw_loss", "draw_switch"]

SWITCH = "#2e7d32"


class Picture(NamedTuple):
    """A figure and what is said of it.

    Example:
        >>> Picture("loss", "Loss by phase", blank_figure(4, 3), "Lower is better.").name
        'loss'
    """

    name: str  # of its files, without ending
    title: str
    figure: Figure
    caption: str


class Line(NamedTuple):
    """A curve in a figure that compares.

    Example:
        >>> Line("dense", Curve((10, 20), (2.0, 1.5))).width
        1.6
    """

    name: str
    curve: Curve
    colour: str = COLOURS[0]
    width: float = 1.6
    style: str = "-"  # as matplotlib calls it


def draw_lines(lines: Sequence[Line], ylabel: str, size: tuple[float, float] = (5.5, 3.4)) -> Figure:
    """Several curves in one figure; on a log axis where they span more than two powers of ten.

    Args:
        lines: The curves.
        ylabel: What they are.
        size: Width and height in inches; the legend adds to the height.

    Returns:
        The figure.

    Example:
        >>> lines = [Line("dense", Curve((1, 2), (9.0, 1e-3)))]
        >>> draw_lines(lines, "norm of v").axes[0].get_yscale()
        'log'
    """
    columns = legend_columns([label(line.name) for line in lines], size[0], 4)
    figure = blank_figure(size[0], size[1] + 0.22 * math.ceil(len(lines) / columns))
    axes = figure.add_subplot()
    dress(axes, ylabel)
    for line in lines:
        draw_curve(axes, line.curve, line.name, line.colour, line.width, line.style)
    _choose_scale(axes, [value for line in lines for value in line.curve.values])
    legend_below(figure, 4)
    return figure


def draw_loss(lines: Sequence[Line], marks: Sequence[Mark], end: int, size: tuple[float, float] = (11.0, 3.6)) -> Figure:
    """Loss over time, the second phase shaded.

    Args:
        lines: Training and validation.
        marks: Where masks began and where v froze.
        end: The last step.
        size: Width and height in inches.

    Returns:
        The figure.

    Example:
        >>> lines = [Line("val_loss", Curve((10, 20), (2.0, 1.5)))]
        >>> axes = draw_loss(lines, [Mark(10, "masks on")], 20).axes[0]
        >>> [text.get_text() for text in axes.texts]
        ['masks on, step 10']
    """
    figure = draw_lines(lines, "loss", size)
    [axes] = figure.axes
    for i, mark in enumerate(marks):
        shaded = mark.what == "masks on"
        if shaded:
            axes.axvspan(mark.step, max(end, mark.step), color=SWITCH, alpha=0.07, linewidth=0)
        axes.axvline(mark.step, color=SWITCH, linewidth=1.2, linestyle="-" if shaded else ":")
        _write(axes, f"{mark.what}, step {mark.step}{' or before' * mark.or_before}", mark.step, 0.97 - 0.08 * i, end)
    return figure


def draw_switch(group: MaskedGroup, verdicts: Sequence[Verdict]) -> Figure:
    """The variance curve with the switch, and where other criteria would have fired.

    Args:
        group: What the run logged; it must have sampled Z.
        verdicts: What the criteria say.

    Returns:
        The figure.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> from lightning_step.reports.criteria import Firing
        >>> from lightning_step.reports.runs import Run
        >>> run = Run("a", Path("a"), EventLog({"sparsity/variance_change": Curve((10, 20), (2e-8, 1e-8))}))
        >>> figure = draw_switch(MaskedGroup(run, "sparsity"), [Verdict("Staleness", Firing(7, 7), "")])
        >>> figure.axes[0].texts[-1].get_text()
        'Staleness: step 7'
    """
    marks: dict[int, str] = {}
    for mark in group.marks:
        marks[mark.step] = f"{marks[mark.step]}, {mark.what}" if mark.step in marks else mark.what
    log = group.variance
    curves = (drawable(curve) for curve in (log.change, log.window_mean, log.threshold, log.phase))
    figure = draw_variance(VarianceLog(*curves), marks)
    figure.set_size_inches(11, 4.6)
    [axes] = figure.axes
    axes.set_title("")
    dress(axes, "change of the second moment", "optimizer steps")
    fired = [verdict for verdict in verdicts if verdict.firing is not None and verdict.firing.latest is not None]
    right = max([axes.get_xlim()[1], *(v.firing.latest for v in fired if v.firing and v.firing.latest)])
    axes.set_xlim(0, right)
    for i, verdict in enumerate(fired):
        assert verdict.firing is not None
        assert verdict.firing.latest is not None
        colour = COLOURS[(i + 1) % len(COLOURS)]
        first, last = verdict.firing.earliest or verdict.firing.latest, verdict.firing.latest
        axes.axvspan(first, last, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(last, color=colour, linewidth=1.2, linestyle=":" if verdict.firing.forced else "-.")
        _write(axes, f"{verdict.criterion}: {verdict.says}", last, 0.06 + 0.075 * i, right, colour)
    return figure


def _write(axes: Axes, text: str, step: float, height: float, end: float, colour: str = SWITCH) -> None:
    """Words beside a vertical line, on the side that has room."""
    left = step > end / 2
    axes.annotate(
        label(text, 80),
        (step, height),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        horizontalalignment="right" if left else "left",
        verticalalignment="center",
        color=colour,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )


def _choose_scale(axes: Axes, values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
        axes.set_yscale("log")
    elif finite and not any(finite):
        axes.set_ylim(0, 1)
    axes.tick_params(colors=INK, which="both")
