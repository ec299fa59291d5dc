"""A figure of one scalar of every layer over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lightning_step.figures import Curve, blank_figure
from lightning_step.reports.drawing import INK, label
from lightning_step.reports.groups import Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MAX_LAYERS", "draw_layers"]

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
MAX_LAYERS = 400  # of a taller figure nobody sees the whole
COLUMNS = 160  # over time


def draw_layers(curves: Mapping[str, Curve], what: str, marks: Sequence[Mark] = ()) -> Figure:
    """One row for each layer, one column for each logged step; the last value stands at the right.

    Args:
        curves: Curves by name of the layer, at least one; of more than `MAX_LAYERS` the first are shown.
        what: What they are, for the colour bar.
        marks: Where masks began and where v froze.

    Returns:
        The figure.

    Example:
        >>> figure = draw_layers({"fc.weight": Curve((10, 20), (0.9, 0.95))}, "kept magnitude")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['fc.weight']
    """
    from matplotlib.colors import LogNorm

    shown = dict(list(curves.items())[:MAX_LAYERS])
    edges, cells = _cells([*shown.values()])
    figure = blank_figure(11, 1.1 + 0.2 * max(len(shown), 3))
    axes = figure.add_subplot()
    finite = cells[np.isfinite(cells)]
    positive = finite[finite > 0]
    wide = len(positive) > 0 and finite.min() >= 0 and positive.max() > 30 * positive.min()
    norm = LogNorm(positive.min(), positive.max()) if wide else None
    seen = np.ma.masked_invalid(np.maximum(cells, positive.min()) if wide else cells)  # no logarithm of 0
    mesh = axes.pcolormesh(edges, np.arange(len(shown) + 1), seen, cmap="viridis", norm=norm, rasterized=True, linewidth=0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.06, aspect=max(10, 2 * len(shown)), fraction=0.03)
    bar.set_label(f"{what}{', 0 as the lowest' if wide else ''}", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8, which="both")
    bar.outline.set_visible(False)
    _name_rows(axes, [*shown], cells)
    for mark in marks:
        axes.axvline(mark.step, color="#ffffff", linewidth=1.5, linestyle="-" if mark.what == "masks on" else ":")
    axes.set_xlim(edges[0], edges[-1])  # a mark may lie before all that was logged
    return figure


def _name_rows(axes: Axes, names: Sequence[str], cells: Array) -> None:
    axes.invert_yaxis()  # the first layer on top
    middles = np.arange(len(names)) + 0.5
    axes.set_yticks(middles, [label(name, 44) for name in names], fontsize=8)
    right = axes.secondary_yaxis("right")
    right.set_yticks(middles, [_last(row) for row in cells], fontsize=7)
    for each in (axes, right):
        each.tick_params(colors=INK, length=0)
    axes.set_xlabel("step", color=INK)
    axes.spines[:].set_visible(False)
    right.spines[:].set_visible(False)


def _last(row: Array) -> str:
    finite = row[np.isfinite(row)]
    return f"{finite[-1]:.3g}" if len(finite) else ""


def _cells(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Edges of the columns, and one row of values for each curve, NaN where nothing was logged."""
    steps = np.unique(np.concatenate([np.array(curve.steps, np.float64) for curve in curves]))
    size = math.ceil(len(steps) / COLUMNS)  # logged steps that share a column
    starts = steps[::size]
    step = starts[-1] - starts[-2] if len(starts) > 1 else 1.0
    # A column begins where its first value was logged, so that a mark stands at the edge of what it began.
    edges = np.append(starts, max(starts[-1] + step, steps[-1]))
    cells = np.full((len(curves), len(starts)), np.nan)
    for row, curve in zip(cells, curves, strict=True):
        values = np.array(curve.values, np.float64)
        columns = np.searchsorted(starts, np.array(curve.steps, np.float64), side="right") - 1
        sound = np.isfinite(values)
        totals = np.bincount(columns[sound], values[sound], len(starts))
        counts = np.bincount(columns[sound], minlength=len(starts))
        row[counts > 0] = totals[counts > 0] / counts[counts > 0]
    return edges, cells
