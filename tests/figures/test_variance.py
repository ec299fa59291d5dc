from __future__ import annotations

import math

import pytest

from lightning_step.figures import Curve, VarianceLog, draw_variance

NONE = Curve((), ())


def drawn(log: VarianceLog) -> tuple[dict[str, tuple[list[float], list[float]]], list[str]]:
    """Lines by label, and the words beside the marks."""
    axes = draw_variance(log).axes[0]
    assert axes.get_yscale() == "log"
    lines = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    return lines, [text.get_text() for text in axes.texts]


def test_a_switch_is_marked_once_and_what_comes_long_after_is_cut_short() -> None:
    phase = Curve(tuple(range(10, 101, 10)), (1, 1, *(2,) * 8))
    log = VarianceLog(
        Curve((10, 20, 30), (4e-8, 2e-8, 1e-8)), Curve((20, 30), (3e-8, 1e-8)), Curve((10, 30), (2e-8,) * 2), phase
    )
    lines, words = drawn(log)
    assert lines["Z, mean change of v in one step"] == ([10, 20, 30], [4e-8, 2e-8, 1e-8])
    assert lines["mean of Z over the window"] == ([20, 30], [3e-8, 1e-8])
    assert set(lines["threshold 2e-08"][1]) == {2e-8}
    assert words == ["step 30 of 100: masks on, v frozen"]
    assert draw_variance(log).axes[0].get_xlim() == (0, 60)


def test_two_events_are_two_marks_and_none_is_none() -> None:
    log = VarianceLog(Curve((10, 20), (4e-8, 2e-8)), NONE, NONE, Curve((10, 20, 30), (2, 2, 2)))
    assert drawn(log)[1] == ["step 10 of 30: masks on", "step 20 of 30: v frozen"]
    lines, words = drawn(VarianceLog(Curve((10, 20), (4e-8, 2e-8)), NONE, NONE, Curve((10, 20), (1, 1))))
    assert (len(lines), words) == (1, [])


@pytest.mark.parametrize(("values", "scale"), [((0.0, 1e-8), "log"), ((math.inf, 1e-8), "log"), ((0.0, 0.0), "linear")])
def test_values_that_a_log_axis_cannot_show_are_no_trouble(values: tuple[float, float], scale: str) -> None:
    figure = draw_variance(VarianceLog(Curve((10, 20), values), NONE, NONE, Curve((10, 20), (1, 1))))
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == scale


def test_marks_that_are_given_replace_those_of_the_curves() -> None:
    log = VarianceLog(Curve((10, 20), (2.0, 1.0)), NONE, NONE, Curve((10, 20, 30), (2, 2, 2)))
    assert [text.get_text() for text in draw_variance(log).axes[0].texts] == [
        "step 10 of 30: masks on",
        "step 20 of 30: v frozen",
    ]
    axes = draw_variance(log, {0: "masks on"}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["step 0 of 30: masks on"]
    assert axes.get_xlim() == (0, 30), "masks that are on from step 0 cut nothing short"
