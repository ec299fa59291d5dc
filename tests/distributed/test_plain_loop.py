"""A plain loop on two processes, DDP and FSDP2, against the same loop on one; both trained by `plain_worker.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import load_sparse

RECIPES = ["Dense", "ASP", "STE", "SRSTE", "STEP", "STEP, geometric, all", "decays, by drift", "layer by layer"]
ENGINES = ["DDP", "FSDP2, masks before", "FSDP2, masks after"]
SWITCHED = {
    "Dense": [], "ASP": [5], "STE": [0], "SRSTE": [0], "STEP": [6], "STEP, geometric, all": [7], "decays, by drift": [9],
    "layer by layer": [0],
}  # fmt: skip


def read(folder: Path, name: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def close(one: Any, other: Any) -> None:
    for name, weight in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=1e-9, atol=1e-11)
    for mine, theirs in zip(one["moments"], other["moments"], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(other["output"], one["output"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_equal_one_on_the_same_batches(recipe: str, engine: str, plain: Path) -> None:
    alone, ours = read(plain, f"alone, {recipe}"), read(plain, f"{engine}, {recipe}")
    close(alone, ours)
    assert [sorted(gauges) for gauges in ours["gauges"]] == [sorted(gauges) for gauges in alone["gauges"]]
    for mine, theirs in zip(ours["gauges"], alone["gauges"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_process_has_the_same_state_and_has_switched_at_the_same_step(recipe: str, engine: str, plain: Path) -> None:
    alone = read(plain, f"alone, {recipe}")
    first, second = (read(plain, f"{engine}, {recipe}", rank) for rank in (0, 1))
    assert first["state"] == second["state"]
    assert first["gauges"] == second["gauges"]
    assert [event["step"] for event in first["state"]["events"]] == [event["step"] for event in alone["state"]["events"]]
    assert [event["step"] for event in first["state"]["events"]] == SWITCHED[recipe]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_the_criterion_and_not_a_limit_fired_from_shards(plain: Path) -> None:
    (event,) = read(plain, "FSDP2, masks before, STEP", 1)["state"]["events"]
    assert event["rule"] == "window mean below threshold"


def test_a_subset_reads_the_coordinates_that_one_process_would_read(plain: Path) -> None:
    for rank in (0, 1):
        alone, shared = read(plain, "subset", rank)
        for mine, theirs in zip(shared, alone, strict=True):
            assert mine["variance_change"] == pytest.approx(theirs["variance_change"], rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fully_shard_puts_on_top_of_a_masked_class_stays(rank: int, plain: Path) -> None:
    seen = read(plain, "classes", rank)
    assert seen["masked"] == [
        ["FSDPNet", "FSDPMaskedLinear", "FSDPMaskedLinear", "MaskedLinear"],
        ["FSDPNet", "MaskedFSDPLinear", "MaskedFSDPLinear", "MaskedLinear"],
    ]
    assert seen["names"] == [["FSDPNet", "FSDPLinear", "FSDPLinear", "Linear"]] * 3
    assert all(all(same) for same in seen["stripped"])
    assert seen["hardened"] == [["even.weight", "uneven.weight", "single.weight"]] * 2
    assert seen["same output"] == seen["zeros"] == [True, True]
    assert seen["trains"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_cuts_groups_is_refused_by_name_on_every_process(rank: int, plain: Path) -> None:
    seen = read(plain, "cut groups", rank)
    text = (
        "ConfigurationError: Expected shards of '0.weight' to hold whole groups of 4 along dim 0, but got parts of 6 of its "
        "12: a group would be cut in two. Shard it along another dimension with the `shard_placement_fn` of fully_shard"
    )
    assert seen["12 rows"].startswith(text)
    assert seen["apply"] == seen["12 rows"]
    assert (seen["16 rows"], seen["12 rows, other dim"]) == ("nothing", True)
    assert seen["untouched"] == "ConvTranspose1d"


@pytest.mark.parametrize("case", ["no gradient on one", "NaN on one", "infinite v in one shard"])
def test_a_gradient_that_is_odd_on_one_process_is_the_same_to_all(case: str, plain: Path) -> None:
    first, second = (read(plain, "odd gradients", rank)[case] for rank in (0, 1))
    assert first == second
    if case == "no gradient on one":
        samples, t, warned = first
        assert (len(samples), t, warned) == (8, 8, [])
    elif case == "NaN on one":
        samples, t, (warned,) = first
        assert (len(samples), t) == (2, 8)  # v stays NaN
        assert all(map(math.isfinite, samples))
        assert warned.startswith("Expected finite gradients, but got NaN or infinity")
    else:
        frozen, phase, (warned, *_) = first
        assert (frozen, phase) == ([], 1)
        assert "NaN or infinity in 'even.weight'" in warned


@pytest.mark.parametrize("kind", ["fused", "for-loop"])
def test_an_overflow_in_one_shard_is_no_step_and_no_sample_anywhere(kind: str, plain: Path) -> None:
    first, second = (read(plain, f"loss scaler, {kind}", rank) for rank in (0, 1))
    assert first == second
    t, samples, scale = first
    assert (t, len(samples), scale) == (5, 5, 128.0)


SAVED = [(recipe, "in phase II") for recipe in RECIPES] + [("STEP", "in phase I")]


@pytest.mark.parametrize("way", ["together to alone", "alone to together", "together to together"])
@pytest.mark.parametrize(("recipe", "when"), SAVED)
def test_a_checkpoint_of_two_resumes_on_one_and_the_reverse(recipe: str, when: str, way: str, plain: Path) -> None:
    undisturbed, resumed = read(plain, f"alone, {recipe}"), read(plain, f"{way} {when}, {recipe}")
    close(undisturbed, resumed)
    assert [event["step"] for event in resumed["state"]["events"]] == [
        event["step"] for event in undisturbed["state"]["events"]
    ]
    if way == "together to together":  # the same shards again: bit for bit
        reference = read(plain, f"FSDP2, masks before, {recipe}")
        assert resumed["state"] == reference["state"]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in reference["weights"].items())


@pytest.mark.parametrize("rank", [0, 1])
def test_the_step_that_makes_an_optimizers_state_is_none(rank: int, plain: Path) -> None:
    t, phase, same, t_of_warm_up = read(plain, "state-making step", rank)
    assert (t, phase, same) == (0, 1, True)
    assert t_of_warm_up == 1


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_sharded_model_is_gathered_and_written_once(format: str, plain: Path) -> None:
    first, second = (read(plain, "exports", rank) for rank in (0, 1))
    path = plain / f"{format}.safetensors"
    assert first[format] == second[format] == (path.stat().st_size, ["even.weight", "single.weight", "uneven.weight"])
    written = load_sparse(path)
    assert all(torch.equal(written[name], weight) for name, weight in first["expected"].items())
    assert written["uneven.weight"].count_nonzero() == 5 * 12 // 2
    nn.Linear(12, 5).double().load_state_dict({"weight": written["uneven.weight"], "bias": written["uneven.bias"]})


@pytest.mark.parametrize("rank", [0, 1])
def test_an_export_that_fails_on_the_writer_fails_on_all(rank: int, plain: Path) -> None:
    seen = read(plain, "exports", rank)
    assert seen["folder"].startswith("ConfigurationError: Expected `path` to name a file, but got the folder")
    assert seen["full disk"].startswith("ExportError: Expected to write ")
    assert [path.name for path in plain.iterdir() if "never" in path.name] == []
