from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve, blank_figure
from lightning_step.reports.drawing import COLOURS, draw_curve, label, legend_below
from lightning_step.reports.saving import inline_svg, save_figure
from tests.reports.conftest import NASTY


def test_a_page_gets_svg_without_links_styles_and_shared_ids() -> None:
    figure = blank_figure(4, 3)
    axes = figure.add_subplot()
    draw_curve(axes, Curve((1, 2, 3), (0.5, 0.25, math.inf)), NASTY, COLOURS[1])
    axes.set_title(label(NASTY))
    axes.set_yscale("log")
    legend_below(figure)
    one, two = (ET.fromstring(inline_svg(figure, key, "a < b")) for key in ("one", "two"))
    ids = [{element.attrib["id"] for element in svg.iter() if "id" in element.attrib} for svg in (one, two)]
    assert not ids[0] & ids[1]
    assert one.attrib == {"role": "img", "aria-label": "a < b", "viewBox": "0 0 288 216"}
    assert not [element.tag for element in one.iter() if element.tag in ("style", "metadata") or "}" in element.tag]
    links = {value for element in one.iter() for name, value in element.attrib.items() if name.endswith("href")}
    assert links
    assert all(link[1:] in ids[0] for link in links)
    styles = " ".join(element.get("style", "") for element in one.iter())
    assert "var(--series-1)" in styles
    assert "var(--ink)" in styles
    assert "font-family" not in styles
    words = "".join(one.itertext())
    assert words.count('<script>alert("x")<') == 2, "in the title and in the legend, as text"
    assert "NaN or infinite" in words


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for i in range(2):
        figure = blank_figure(4, 3)
        draw_curve(figure.add_subplot(), Curve((1, 2), (0.5, 0.25)), "a", COLOURS[0])
        written.append(save_figure(figure, tmp_path / f"{i}.svg").read_bytes())
    assert written[0] == written[1]


def test_a_figure_in_a_format_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Expected a file name that ends in one of \[.*'png'.* but got '.*a\.doc'"):
        save_figure(blank_figure(1, 1), tmp_path / "a.doc")
