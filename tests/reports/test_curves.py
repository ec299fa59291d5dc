from __future__ import annotations

import math

import pytest

from lightning_step.figures import Curve
from lightning_step.reports.criteria import Firing
from lightning_step.reports.curves import Line, draw_lines, draw_loss, draw_switch
from lightning_step.reports.firings import Verdict
from lightning_step.reports.groups import Mark, masked_groups
from lightning_step.reports.runs import read_runs
from tests.reports.conftest import Write


@pytest.mark.parametrize(
    ("values", "scale"),
    [((1.0, 50.0), "linear"), ((1.0, 500.0), "log"), ((0.0, 500.0), "linear"), ((math.nan, math.inf), "linear")],
)
def test_the_axis_is_logarithmic_where_curves_span_powers_of_ten(values: tuple[float, ...], scale: str) -> None:
    [axes] = draw_lines([Line("a", Curve((1, 2), values))], "norm").axes
    assert axes.get_yscale() == scale


def test_a_single_point_is_a_dot_and_zeros_stay_at_the_bottom() -> None:
    [axes] = draw_lines([Line("a", Curve((1,), (0.0,)))], "share").axes
    assert axes.lines[0].get_marker() == "o"
    assert axes.get_ylim() == (0, 1)


def test_the_phase_with_masks_is_shaded_and_the_freeze_marked() -> None:
    lines = [Line("train_loss", Curve((1, 50, 100), (3.0, 2.0, 1.0)))]
    [axes] = draw_loss(lines, [Mark(30, "masks on"), Mark(80, "v frozen", or_before=True)], 100).axes
    [patch] = axes.patches
    assert (patch.get_x(), patch.get_x() + patch.get_width()) == (30, 100)
    assert [text.get_text() for text in axes.texts] == ["masks on, step 30", "v frozen, step 80 or before"]
    assert [text.get_horizontalalignment() for text in axes.texts] == ["left", "right"], "where there is room"


def test_the_variance_curve_shows_the_switch_and_where_others_would_have_been(write: Write) -> None:
    scalars = {
        "sparsity/variance_change": {10: 2e-8, 20: math.inf, 30: 1e-8},
        "sparsity/threshold": {10: 1e-8, 30: 1e-8},
        "sparsity/phase": {10: 1, 20: 1, 30: 2, 200: 2},
    }
    [group] = masked_groups(read_runs([str(write("run", scalars))])[0])
    said = [
        Verdict("A", Firing(3, 3), ""),
        Verdict("B", Firing(40, 90), ""),
        Verdict("C", None, ""),
        Verdict("D", Firing(5, None), ""),
        Verdict("E", Firing(None, 100, forced=True), ""),
    ]
    [axes] = draw_switch(group, said).axes
    words = ["step 30 of 200: masks on, v frozen", "A: step 3", "B: between steps 40 and 90", "E: step 100 (T_max)"]
    assert [text.get_text() for text in axes.texts] == words
    assert axes.get_xlim() == (0, 100), "as far as the last of them"
    assert axes.get_yscale() == "log"
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert (40, 90) in spans
