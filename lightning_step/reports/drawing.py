"""What all figures of a report share: colours, names in them, and curves thinned for drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_step.figures import Curve

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "draw_curve",
    "drawable",
    "dress",
    "label",
    "legend_below",
    "legend_columns",
    "thin",
]

INK, MUTED, GRID, PAPER = "#1f2933", "#5f6b76", "#dddddd", "#ffffff"
COLOURS = ("#1f6fb4", "#d9730d", "#2a8c5a", "#b5403a", "#7d5ba6", "#8c6d46", "#c2528b", "#3c8f9b")
POINTS = 600  # of one curve in one figure, about one per pixel
ROW, ROWS = 0.22, 2  # height of a row of a legend, in inches, and how many a figure has room for


def label(text: str, longest: int = 48) -> str:
    r"""A name as a figure can show it.

    Args:
        text: Any characters.
        longest: How many are shown; of more, the middle is left out.

    Returns:
        The name without line breaks and control characters, and with dollars that are no formula.

    Example:
        >>> print(label("a\tb$c$"))
        a b\$c\$
        >>> label("model.layers.17.self_attn.q_proj.weight", 20)
        'model.laye…oj.weight'
    """
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(shown) > longest:
        shown = f"{shown[: longest // 2]}…{shown[len(shown) - longest // 2 + 1 :]}"
    # matplotlib leaves what begins with "_" out of a legend, and takes what stands between two "$" for a formula.
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """Leave points out where a figure could not show them: of every stretch the lowest and the highest stay.

    Args:
        curve: The curve.
        points: About how many to keep.

    Returns:
        A curve with the first and the last point, all extremes, and gaps where values were not finite.

    Example:
        >>> thin(Curve(tuple(range(9)), (0.0, 1.0, 9.0, 1.0, 0.0, 1.0, 1.0, -5.0, 1.0)), points=4)
        Curve(steps=(0, 2, 5, 7, 8), values=(0.0, 9.0, 1.0, -5.0, 1.0))
    """
    count = len(curve.steps)
    if count <= points:
        return curve
    size, kept = math.ceil(2 * count / points), {0, count - 1}
    for start in range(0, count, size):
        stretch = range(start, min(start + size, count))
        finite = [i for i in stretch if math.isfinite(curve.values[i])]
        kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)} if finite else set()
        kept |= {next(i for i in stretch if not math.isfinite(curve.values[i]))} if len(finite) < len(stretch) else set()
    chosen = sorted(kept)
    return Curve(tuple(curve.steps[i] for i in chosen), tuple(curve.values[i] for i in chosen))


def drawable(curve: Curve) -> Curve:
    """A curve as matplotlib can draw it.

    Args:
        curve: As it was logged.

    Returns:
        It, thinned, with NaN for what is infinite: lines end there.

    Example:
        >>> drawable(Curve((1, 2), (0.5, float("inf"))))
        Curve(steps=(1, 2), values=(0.5, nan))
    """
    shown = thin(curve)
    return Curve(shown.steps, tuple(value if math.isfinite(value) else math.nan for value in shown.values))


def draw_curve(axes: Axes, curve: Curve, name: str, colour: str, width: float = 1.6, style: str = "-") -> None:
    """Draw one curve; red ticks at the bottom where its value was NaN or infinite.

    Args:
        axes: Where.
        curve: What.
        name: For the legend.
        colour: One of `COLOURS`.
        width: Of the line, in points.
        style: Of the line, as matplotlib calls it; "o-" for one with a dot at every point.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> axes = blank_figure(4, 3).add_subplot()
        >>> draw_curve(axes, Curve((1, 2), (0.5, float("nan"))), "loss", COLOURS[0])
        >>> len(axes.lines)
        2
    """
    shown = drawable(curve)
    style = "o" if sum(map(math.isfinite, shown.values)) == 1 else style  # a line needs two
    axes.plot(*shown, style, color=colour, linewidth=width, markersize=3.5, label=label(name))
    broken = [step for step, value in zip(*shown, strict=True) if not math.isfinite(value)]
    if broken:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            broken, [0.0] * len(broken), "|", color="#c0392b", markersize=12, transform=bottom, label="NaN or infinite"
        )


def dress(axes: Axes, ylabel: str = "", xlabel: str = "step") -> None:
    """Axes as they look in every figure.

    Args:
        axes: The axes.
        ylabel: Beside them.
        xlabel: Below them.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> axes = blank_figure(4, 3).add_subplot()
        >>> dress(axes, "loss")
        >>> axes.get_ylabel()
        'loss'
    """
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(label(ylabel), color=INK)
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, which="both")


def legend_columns(names: Iterable[str], width: float, most: int) -> int:
    """How many names of a legend have room beside each other.

    Args:
        names: As `label` gives them.
        width: Of the figure, in inches.
        most: At most so many.

    Returns:
        A number of columns, 1 or more.

    Example:
        >>> legend_columns(["dense", "step"], 5.5, 4), legend_columns(["x" * 40], 5.5, 4)
        (4, 1)
    """
    needed = 45 + 6.3 * max(map(len, names), default=0)  # points: the line, and about so much for a letter
    return max(1, min(most, int(72 * width / needed)))


def legend_below(figure: Figure, columns: int = 3) -> None:
    """One legend for all axes, below them; of equal names the first counts. A long one makes the figure higher.

    Args:
        figure: The figure.
        columns: At most so many names beside each other.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> figure = blank_figure(4, 3)
        >>> legend_below(figure)
        >>> figure.legends
        []
    """
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, line)
    if handles:
        room = legend_columns(handles, figure.get_figwidth(), columns)
        rows = math.ceil(len(handles) / room)
        figure.set_figheight(figure.get_figheight() + ROW * max(0, rows - ROWS))
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=room, frameon=False, labelcolor=INK)
