"""Figures as SVG in a page, and as files."""

from __future__ import annotations

import io
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
from lightning_step.reports.drawing import COLOURS, GRID, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inline_svg", "save_figure"]

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", "#000000": "ink"}
_VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(COLOURS)}
_VARIABLES |= {"#9bb8d3": "pale", "#1f4e79": "strong", "#c0392b": "limit", "#2e7d32": "switch"}  # of the variance figure


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
