"""More than one fit: of one trainer or two, of one module or two, with a checkpoint or without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_step import SRSTE, STEP, AtStep, SparseExport, nm_masks
from lightning_step.errors import ResumeError
from lightning_step.export import read_manifest

STEPS = 9


def masks_on(module: Any) -> bool:
    (on,) = {mask.enabled for mask in nm_masks(module).values()}
    return on


def fit_again(trainer: Any, module: Any, recipe: Any) -> None:
    """STEP says that its frozen moment is gone, and only STEP."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    told = ["fitted before" in str(warning.message) for warning in caught]
    assert sum(told) == (recipe.plan().freeze is not None)


@pytest.mark.parametrize("same_trainer", [True, False], ids=["same trainer", "new trainer"])
def test_a_second_fit_of_the_module_goes_on_in_its_phase(
    same_trainer: bool, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any
) -> None:
    module, callback = make_module(), make_callback(recipe)
    trainer = make_trainer(callback)
    trainer.fit(module)
    (first,) = callback.sparsifiers
    if same_trainer:
        trainer.fit_loop.max_epochs = 5
    else:
        trainer = make_trainer(callback, max_epochs=2)
    fit_again(trainer, module, recipe)
    (second,) = callback.sparsifiers
    assert (second.t, second.events) == (STEPS + 6, first.events)
    assert masks_on(module) == (recipe.plan().masks is not None)
    assert not first.optimizer._optimizer_step_pre_hooks
    assert not second.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("new", ["callback", "module"])
def test_a_new_callback_or_another_module_starts_from_the_beginning(
    new: str, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, look: Any, assert_same: Any
) -> None:
    reference, callback = make_module(), make_callback(recipe)
    make_trainer(callback).fit(reference)
    expected = look(reference, callback)
    module, other = make_module(), make_callback(recipe)
    make_trainer(other).fit(module)
    if new == "module":
        module = make_module()
    else:
        module.load_state_dict(make_module().state_dict())  # its masks are still on
        other = make_callback(recipe)
    make_trainer(other).fit(module)
    assert_same(look(module, other), expected)


def test_a_fit_after_the_evaluation_of_a_checkpoint_goes_on_in_its_phase(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make_callback(recipe))
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module, callback = make_module(), make_callback(recipe)
    trainer = make_trainer(callback, limit_val_batches=1.0)
    trainer.validate(module, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    trainer.save_checkpoint(tmp_path / "b.ckpt")  # the state is handed on
    saved = [torch.load(tmp_path / name, weights_only=True)["callbacks"] for name in ("a.ckpt", "b.ckpt")]
    assert saved[0]["STEPSparsityCallback"] == saved[1]["STEPSparsityCallback"]
    fit_again(trainer, module, recipe)
    assert callback.sparsifiers[0].t == 2 * STEPS
    assert masks_on(module) == (recipe.plan().masks is not None)


def test_a_finished_run_that_is_resumed_trains_nothing_and_exports_the_same(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    one_shot = recipe.plan().masks is None
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    trainer = make_trainer(make_callback(recipe), SparseExport(str(files[0]), one_shot=one_shot))
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = make_callback(recipe)
    again = make_trainer(callback, SparseExport(str(files[1]), one_shot=one_shot))
    again.fit(make_module(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (again.global_step, callback.sparsifiers[0].t) == (STEPS, STEPS)
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[name], second[name]) for name in {**first, **second})
    assert read_manifest(files[0]) == read_manifest(files[1])


def test_a_resume_that_is_refused_does_not_spoil_the_next_fit(
    make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    wrong = make_trainer(make_callback(SRSTE()))
    wrong.fit(make_module())
    wrong.save_checkpoint(tmp_path / "wrong.ckpt")
    module, recipe = make_module(), STEP(AtStep(3))
    callback = make_callback(recipe)
    make_trainer(callback).fit(module)
    with pytest.raises(ResumeError, match=r"the recipe of the checkpoint, SRSTE\(.*but got STEP\("):
        make_trainer(callback).fit(module, ckpt_path=tmp_path / "wrong.ckpt", weights_only=True)
    fit_again(make_trainer(callback), module, recipe)
    assert (callback.sparsifiers[0].t, callback.sparsifiers[0].phase) == (2 * STEPS, 2)


def test_a_checkpoint_from_before_the_first_fit_starts_a_run(
    make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    module = make_module()
    trainer = make_trainer(make_callback(), limit_val_batches=1.0)
    trainer.validate(module, verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = make_callback()
    make_trainer(callback).fit(make_module(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [event.step for event in callback.sparsifiers[0].events] == [4]


@pytest.mark.parametrize("crash", [3, 6])
def test_last_resumes_in_either_phase(
    crash: int,
    recipe: Any,
    make_module: Any,
    make_callback: Any,
    make_trainer: Any,
    look: Any,
    assert_same: Any,
    tmp_path: Path,
) -> None:
    def run(steps: int, ckpt_path: str | None, folder: str) -> Any:
        module, callback = make_module(), make_callback(recipe)
        saving = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_last=True)
        trainer = make_trainer(callback, saving, max_steps=steps, max_epochs=-1)
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return look(module, callback)

    undisturbed = run(STEPS, None, "one")
    run(crash, None, "two")
    assert_same(run(STEPS, "last", "two"), undisturbed)
