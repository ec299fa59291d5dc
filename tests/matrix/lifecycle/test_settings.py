"""Settings of the Trainer and callbacks that change how long it trains, what it logs and what it saves."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelSummary
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_summary import summarize

from lightning_step import STEP, AtStep, AutoSwitch, SparseExport, load_sparse, nm_masks
from lightning_step.functional import find_violation
from lightning_step.pattern import NMPattern

STEPS = 9


def events(callback: Any) -> list[int]:
    return [event.step for event in callback.sparsifiers[0].events]


def masks_at(recipe: Any) -> list[int]:
    return {"Dense": [], "ASP": [4], "STE": [0], "SRSTE": [0], "STEP": [4]}[type(recipe).__name__]


# What changes nothing -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "barebones": {"barebones": True, "enable_checkpointing": None, "logger": None},
    "no checkpoints": {"enable_checkpointing": False},
    "no summary": {"enable_model_summary": False},
    "inference_mode": {"limit_val_batches": 1.0, "val_check_interval": 2, "inference_mode": True},
    "no_grad": {"limit_val_batches": 1.0, "val_check_interval": 2, "inference_mode": False},
    "sanity check": {"limit_val_batches": 1.0, "num_sanity_val_steps": 1},
    "min_epochs": {"min_epochs": 3},
    "max_time": {"max_time": {"hours": 1}},
    "limit_train_batches": {"limit_train_batches": 3},
    "max_steps": {"max_steps": STEPS, "max_epochs": -1},
    "detect_anomaly": {"detect_anomaly": True},
}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but `Trainer.barebones=True")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["STEP", "ASP"])
def test_a_setting_that_should_not_matter_does_not(
    name: str,
    setting: dict[str, Any],
    recipes: Any,
    make_module: Any,
    make_callback: Any,
    make_trainer: Any,
    look: Any,
    assert_same: Any,
) -> None:
    outcomes = []
    for arguments in ({}, setting):
        module, callback = make_module(), make_callback(recipes[name])
        make_trainer(callback, **arguments).fit(module)
        outcomes.append(look(module, callback))
    for seen in outcomes:  # measured only where there is a logger, and never here
        assert seen["callback"]["optimizers"][0]["flip_rate"] is None
    assert_same(*outcomes)


# How long it trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"overfit_batches": 2}, 6),
        ({"limit_train_batches": 2}, 6),
        ({"accumulate_grad_batches": 3, "max_epochs": 6}, 6),
        ({"max_epochs": 2, "min_steps": 9}, 6),
    ],
    ids=str,
)
def test_a_run_of_another_length_switches_at_its_own_middle(
    arguments: dict[str, Any], steps: int, make_module: Any, make_callback: Any, make_trainer: Any
) -> None:
    callback = make_callback(STEP(AutoSwitch(window=2, threshold=1e-30, t_min=0.0, t_max=0.5)))
    make_trainer(callback, **arguments).fit(make_module())
    assert (callback.sparsifiers[0].t, events(callback)) == (steps, [steps // 2])


def test_the_steps_count_whatever_an_accumulation_schedule_does(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any
) -> None:
    callback = make_callback(recipe)
    schedule = GradientAccumulationScheduler({0: 1, 2: 3})
    trainer = make_trainer(callback, schedule, max_epochs=5)
    trainer.fit(make_module())
    assert (trainer.global_step, callback.sparsifiers[0].t) == (9, 9)  # 3 + 3 + 1 + 1 + 1
    assert events(callback) == masks_at(recipe)


def test_max_time_ends_before_the_switch_and_nothing_is_pruned(
    make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    path, module = tmp_path / "model.safetensors", make_module()
    callback = make_callback(STEP(AtStep(10**6)))
    trainer = make_trainer(callback, SparseExport(str(path)), max_epochs=-1, max_steps=10**7, max_time={"seconds": 1})
    with pytest.warns(UserWarning, match="that never came on: training ended before the switch"):
        trainer.fit(module)
    assert 0 < trainer.global_step < 10**6
    assert not path.exists()
    assert all(int(p.count_nonzero()) == p.numel() for p in module.parameters())


@pytest.mark.parametrize("one_shot", [False, True])
def test_early_stopping_before_the_switch_prunes_nothing_unless_told_to(
    one_shot: bool, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    path, module = tmp_path / "model.safetensors", make_module()
    callback, export = make_callback(STEP(AtStep(6))), SparseExport(str(path), one_shot=one_shot)
    stopping = EarlyStopping("val_loss", stopping_threshold=1e9)  # at once
    trainer = make_trainer(callback, export, stopping, limit_val_batches=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    told = [w for w in caught if "2 that never came on: training ended before the switch" in str(w.message)]
    assert trainer.global_step == 3
    assert {mask.enabled for mask in nm_masks(module).values()} == {False}
    assert all(int(p.count_nonzero()) == p.numel() for name, p in module.named_parameters() if "weight" in name)
    assert (len(told), path.exists()) == ((0, True) if one_shot else (1, False))
    if one_shot:
        written = load_sparse(path)
        assert find_violation(written["net.0.weight"], NMPattern(1, 4), 1) is None
        assert torch.equal(written["net.1.weight"], module.net[1].weight)


@pytest.mark.filterwarnings("ignore:Expected learned masks")
def test_fast_dev_run_runs_every_hook_and_writes_no_file(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path, caplog: Any
) -> None:
    path, module = tmp_path / "model.safetensors", make_module()
    path.write_text("the model of a whole run")
    callback = make_callback(recipe, verbose=True)
    with caplog.at_level("INFO"):
        make_trainer(callback, SparseExport(str(path)), fast_dev_run=True).fit(module)
    assert "N:M masks on 2 of 6 tensors" in caplog.text
    assert callback.sparsifiers[0].t == 1
    assert path.read_text() == "the model of a whole run"
    if events(callback):
        assert f"verified for {path}, which fast_dev_run leaves alone" in caplog.text


# What it logs and shows -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_every_logger_gets_the_same_numbers(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "other")]
    make_trainer(make_callback(recipe), logger=loggers, log_every_n_steps=2).fit(make_module())
    tables = []
    for name in ("csv", "other"):
        with (tmp_path / name / "version_0" / "metrics.csv").open() as file:
            tables.append([(int(r["step"]), r["sparsity/phase"]) for r in csv.DictReader(file) if r["sparsity/phase"]])
    board = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    shown = [(event.step, str(event.value)) for event in board.Scalars("sparsity/phase")]
    begins = masks_at(recipe)
    expected = [(t, str(2.0 if begins and t >= begins[0] else 1.0)) for t in (2, 4, 6, 8, 9)]
    assert tables[0] == tables[1] == shown == expected


def test_the_summary_of_a_masked_model_counts_what_the_plain_one_has(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any
) -> None:
    module, plain = make_module(), make_module()
    module.example_input_array = plain.example_input_array = torch.ones(2, 8)
    summary = ModelSummary(max_depth=-1)
    trainer = make_trainer(make_callback(recipe), summary, enable_model_summary=True)
    trainer.fit(module)
    ours, theirs = summarize(module, max_depth=-1), summarize(plain, max_depth=-1)
    assert ours.param_nums == theirs.param_nums
    assert ours.layer_names == theirs.layer_names
    assert (ours.in_sizes, ours.out_sizes) == (theirs.in_sizes, theirs.out_sizes)
    assert ours.total_parameters == theirs.total_parameters


# Layers that come late --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["configure_model", "setup"])
def test_layers_that_come_late_train_resume_and_are_evaluated_like_any(
    hook: str,
    recipe: Any,
    make_module: Any,
    make_callback: Any,
    make_trainer: Any,
    look: Any,
    assert_same: Any,
    tmp_path: Path,
) -> None:
    class Late(make_module.kind):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.kept = [self.net]  # hidden from torch until the hook
            del self.net

        def build(self, stage: str = "") -> None:
            if not hasattr(self, "net"):
                self.net = self.kept.pop()

    setattr(Late, hook, Late.build)
    reference, callback = make_module(), make_callback(recipe)
    make_trainer(callback).fit(reference)
    expected = look(reference, callback)
    late, callback = make_module(Late), make_callback(recipe)
    trainer = make_trainer(callback)
    trainer.fit(late)
    assert_same(look(late, callback), expected)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    late, callback = make_module(Late), make_callback(recipe)
    trainer = make_trainer(callback)
    (out,) = trainer.predict(late, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    (same,) = trainer.predict(reference)
    assert torch.equal(out, same)
    resumed, callback = make_module(Late), make_callback(recipe)
    make_trainer(callback).fit(resumed, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert look(resumed, callback)["masks"] == expected["masks"]
