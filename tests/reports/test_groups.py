from __future__ import annotations

from pathlib import Path

import pytest

from lightning_step.reports.groups import Mark, layer_curves, masked_groups, switch_reasons
from lightning_step.reports.runs import read_runs
from tests.reports.conftest import Write

SWITCHED = {10: 1, 20: 1, 30: 2, 40: 2}


def test_a_run_without_sparsity_has_no_group(write: Write) -> None:
    [run] = read_runs([str(write("dense", {"loss": {1: 1.0}, "notsparsity/phase": {1: 1.0}}))])
    assert (masked_groups(run), switch_reasons(run), layer_curves(run, "flip_rate")) == ([], [], {})


def test_several_optimizers_are_several_groups(write: Write) -> None:
    scalars = {f"sparsity/{i}/{name}": SWITCHED for i in (0, 1, 10, 2) for name in ("phase", "layer/a.weight/flip_rate")}
    [run] = read_runs([str(write("gan", scalars))])
    assert [group.label for group in masked_groups(run)] == [f"gan, optimizer {i}" for i in (0, 1, 2, 10)]
    assert [group.marks for group in masked_groups(run)] == [[Mark(30, "masks on")]] * 4
    assert list(layer_curves(run, "flip_rate")) == ["a.weight"]


def test_the_prefix_of_a_logger_goes_before(write: Write) -> None:
    [run] = read_runs([str(write("run", {"mine-sparsity/phase": SWITCHED, "mine-sparsity/layer/x.w/v_l1": SWITCHED}))])
    assert [(group.label, group.marks) for group in masked_groups(run)] == [("run", [Mark(30, "masks on")])]
    assert list(layer_curves(run, "v_l1")) == ["x.w"]


def test_what_the_switch_says_of_itself_is_better_than_the_curve(write: Write) -> None:
    lines = [
        "- optimizer step 0: masks on (2 tensors); fixed step reached: step 0",
        "- optimizer step 33: second moment frozen (2 tensors); t_max reached: T_max = 33",
    ]
    [run] = read_runs([str(write("run", {"sparsity/phase": {10: 2, 20: 2}}, {"sparsity/recipe": "\n".join(lines)}))])
    [group] = masked_groups(run)
    assert switch_reasons(run) == [line.removeprefix("- ") for line in lines]
    assert group.marks == [Mark(0, "masks on"), Mark(33, "v frozen")]
    assert group.frozen == 33


@pytest.mark.parametrize(
    ("z", "phase", "marks"),
    [
        ({10: 1.0, 20: 1.0}, {10: 1, 20: 1}, []),
        ({10: 1.0, 20: 1.0}, {10: 1, 20: 2, 30: 2}, [Mark(20, "masks on"), Mark(20, "v frozen")]),
        ({10: 1.0}, {10: 2, 20: 2}, [Mark(10, "masks on", or_before=True), Mark(10, "v frozen")]),
        ({}, {10: 2, 20: 2}, [Mark(10, "masks on", or_before=True)]),
    ],
)
def test_marks_of_the_curves(z: dict[int, float], phase: dict[int, float], marks: list[Mark], write: Write) -> None:
    [run] = read_runs([str(write("run", {"sparsity/variance_change": z, "sparsity/phase": phase}))])
    [group] = masked_groups(run)
    assert group.marks == marks


def test_a_slash_in_the_name_of_a_layer(write: Write, tmp_path: Path) -> None:
    [run] = read_runs([str(write("run", {"sparsity/layer/a/b.weight/flip_rate": {1: 0.5}}))])
    assert list(layer_curves(run, "flip_rate")) == ["a/b.weight"]
