"""`validate`, `test` and `predict` see the masks of the phase: before a fit, after it, and of any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_step import SRSTE, STEP, AtStep, NMPattern, apply_nm_masks, nm_masks
from lightning_step.errors import ResumeError

VERBS = ["validate", "test", "predict"]
STEPS = 9
BEGINS_DENSE = {"Dense": False, "ASP": True, "STE": False, "SRSTE": False, "STEP": True}


def evaluate(trainer: pl.Trainer, verb: str, module: Any, **arguments: Any) -> torch.Tensor:
    """What the verb says of the validation data, as one tensor."""
    if verb == "predict":
        return torch.cat(trainer.predict(module, **arguments))
    (metrics,) = getattr(trainer, verb)(module, verbose=False, **arguments)
    return torch.tensor(metrics["val_loss"])


def expected(plain: pl.LightningModule, verb: str, weights: Any) -> torch.Tensor:
    """The same by hand, from a plain module with these weights."""
    plain.load_state_dict(weights)
    (x, y), *_ = plain.val_dataloader()
    with torch.no_grad():
        out = plain.eval()(x)
    return out if verb == "predict" else torch.nn.functional.mse_loss(out, y)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("verb", VERBS)
def test_before_a_fit_masks_that_are_on_stay_on(
    verb: str, inference_mode: bool, make_module: Any, make_callback: Any, make_trainer: Any, masked: Any
) -> None:
    module = make_module()
    apply_nm_masks(module, NMPattern(1, 4))
    trainer = make_trainer(make_callback(), inference_mode=inference_mode, limit_val_batches=1.0)
    seen = evaluate(trainer, verb, module)
    torch.testing.assert_close(seen, expected(make_module(), verb, masked(module)))
    dense = expected(make_module(), verb, make_module().state_dict())
    assert not torch.allclose(seen, dense)
    trainer.fit(module)  # nothing of inference mode is left in the weights
    assert module.net[0].weight.count_nonzero() == 32


@pytest.mark.parametrize("verb", VERBS)
def test_after_a_fit_every_verb_sees_the_masked_weights(
    verb: str, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, masked: Any
) -> None:
    module, callback = make_module(), make_callback(recipe)
    trainer = make_trainer(callback, limit_val_batches=1.0)
    trainer.fit(module)
    state = callback.state_dict()
    on = recipe.plan().masks is not None
    weights = masked(module) if on else module.state_dict()
    torch.testing.assert_close(evaluate(trainer, verb, module), expected(make_module(), verb, weights))
    assert callback.state_dict() == state
    again = evaluate(make_trainer(limit_val_batches=1.0), verb, module)  # a trainer that knows nothing of masks
    torch.testing.assert_close(again, expected(make_module(), verb, weights))


class BestIs(pl.Callback):
    """Makes the validation loss lowest after some epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callback_metrics["val_loss"] = torch.tensor(0.0 if trainer.current_epoch == self.epoch else 1.0)


def test_a_checkpoint_of_either_phase_is_evaluated_in_its_phase(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, masked: Any, tmp_path: Path
) -> None:
    module, callback = make_module(), make_callback(recipe)
    saving = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)
    trainer = make_trainer(callback, BestIs(0), saving, limit_val_batches=1.0)
    trainer.fit(module)
    assert Path(saving.best_model_path).name == "epoch=0.ckpt"
    begins_dense = BEGINS_DENSE[type(recipe).__name__]
    for ckpt_path, on in (("best", not begins_dense), ("last", True), ("best", not begins_dense)):
        seen = evaluate(trainer, "predict", module, ckpt_path=ckpt_path, weights_only=True)
        on = on and recipe.plan().masks is not None
        assert {mask.enabled for mask in nm_masks(module).values()} == {on}
        saved = saving.best_model_path if ckpt_path == "best" else saving.last_model_path
        latent = torch.load(saved, weights_only=True)["state_dict"]
        assert all(torch.equal(latent[name], value) for name, value in module.state_dict().items())
        weights = masked(module) if on else latent
        torch.testing.assert_close(seen, expected(make_module(), "predict", weights))


def test_a_checkpoint_from_the_middle_of_phase_two_loads_into_the_plain_class(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, masked: Any, tmp_path: Path
) -> None:
    class Remembers(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                self.masked, self.latent = masked(pl_module), {k: v.clone() for k, v in pl_module.state_dict().items()}

    remembers, saving = Remembers(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6)
    module = make_module()
    make_trainer(make_callback(recipe), remembers, saving).fit(module)
    plain = type(module).load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert type(plain) is type(module)
    assert [type(layer) for layer in plain.net] == [type(layer) for layer in make_module().net]
    assert nm_masks(plain) == {}
    assert all(torch.equal(remembers.latent[name], value) for name, value in plain.state_dict().items())
    apply_nm_masks(plain, NMPattern(1, 4))  # and what the masked model computed is one call away
    for index in (0, 3):
        assert torch.equal(plain.net[index].weight, remembers.masked[f"net.{index}.weight"])


@pytest.mark.parametrize("change", [{"n": 2}, {"exclude": ["net.3"]}, {"overrides": {"net.0": [1, 2]}}], ids=str)
def test_a_checkpoint_of_another_pattern_is_not_evaluated(
    change: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make_callback())
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = make_trainer(make_callback(**change), limit_val_batches=1.0)
    with pytest.raises(ResumeError, match=r"Expected the patterns of the checkpoint, but got .* was 1:4"):
        other.validate(make_module(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_a_checkpoint_of_another_recipe_is_evaluated(
    make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make_callback(SRSTE()), limit_val_batches=1.0)
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen = evaluate(trainer, "validate", trainer.lightning_module)
    fresh = make_module()
    other = make_trainer(make_callback(STEP(AtStep(1))), limit_val_batches=1.0)
    assert torch.equal(evaluate(other, "validate", fresh, ckpt_path=tmp_path / "a.ckpt", weights_only=True), seen)
