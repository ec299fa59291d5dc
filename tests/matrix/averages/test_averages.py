"""Averages are taken of the latent weights and masked afterwards: they hold n:m exactly, whatever was averaged."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, update_bn

from lightning_step import NMPattern, SparseExport, Sparsifier, export_model, load_sparse, nm_masks, strip
from lightning_step.export import read_manifest
from lightning_step.functional import find_violation

TWO_FOUR = NMPattern(2, 4)
DECAY = 0.6
NAMES = ("net.0.weight", "net.3.weight")

AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=DECAY),
    "equal weights": lambda: WeightAveraging(),
    "without buffers": lambda: EMAWeightAveraging(decay=DECAY, use_buffers=False),
}


class Watches(pl.Callback):
    """Remembers every latent weight right after its step, before any averaging callback touches it."""

    def __init__(self) -> None:
        self.latent: list[dict[str, torch.Tensor]] = []
        self.step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.latent.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def averaged(kind: str, history: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By hand, from what was seen; the first update copies."""
    result = {name: value.clone() for name, value in history[0].items()}
    for t, weights in enumerate(history[1:], start=2):
        share = 1 / t if kind == "equal weights" else 1 - DECAY
        result = {name: old + share * (weights[name] - old) for name, old in result.items()}
    return result


def latents(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return dict(module.named_parameters())


ORDERS = [*itertools.permutations(range(3))]


@pytest.mark.parametrize("kind", AVERAGES)
def test_the_average_of_the_latent_weights_is_masked_validated_and_exported(
    kind: str, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, by_sorting: Any, tmp_path: Path
) -> None:
    path, on = tmp_path / "model.safetensors", recipe.plan().masks is not None
    order = ORDERS[len(kind) % len(ORDERS)]
    module, watches = make_module(norm=False), Watches()
    ours = [make_callback(recipe), AVERAGES[kind](), SparseExport(str(path), one_shot=not on)]
    make_trainer(watches, *(ours[i] for i in order)).fit(module)
    expected = averaged(kind, watches.latent)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)
    written = load_sparse(path)
    for name in NAMES:
        latent = latents(module)[name]
        assert torch.equal(module.seen[name], by_sorting(latent) if on else latent)  # validated in the last epoch
        assert torch.equal(written[name], by_sorting(latent))
        assert find_violation(written[name], TWO_FOUR, 1) is None
        assert not torch.equal(by_sorting(latent), by_sorting(watches.latent[-1][name]))  # not the last weights
    assert strip(module) == ([*NAMES] if on else [])


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_order_of_the_callbacks_does_not_matter(
    order: Any, make_module: Any, make_callback: Any, make_trainer: Any, recipes: Any, tmp_path: Path
) -> None:
    outcomes = []
    for places in (ORDERS[0], order):
        path, module = tmp_path / f"{len(outcomes)}.safetensors", make_module()
        callbacks = [make_callback(recipes["STEP"]), EMAWeightAveraging(decay=DECAY), SparseExport(str(path))]
        make_trainer(*(callbacks[i] for i in places)).fit(module)
        outcomes.append(load_sparse(path))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_averaging_does_not_change_the_training_itself(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any
) -> None:
    histories, states = [], []
    for extra in ([], [EMAWeightAveraging(decay=DECAY)]):
        watches, callback = Watches(), make_callback(recipe)
        make_trainer(watches, callback, *extra, val_check_interval=1).fit(make_module())
        histories.append(watches.latent)
        states.append(callback.state_dict())
    assert len(histories[0]) == 9
    for plain, with_average in zip(*histories, strict=True):
        assert all(torch.equal(plain[name], with_average[name]) for name in plain)
    assert states[0] == states[1]


@pytest.mark.parametrize("crash", [3, 6])
def test_a_resumed_run_with_an_average_equals_the_undisturbed_one(
    crash: int, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    def run(steps: int, ckpt_path: Path | None = None) -> Any:
        module, callback = make_module(), make_callback(recipe)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
        trainer = make_trainer(callback, EMAWeightAveraging(decay=DECAY), saving, max_epochs=-1, max_steps=steps)
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict(), callback.state_dict()

    undisturbed = run(9)
    run(crash)
    weights, state = run(9, tmp_path / f"step={crash}.ckpt")
    assert all(torch.equal(weights[name], value) for name, value in undisturbed[0].items())
    assert state == undisturbed[1]


def test_a_checkpoint_of_an_average_holds_the_plain_names_of_both(
    recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, tmp_path: Path
) -> None:
    module = make_module()
    saving = ModelCheckpoint(tmp_path, "a")
    make_trainer(make_callback(recipe), EMAWeightAveraging(decay=DECAY), saving).fit(module)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    plain = make_module()
    for part in ("state_dict", "current_model_state"):
        plain.load_state_dict(saved[part], strict=True)
    assert not torch.equal(saved["state_dict"]["net.0.weight"], saved["current_model_state"]["net.0.weight"])


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with a norm"])
def test_stochastic_weight_averaging_is_masked_afterwards(
    norm: bool, recipe: Any, make_module: Any, make_callback: Any, make_trainer: Any, by_sorting: Any, tmp_path: Path
) -> None:
    path, on = tmp_path / "model.safetensors", recipe.plan().masks is not None
    module, watches, callback = make_module(norm), Watches(), make_callback(recipe)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer = make_trainer(watches, callback, averaging, SparseExport(str(path), one_shot=not on))
    trainer.fit(module)
    at_epochs = [watches.latent[2], watches.latent[5]]  # taken when the second and the third epoch begin
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, sum(w[name] for w in at_epochs) / 2, rtol=1e-5, atol=1e-7)
    assert trainer.global_step == (10 if norm else 9)  # the pass for the norm ends in a step without gradients
    assert callback.sparsifiers[0].t == 9
    written = load_sparse(path)
    assert sorted(read_manifest(path).sparse) == [*NAMES]
    for name in NAMES:
        assert torch.equal(written[name], by_sorting(latents(module)[name]))
    if norm:  # its statistics are those of the masked average, not of the latent one
        again = copy.deepcopy(module)
        update_bn((batch[0] for batch in module.train_dataloader()), again)
        torch.testing.assert_close(again.net[1].running_mean, module.net[1].running_mean)
        torch.testing.assert_close(again.net[1].running_var, module.net[1].running_var)


def test_the_copy_in_an_averaged_model_has_masks_of_its_own(make_module: Any, recipes: Any, by_sorting: Any) -> None:
    """A copy made while masks were off stays dense until it is told, so it is told: a copy is a model of its own."""
    module = make_module(norm=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    sparsifier = Sparsifier(module, optimizer, recipe=recipes["STEP"])
    average = AveragedModel(module)
    for _ in range(6):
        module(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(module)
    assert sparsifier.phase == 2
    copies = nm_masks(average.module)
    assert {mask.enabled for mask in nm_masks(module).values()} == {True}
    assert {mask.enabled for mask in copies.values()} == {False}
    for mask in copies.values():
        mask.enabled = True
    for index in (0, 3):
        latent = average.module.net[index]._parameters["weight"]
        assert torch.equal(average.module.net[index].weight, by_sorting(latent))


def test_an_averaged_copy_whose_masks_are_off_is_not_exported(make_module: Any, recipes: Any, tmp_path: Path) -> None:
    module = make_module()
    sparsifier = Sparsifier(module, torch.optim.AdamW(module.parameters()), recipe=recipes["STEP"])
    average = AveragedModel(module)
    assert sparsifier.phase == 1
    with pytest.raises(ValueError, match="2 masks of which none is on"):
        export_model(average.module, tmp_path / "a.safetensors")
