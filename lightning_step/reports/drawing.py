"""What all figures of a report share: colours, names in them, curves thinned for drawing, and SVG for a page."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lightning_step.errors import ConfigurationError
from lightning_step.export import check_writable
from lightning_step.figures import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "draw_curve", "drawable", "dress", "inline_svg", "label", "legend_below", "save_figure", "thin"]

INK, MUTED, GRID, PAPER = "#1f2933", "#5f6b76", "#dddddd", "#ffffff"
COLOURS = ("#1f6fb4", "#d9730d", "#2a8c5a", "#b5403a", "#7d5ba6", "#8c6d46", "#c2528b", "#3c8f9b")
POINTS = 600  # of one curve in one figure, about one per pixel
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", "#000000": "ink"}
_VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(COLOURS)}
_VARIABLES |= {"#9bb8d3": "pale", "#1f4e79": "strong", "#c0392b": "limit", "#2e7d32": "switch"}  # of the variance figure


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


def legend_below(figure: Figure, columns: int = 3) -> None:
    """One legend for all axes, below them; of equal names the first counts.

    Args:
        figure: The figure.
        columns: Names side by side.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> figure = blank_figure(4, 3)
        >>> legend_below(figure)
        >>> figure.legends
        []
    """
    handles = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            [*handles.values()], [*handles], loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK
        )


def inline_svg(figure: Figure, key: str, alt: str) -> str:
    """A figure as an element of a page, whose style sheet gives its colours (``--ink``, ``--series-0``, ...).

    Args:
        figure: The figure.
        key: Goes before every id, so that two figures of a page do not share one.
        alt: What it shows, for those who do not see it.

    Returns:
        One ``svg`` element without links to anywhere.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> inline_svg(blank_figure(4, 3), "loss", "Loss")[:38]
        '<svg role="img" aria-label="Loss" view'
    """
    content = io.StringIO()
    with _saving("none"):  # text as text, in the page's own font
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(content.getvalue())
    for element in list(svg.iter()):  # in a page, no element needs a namespace
        element.tag = element.tag.rpartition("}")[2]
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        named = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib = {name: _for_a_page(name, value, key) for name, value in named.items()}
    svg.attrib = {"role": "img", "aria-label": alt, "viewBox": svg.attrib["viewBox"]}  # the page gives the size
    return ElementTree.tostring(svg, encoding="unicode")


def _for_a_page(attribute: str, value: str, key: str) -> str:
    """An attribute with colours and font of the page, and with ids of its own."""
    if attribute == "id":
        return f"{key}-{value}"
    if attribute == "style":
        value = re.sub("#[0-9a-f]{6}", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], value)
        value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
        return re.sub(r"font-family: [^;]*;? ?", "", value)
    return re.sub(r"^(#|url\(#)", rf"\1{key}-", value)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a file.

    Args:
        figure: The figure.
        path: The file; its ending says in which format. Missing folders are made.

    Returns:
        The path.

    Raises:
        ConfigurationError: If it cannot be written, or nobody knows the format.

    Example:
        >>> import tempfile
        >>> from lightning_step.figures import blank_figure
        >>> save_figure(blank_figure(4, 3), tempfile.mkdtemp() + "/empty.png").name
        'empty.png'
    """
    path = check_writable(path)
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigurationError(f"Expected a file name that ends in one of {known}, but got {str(path)!r}.")
    with _saving("path"):  # looks the same wherever it is shown
        figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


@contextmanager
def _saving(text: str) -> Iterator[None]:
    import matplotlib as mpl

    # The salt makes the same figure the same bytes.
    with mpl.rc_context({"svg.fonttype": text, "svg.hashsalt": "lightning-step"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # names may hold any character
        yield
