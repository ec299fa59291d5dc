from __future__ import annotations

from pathlib import Path

import pytest

from lightning_step.errors import ConfigurationError
from lightning_step.reports import FIGURES, write_figure
from tests.reports.conftest import Write, colours

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results" / "main" / "char.jsonl"
STEPS = range(5, 31, 5)
SCALARS = {
    "val_loss": dict.fromkeys(STEPS, 1.0),
    "sparsity/v_l2": {step: 1 / step for step in STEPS},
    "sparsity/v_l1": {step: 2 / step for step in STEPS},
    "sparsity/phase": {step: 1 + (step >= 15) for step in STEPS},
    "sparsity/variance_change": {5: 1e-7, 10: 5e-8, 15: 2e-8},
    "sparsity/threshold": {5: 1e-8},
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_by_its_name(name: str, write: Write, tmp_path: Path) -> None:
    runs = [str(write(each, SCALARS)) for each in ("dense", "step")]
    inputs = {"runs": runs[: 1 if name == "variance" else 2], "results": [str(RESULTS)]}
    for kind in FIGURES[name].inputs.split(" or "):
        path = write_figure(name, inputs[kind], tmp_path / "new" / f"{name}-{kind}.png")
        assert colours(path) > 20, "no blank picture"


def test_the_figures_are_those_of_the_paper() -> None:
    assert list(FIGURES) == ["loss", "norm", "variance", "patterns", "frozen", "switch"]


@pytest.mark.parametrize(
    ("name", "tags", "message"),
    [
        ("loss", ["nothing"], r"Expected a scalar of run 'dense' for --loss, but got \['nothing'\]"),
        ("norm", ["nothing"], r"Expected runs that logged sparsity/nothing, but got none"),
        ("variance", [], r"Expected one run that sampled Z, but got \['dense', 'step'\] among \['dense', 'step'\]"),
        ("other", [], r"Expected the figure to be one of \['loss', .* but got 'other'"),
    ],
)
def test_a_figure_that_cannot_be_drawn(name: str, tags: list[str], message: str, write: Write, tmp_path: Path) -> None:
    runs = [str(write(each, SCALARS)) for each in ("dense", "step")]
    with pytest.raises(ConfigurationError, match=message):
        write_figure(name, runs, tmp_path / "a.png", tags=tags)
    assert not (tmp_path / "a.png").exists()


def test_inputs_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Expected folders of runs for the figure 'norm', but got"):
        write_figure("norm", [str(RESULTS)], tmp_path / "a.png")
