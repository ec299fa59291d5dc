from __future__ import annotations

import math

import numpy as np

from lightning_step.figures import Curve
from lightning_step.reports.groups import Mark
from lightning_step.reports.heatmap import MAX_LAYERS, draw_layers


def cells(figure: object) -> np.ndarray:
    """Values of the mesh, NaN where there is none."""
    return np.ma.filled(figure.axes[0].collections[0].get_array().astype(float), np.nan)


def test_rows_are_layers_and_columns_logged_steps() -> None:
    curves = {"a": Curve((10, 20, 30), (0.5, 0.6, 0.7)), "b": Curve((20,), (0.9,))}
    figure = draw_layers(curves, "kept magnitude", [Mark(0, "masks on"), Mark(20, "v frozen")])
    np.testing.assert_allclose(cells(figure), [[0.5, 0.6, 0.7], [np.nan, 0.9, np.nan]])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["0.7", "0.9"]
    assert axes.get_xlim() == (10, 40)
    assert axes.get_ylim() == (2, 0), "the first layer on top"


def test_rates_that_span_powers_of_ten_are_on_a_log_scale_with_zero_at_its_end() -> None:
    figure = draw_layers({"a": Curve((1, 2, 3, 4), (0.1, 0.0, 1e-4, math.inf))}, "flip rate")
    np.testing.assert_allclose(cells(figure), [[0.1, 1e-4, 1e-4, np.nan]])
    assert type(figure.axes[0].collections[0].norm).__name__ == "LogNorm"
    assert figure.axes[1].get_ylabel() == "flip rate, 0 as the lowest"


def test_many_steps_share_columns_and_too_many_layers_are_cut() -> None:
    curve = Curve(tuple(range(1000)), tuple(map(float, range(1000))))
    shown = cells(draw_layers(dict.fromkeys(map(str, range(MAX_LAYERS + 5)), curve), "x"))
    assert shown.shape == (MAX_LAYERS, 143)
    np.testing.assert_allclose(shown[0, :2], [3.0, 10.0])
    assert shown[0, -1] == np.mean(range(994, 1000))


def test_nothing_but_nan_still_draws() -> None:
    figure = draw_layers({"a": Curve((1,), (math.nan,))}, "flip rate")
    figure.canvas.draw()
    assert np.isnan(cells(figure)).all()
