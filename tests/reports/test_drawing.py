from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_step.figures import Curve, blank_figure
from lightning_step.reports.drawing import COLOURS, draw_curve, legend_below, thin
from lightning_step.reports.saving import inline_svg, save_figure
from tests.reports.conftest import colours


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


def test_long_names_stand_below_each_other_in_a_legend() -> None:
    counts = {}
    for name in ("a", "x" * 30, "x" * 100):
        figure = blank_figure(5.5, 3)
        axes = figure.add_subplot()
        for i in range(4):
            draw_curve(axes, Curve((1, 2), (0.5, 0.25)), f"{i}{name}", COLOURS[i])
        legend_below(figure, 4)
        figure.canvas.draw()
        [legend] = figure.legends
        counts[len(name)] = legend._ncols
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert counts == {1: 4, 30: 1, 100: 1}
