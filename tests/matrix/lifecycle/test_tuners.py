"""Finders of learning rate and batch size train for a while and give everything back: nothing of it stays with us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_step import STEPSparsityCallback, nm_masks
from lightning_step.errors import ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:The learning rate")


def find_rate(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    Tuner(trainer).lr_find(module, num_training=8, update_attr=False)


def find_batch_size(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    Tuner(trainer).scale_batch_size(module, max_trials=2, init_val=8, steps_per_trial=8, mode="power")
    module.batch_size = 8  # as it was, to compare


def find_batch_size_by_bisection(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    Tuner(trainer).scale_batch_size(module, max_trials=2, init_val=8, steps_per_trial=8, mode="binsearch")
    module.batch_size = 8


@pytest.mark.parametrize("find", [find_rate, find_batch_size])
def test_a_tuner_before_the_fit_leaves_no_trace(
    find: Any, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, look: Any, assert_same: Any
) -> None:
    callbacks = [make_callback(recipe) for _ in range(2)]
    plain, tuned = make_module(), make_module()
    untouched = look(tuned, callbacks[1], optimizer=False)["weights"]
    trainers = [make_trainer(callback) for callback in callbacks]
    find(trainers[1], tuned)
    assert {mask.enabled for mask in nm_masks(tuned).values()} == {False}
    assert callbacks[1].state_dict() == {"version": 1, "optimizers": []}
    assert all(untouched[name].equal(value) for name, value in tuned.state_dict().items())
    trainers[0].fit(plain)
    trainers[1].fit(tuned)
    assert_same(look(plain, callbacks[0]), look(tuned, callbacks[1]))


@pytest.mark.parametrize("find", [find_rate, find_batch_size_by_bisection])
def test_a_tuner_between_two_fits_leaves_no_trace(
    find: Any, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, look: Any, assert_same: Any
) -> None:
    outcomes = []
    for tune in (False, True):
        module, callback = make_module(), make_callback(recipe)
        make_trainer(callback).fit(module)
        before = look(module, callback, optimizer=False)
        again = make_trainer(callback)
        if tune:
            find(again, module)
            after = look(module, callback, optimizer=False)
            assert [state["events"] for state in after["callback"]["optimizers"]] == [
                state["events"] for state in before["callback"]["optimizers"]
            ]
            assert_same(*({part: seen[part] for part in ("weights", "masks")} for seen in (before, after)))
        if any(state["frozen"] for state in before["callback"]["optimizers"]):
            with pytest.warns(UserWarning, match="fitted before"):
                again.fit(module)
        else:
            again.fit(module)
        outcomes.append(look(module, callback))
    assert_same(*outcomes)


class FindsRate(LearningRateFinder):
    def __init__(self) -> None:
        super().__init__(num_training_steps=8, update_attr=False)


class FindsBatchSize(BatchSizeFinder):
    def __init__(self) -> None:
        super().__init__(max_trials=1, init_val=8, steps_per_trial=8)


@pytest.mark.parametrize("finder", [FindsRate, FindsBatchSize])
def test_a_finder_among_the_callbacks_leaves_no_trace(
    finder: Any, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, look: Any, assert_same: Any
) -> None:
    outcomes = []
    for extra in ([], [finder()]):
        module, callback = make_module(), make_callback(recipe)
        make_trainer(callback, *extra).fit(module)
        outcomes.append(look(module, callback))
    assert_same(*outcomes)


class FindsAgain(FindsRate):
    """The finder at some epochs, as Lightning's documentation suggests for fine-tuning."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch and self.optimal_lr is None:
            callback = next(c for c in trainer.callbacks if isinstance(c, STEPSparsityCallback))
            self.before = callback.state_dict()
            self.lr_find(trainer, pl_module)
            assert callback.state_dict() == self.before


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_finder_in_the_middle_of_a_fit_gives_back_phase_samples_and_events(
    epoch: int, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, look: Any, assert_same: Any
) -> None:
    outcomes = []
    for extra in ([], [FindsAgain(epoch)]):
        module, callback = make_module(), make_callback(recipe)
        make_trainer(callback, *extra).fit(module)
        outcomes.append(look(module, callback))
    assert extra[0].optimal_lr is not None
    assert_same(*outcomes)


def test_a_finder_in_a_fit_that_resumes_phase_two_is_stopped(
    recipes: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """Lightning's finder throws away the optimizer state that is about to be restored."""
    trainer = make_trainer(make_callback(recipes["STEP"]), max_epochs=2)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_trainer(make_callback(recipes["STEP"]), FindsRate())
    with pytest.raises(ResumeError, match=r"Expected the optimizer to hold the preconditioner of 'net\.0\.weight'"):
        resumed.fit(make_module(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
