"""Figures of what a benchmark found: the quality of recipes against pattern, freezing and switch point."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve, blank_figure
from lightning_step.pattern import NMPattern
from lightning_step.reports.drawing import COLOURS, INK, MUTED, draw_curve, dress, label, legend_below
from lightning_step.reports.results import Cell, Result, best_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_frozen", "draw_losses", "draw_patterns", "draw_switch_points"]

STYLES = ("-", ":", "-.", "o-")  # of lines, one for each pattern; dashes are for dense training


def draw_patterns(results: Sequence[Result]) -> Figure:
    """Final loss against n:m, one line for each recipe; dense training as a line across.

    Args:
        results: The runs; those with a ``change``, a forced switch or a forced ``frozen`` are left out.

    Returns:
        The figure.

    Raises:
        ConfigurationError: If no run has a pattern.

    Example:
        >>> runs = [Result("STEP", NMPattern(n, 8), 1.4 + 1 / n) for n in (1, 2, 4)]
        >>> [tick.get_text() for tick in draw_patterns(runs).axes[0].get_xticklabels()]
        ['4:8', '2:8', '1:8']
    """
    plain = [result for result in results if (result.change, result.switch, result.frozen) == (None, None, None)]
    cells = best_cells(plain, lambda result: (result.recipe, result.pattern))
    patterns = _patterns(plain)
    figure, axes = _axes("n:m, weights kept of a group")
    recipes = list(dict.fromkeys(recipe for recipe, pattern in cells if pattern))
    for i, recipe in enumerate(recipes):
        aside = 0.04 * (i - (len(recipes) - 1) / 2)  # or equal values would hide each other
        own = {patterns.index(p): cell for (name, p), cell in cells.items() if name == recipe and p}
        _points(axes, {x + aside: cell for x, cell in own.items()}, recipe, COLOURS[i % len(COLOURS)])
    _across(axes, plain)
    axes.set_xticks(range(len(patterns)), [str(pattern) for pattern in patterns])
    return _finished(figure, cells.values())


def draw_frozen(results: Sequence[Result]) -> Figure:
    """Final loss with the second moment frozen against live, side by side.

    Args:
        results: The runs; those that say whether it was ``frozen`` count.

    Returns:
        The figure.

    Raises:
        ConfigurationError: If no run says so.

    Example:
        >>> runs = [Result("STEP", NMPattern(2, 4), loss, frozen=loss < 1.5) for loss in (1.4, 1.6)]
        >>> [text.get_text() for text in draw_frozen(runs).legends[0].get_texts()]
        ['STEP, v frozen', 'STEP, v live']
    """
    said = [result for result in results if result.frozen is not None and result.change is None]
    cells = best_cells(said, lambda result: (result.recipe, result.frozen, result.pattern))
    patterns = _patterns(said, "frozen")
    figure, axes = _axes("n:m, weights kept of a group")
    kinds = sorted({(recipe, frozen) for recipe, frozen, _ in cells}, key=lambda kind: (kind[0], not kind[1]))
    width = 0.7 / len(kinds)
    for i, (recipe, frozen) in enumerate(kinds):
        own = {patterns.index(p): cell for (name, f, p), cell in cells.items() if (name, f) == (recipe, frozen) and p}
        at = {x + (i - (len(kinds) - 1) / 2) * width: cell for x, cell in own.items()}
        name = f"{recipe}, v {'frozen' if frozen else 'live'}"
        _points(axes, at, name, COLOURS[i % len(COLOURS)], line="")
    _across(axes, results)
    axes.set_xticks(range(len(patterns)), [str(pattern) for pattern in patterns])
    axes.set_xlim(-0.6, len(patterns) - 0.4)
    return _finished(figure, cells.values())


def draw_switch_points(results: Sequence[Result]) -> Figure:
    """Final loss against the fraction of the run at which it was made to switch.

    Args:
        results: The runs; those with a ``switch`` count.

    Returns:
        The figure.

    Raises:
        ConfigurationError: If no run has one.

    Example:
        >>> runs = [Result("STEP", NMPattern(2, 4), 1.4 + at, switch=at) for at in (0.1, 0.3)]
        >>> draw_switch_points(runs).axes[0].get_legend_handles_labels()[1]
        ['STEP 2:4']
    """
    forced = [result for result in results if result.switch is not None and result.change is None]
    _patterns(forced, "switch")
    cells = best_cells(forced, lambda result: (f"{result.recipe} {result.pattern}", result.switch))
    figure, axes = _axes("switch after this fraction of the run")
    for i, name in enumerate(dict.fromkeys(name for name, _ in cells)):
        own = {switch: cell for (each, switch), cell in cells.items() if each == name and switch is not None}
        _points(axes, dict(sorted(own.items())), name, COLOURS[i % len(COLOURS)])
    _across(axes, results)
    return _finished(figure, cells.values())


def draw_losses(results: Sequence[Result]) -> Figure:
    """Validation loss over time, the mean over seeds of each recipe's best setting; one panel for each optimizer.

    A recipe has a colour, a pattern a style of the line.

    Args:
        results: The runs; those with ``losses`` count.

    Returns:
        The figure.

    Raises:
        ConfigurationError: If no run has them.

    Example:
        >>> curve = Curve((100, 200), (2.0, 1.5))
        >>> runs = [Result("STEP", NMPattern(2, 4), 1.5, optimizer=name, losses=curve) for name in ("SGD", "Adam")]
        >>> [axes.get_title() for axes in draw_losses(runs).axes]
        ['SGD', 'Adam']
    """
    timed = [result for result in results if result.losses.steps and result.change is None and result.switch is None]
    if not timed:
        raise ConfigurationError("Expected results with `losses`, [step, loss] pairs over time, but got none.")
    cells = best_cells(timed, lambda result: (result.optimizer, result.recipe, result.pattern))
    panels = list(dict.fromkeys(optimizer for optimizer, _, _ in cells))
    recipes = list(dict.fromkeys(recipe for _, recipe, pattern in cells if pattern))
    patterns = _patterns(timed) if recipes else []
    figure = blank_figure(max(5.0 * len(panels), 8), 4.2)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        dress(axes, "validation loss" if panel == panels[0] else "")
        axes.set_title(label(panel), color=INK)
        for (optimizer, recipe, pattern), cell in cells.items():
            if optimizer == panel and pattern is None:
                draw_curve(axes, _mean_curve(cell), recipe, MUTED, 1.4, "--")
            elif optimizer == panel and pattern is not None:
                colour = COLOURS[recipes.index(recipe) % len(COLOURS)]
                style = STYLES[patterns.index(pattern) % len(STYLES)]
                draw_curve(axes, _mean_curve(cell), recipe, colour, 1.6, style)
        for pattern, style in zip(patterns, STYLES, strict=False):
            axes.plot([], [], style, color=MUTED, linewidth=1.6, markersize=3.5, label=str(pattern))
    legend_below(figure)
    return figure


def _mean_curve(cell: Cell) -> Curve:
    """Mean over the seeds at the steps that all of them have."""
    shared = sorted(set.intersection(*(set(run.losses.steps) for run in cell.runs)))
    each = [dict(zip(*run.losses, strict=True)) for run in cell.runs]
    return Curve(tuple(shared), tuple(statistics.fmean(run[step] for run in each) for step in shared))


def _patterns(results: Sequence[Result], needed: str = "") -> list[NMPattern]:
    """From mild to harsh."""
    found = {result.pattern for result in results if result.pattern is not None}
    if not found:
        what = f" and a value of `{needed}`" if needed else ""
        raise ConfigurationError(f"Expected results with n and m{what}, but got none of them.")
    return sorted(found, key=lambda pattern: (-pattern.n / pattern.m, pattern.m))


def _axes(xlabel: str) -> tuple[Figure, Axes]:
    figure = blank_figure(8, 4.6)
    axes = figure.add_subplot()
    dress(axes, "loss at the end", xlabel)
    return figure, axes


def _points(axes: Axes, cells: Mapping[float, Cell], name: str, colour: str, line: str = "-") -> None:
    means, spreads = [cell.mean for cell in cells.values()], [cell.spread for cell in cells.values()]
    axes.errorbar(
        [*cells],
        means,
        yerr=spreads,
        fmt=f"o{line}",
        color=colour,
        markersize=5,
        capsize=3,
        linewidth=1.6,
        label=label(name),
    )


def _across(axes: Axes, results: Sequence[Result]) -> None:
    """Dense training: without a pattern, and with nothing changed."""
    dense = [r for r in results if r.pattern is None and r.change is None and r.frozen is None and r.switch is None]
    for recipe, cell in best_cells(dense, lambda result: result.recipe).items():
        axes.axhline(cell.mean, color=MUTED, linestyle="--", linewidth=1.4, label=label(recipe))
        axes.axhspan(cell.mean - cell.spread, cell.mean + cell.spread, color=MUTED, alpha=0.12, linewidth=0)


def _finished(figure: Figure, cells: Iterable[Cell]) -> Figure:
    counts = [(len(cell.runs), cell.settings) for cell in cells]
    seeds, settings = (sorted({count[i] for count in counts}) for i in (0, 1))
    many = [f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in (seeds, settings)]
    said = f"mean and standard deviation over {many[0]} seed{'s' * (seeds != [1])}; the best of {many[1]} setting"
    figure.axes[0].set_title(f"{said}{'s' * (settings != [1])} of lr and lam", fontsize=9, color=MUTED)
    legend_below(figure)
    return figure
