from __future__ import annotations

import pytest

from lightning_step import NMPattern
from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve
from lightning_step.reports.quality import draw_frozen, draw_losses, draw_patterns, draw_switch_points
from lightning_step.reports.results import Result

DENSE = [Result("dense", None, loss, seed) for seed, loss in enumerate((1.0, 1.2))]
P24, P18 = NMPattern(2, 4), NMPattern(1, 8)


def points(axes: object) -> dict[str, list[tuple[float, float]]]:
    """What error bars stand at, by the name in the legend; and the line across."""
    found = {}
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if hasattr(handle, "lines") else handle
        found[name] = [(round(float(x), 1), float(y)) for x, y in zip(*line.get_data(), strict=True)]
    return found


def test_patterns_from_mild_to_harsh_at_their_best_settings() -> None:
    results = [
        *DENSE,
        *(Result("STEP", P18, loss, seed, lr=1e-3) for seed, loss in enumerate((1.5, 1.7))),
        Result("STEP", P18, 1.0, lr=1e-2),  # one lucky seed
        Result("STEP", P24, 1.3),
        Result("SR-STE", P24, 1.4),
        Result("STEP", P24, 0.1, change="something else"),
        Result("STEP", P24, 0.1, switch=0.1),
        Result("STEP", P24, 0.1, frozen=False),
    ]
    [axes] = draw_patterns(results).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2:4", "1:8"]
    found = points(axes)
    assert found.pop("dense") == [(0.0, pytest.approx(1.1)), (1.0, pytest.approx(1.1))]
    assert found == {"STEP": [(1.0, pytest.approx(1.6)), (0.0, 1.3)], "SR-STE": [(0.0, 1.4)]}
    assert axes.get_title() == "mean and standard deviation over 1 to 2 seeds; the best of 1 to 2 settings of lr and lam"


def test_frozen_beside_live() -> None:
    results = [
        *DENSE,
        Result("STEP", P24, 1.3, frozen=True),
        Result("STEP", P24, 1.5, frozen=False),
        Result("STEP", P24, 9.0),
    ]
    [axes] = draw_frozen(results).axes
    found = points(axes)
    assert {name: [y for _, y in at] for name, at in found.items() if name != "dense"} == {
        "STEP, v frozen": [1.3],
        "STEP, v live": [1.5],
    }
    assert found["STEP, v frozen"][0][0] < 0 < found["STEP, v live"][0][0]


def test_quality_against_the_switch_point() -> None:
    results = [*DENSE, *(Result("STEP", P24, 2 - at, switch=at) for at in (0.5, 0.1, 0.3)), Result("STEP", P24, 9.0)]
    [axes] = draw_switch_points(results).axes
    assert points(axes)["STEP 2:4"] == [(0.1, 1.9), (0.3, 1.7), (0.5, 1.5)]


def test_losses_are_means_over_seeds_one_panel_for_each_optimizer() -> None:
    curves = [Curve((100, 200), (2.0, 1.0)), Curve((100, 200, 300), (3.0, 2.0, 1.0))]
    results = [Result("STEP", P24, 1.0, seed, optimizer="Adam", losses=curve) for seed, curve in enumerate(curves)]
    results += [Result("dense", None, 1.0, optimizer="SGD", losses=curves[0])]
    adam, sgd = draw_losses(results).axes
    assert (adam.get_title(), sgd.get_title()) == ("Adam", "SGD")
    assert [list(line.get_ydata()) for line in adam.lines] == [[2.5, 1.5], []]
    names = [[line.get_label() for line in axes.lines] for axes in (adam, sgd)]
    assert names == [["STEP", "2:4"], ["dense", "2:4"]]  # a name for the colour, and one for the style


def test_many_recipes_and_patterns_leave_room_for_the_curves() -> None:
    curve, patterns = Curve((100, 200), (2.0, 1.0)), [P24, NMPattern(1, 4), NMPattern(1, 8), NMPattern(1, 16)]
    results = [
        Result(f"{'a recipe with quite a long name ' * 2}{i}", pattern, 1.0, losses=curve)
        for i in range(7)
        for pattern in patterns
    ]
    figure = draw_losses(results)
    figure.canvas.draw()
    [axes], [legend] = figure.axes, figure.legends
    assert len(legend.get_texts()) == 7 + len(patterns)
    assert len({line.get_linestyle() + line.get_marker() for line in axes.lines if len(line.get_xdata())}) == len(patterns)
    assert axes.get_window_extent().height > 2.5 * figure.dpi


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (draw_patterns, "Expected results with n and m, but got none of them"),
        (draw_frozen, "Expected results with n and m and a value of `frozen`, but got none"),
        (draw_switch_points, "Expected results with n and m and a value of `switch`, but got none"),
        (draw_losses, "Expected results with `losses`"),
    ],
)
def test_results_without_what_the_figure_shows(draw: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        draw(DENSE)
