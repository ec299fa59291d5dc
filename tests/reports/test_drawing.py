from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve, blank_figure
from lightning_step.reports.drawing import COLOURS, draw_curve, inline_svg, label, legend_below, save_figure, thin
from tests.reports.conftest import NASTY


def colours(path: Path) -> int:
    """How many colours a picture has."""
    from matplotlib.image import imread

    pixels = np.ascontiguousarray((imread(path) * 255).astype(np.uint8))  # (height, width, 4)
    return len(np.unique(pixels.view(np.uint32)))


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=400), st.integers(4, 50))
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_its_gaps(values: list[float], points: int) -> None:
    curve = thin(Curve(tuple(range(len(values))), tuple(values)), points)
    assert len(curve.steps) <= max(2 * points + 2, min(len(values), points))
    assert {0, len(values) - 1} <= set(curve.steps)
    assert all(curve.values[i] is values[step] for i, step in enumerate(curve.steps))
    finite = [value for value in values if math.isfinite(value)]
    kept = [value for value in curve.values if math.isfinite(value)]
    assert (min(kept, default=0), max(kept, default=0)) == (min(finite, default=0), max(finite, default=0))
    assert any(map(math.isnan, curve.values)) == any(map(math.isnan, values))


def test_a_huge_curve_becomes_small() -> None:
    rng = random.Random(0)
    curve = Curve(tuple(range(200_000)), tuple(rng.random() for _ in range(200_000)))
    assert len(thin(curve).steps) <= 700


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


@pytest.mark.parametrize("name", ["_hidden", "$x", "a$b$c", "\\frac", "日本語 🙂", "\x00\x1b\ud800", ""])
def test_any_name_can_stand_in_a_legend(name: str, tmp_path: Path) -> None:
    figure = blank_figure(4, 3)
    draw_curve(figure.add_subplot(), Curve((1, 2), (0.5, 0.25)), name, COLOURS[0])
    legend_below(figure)
    assert len(figure.legends) == (name != "")
    ET.fromstring(inline_svg(figure, "k", "alt"))
    for end in ("png", "svg"):
        assert save_figure(figure, tmp_path / f"a.{end}").stat().st_size > 1000
    assert colours(tmp_path / "a.png") > 10


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
