from __future__ import annotations

import math

import pytest

from lightning_step.errors import ConfigurationError
from lightning_step.figures import Curve
from lightning_step.reports.losses import PhaseLosses, loss_curves, phase_losses
from lightning_step.reports.runs import read_runs
from tests.reports.conftest import Write


def test_losses_are_found_by_their_names(write: Write) -> None:
    tags = ["val/loss", "Loss", "train_loss_step", "train_loss_epoch", "accuracy", "sparsity/loss", "d_loss_epoch"]
    [run] = read_runs([str(write("run", {tag: {1: 1.0} for tag in tags}))])
    assert list(loss_curves(run)) == ["Loss", "d_loss_epoch", "train_loss_step", "val/loss"]
    assert list(loss_curves(run, ["accuracy", "nothing"])) == ["accuracy"]
    with pytest.raises(
        ConfigurationError, match=r"Expected a scalar of run 'run' for --loss, but got \['x'\]\. It logged: L"
    ):
        loss_curves(run, ["x"])


@pytest.mark.parametrize(
    ("masks_on", "expected"),
    [
        (None, PhaseLosses(None, None, 2.0, 1.0)),
        (25, PhaseLosses(1.0, 5.0, 2.0, 1.0)),
        (0, PhaseLosses(None, 5.0, 2.0, 1.0)),
    ],
)
def test_losses_of_each_phase(masks_on: int | None, expected: PhaseLosses) -> None:
    curve = Curve((10, 20, 30, 40, 50), (3.0, 1.0, 5.0, 2.0, math.nan))
    assert phase_losses(curve, masks_on) == expected


def test_a_loss_that_never_was_finite() -> None:
    assert phase_losses(Curve((1, 2), (math.nan, math.inf)), 1) == PhaseLosses(None, None, None, None)
