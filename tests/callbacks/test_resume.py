"""Crash and resume equals the uninterrupted run, bit for bit, whenever the crash comes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_step import ASP, SRSTE, STEP, AtStep, AutoSwitch, Dense, STEPSparsityCallback, nm_masks
from lightning_step.errors import ResumeError

STEPS = 20
SWITCH = 10  # by t_max: the window is full from step 6 on, but the threshold is out of reach
RECIPES = {
    "STEP": STEP(AutoSwitch(window=4, threshold=1e-30, t_min=2, t_max=SWITCH), lam=1e-3),
    "STEP-all": STEP(AtStep(SWITCH), scope="all"),
    "STEP-masks-first": STEP(AtStep(SWITCH), masks_from=AtStep(0)),
    "SRSTE": SRSTE(lam=1e-2),
    "ASP": ASP(AtStep(SWITCH)),
    "Dense": Dense(),
}
CRASHES = {"before t_min": 1, "in the window": 7, "right before": SWITCH - 1, "at the switch": SWITCH, "after": 14}


class Crash(pl.Callback):
    """Pulls the plug after a step, once its checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            raise KeyError("crash")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def outcome(trainer: pl.Trainer, module: nn.Module, callback: STEPSparsityCallback) -> dict[str, Any]:
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callback": callback.state_dict(),
        "masks": {name: repr(mask) for name, mask in nm_masks(module).items()},
    }


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_crash_and_resume_equals_uninterrupted(recipe: Any, crash: int, tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    def run(*extra: pl.Callback, ckpt_path: str | None = None) -> dict[str, Any]:
        callback = STEPSparsityCallback(n=1, m=4, recipe=recipe, read_every=3)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        module, trainer = tiny(weight_decay=0.1), make_trainer(callback, saving, *extra, steps=STEPS)
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return outcome(trainer, module, callback)

    undisturbed = run()
    for checkpoint in tmp_path.glob("*.ckpt"):
        checkpoint.unlink()
    with pytest.raises(KeyError, match="crash"):
        run(Crash(crash))
    resumed = run(ckpt_path=str(tmp_path / f"step={crash}.ckpt"))
    for part in undisturbed:
        assert same(undisturbed[part], resumed[part]), part


def checkpoint_of(callback: STEPSparsityCallback, tiny: Any, make_trainer: Any, tmp_path: Any, **optimizer: Any) -> str:
    trainer = make_trainer(callback)
    trainer.fit(tiny(**optimizer))
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    return path


def test_a_sparse_checkpoint_loads_strictly_into_the_plain_module_and_back(
    tiny: Any, make_trainer: Any, tmp_path: Any
) -> None:
    path = checkpoint_of(STEPSparsityCallback(recipe=STEP(AtStep(3))), tiny, make_trainer, tmp_path)
    weights = torch.load(path, weights_only=True)["state_dict"]
    plain = tiny()
    plain.load_state_dict(weights, strict=True)
    assert list(plain.state_dict()) == list(weights)
    masked = tiny()
    make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3)))).fit(masked)
    masked.load_state_dict(plain.state_dict(), strict=True)


def test_resume_with_another_pattern_shows_both(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    path = checkpoint_of(STEPSparsityCallback(n=2, m=4), tiny, make_trainer, tmp_path)
    other = make_trainer(STEPSparsityCallback(n=1, m=4), steps=30)
    with pytest.raises(
        ResumeError, match=r"net\.0\.weight was 2:4 along dim 1, is 1:4 along dim 1; .*Resume with the same n, m"
    ):
        other.fit(tiny(), ckpt_path=path)


def test_resume_with_another_selection_shows_what_differs(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    path = checkpoint_of(STEPSparsityCallback(), tiny, make_trainer, tmp_path)
    other = make_trainer(STEPSparsityCallback(exclude=["head"]), steps=30)
    with pytest.raises(ResumeError, match=r"head\.weight was 2:4 along dim 1, is dense\. Resume"):
        other.fit(tiny(), ckpt_path=path)


def test_resume_with_another_recipe_shows_both(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    path = checkpoint_of(STEPSparsityCallback(recipe=SRSTE(lam=1e-3)), tiny, make_trainer, tmp_path)
    other = make_trainer(STEPSparsityCallback(recipe=SRSTE(lam=2e-3)), steps=30)
    with pytest.raises(ResumeError, match=r"SRSTE\(lam=0.001\), but got SRSTE\(lam=0.002\)\. Resume with the same recipe"):
        other.fit(tiny(), ckpt_path=path)


def test_a_state_of_a_newer_version_is_refused(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    path = checkpoint_of(STEPSparsityCallback(), tiny, make_trainer, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["STEPSparsityCallback"]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match="Expected a state of version 1, but got version 99"):
        make_trainer(STEPSparsityCallback(), steps=30).fit(tiny(), ckpt_path=path)


def test_resume_in_phase_two_without_optimizer_state_is_refused(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    path = checkpoint_of(STEPSparsityCallback(recipe=STEP(AtStep(3))), tiny, make_trainer, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"][0]["state"] = {}
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match=r"preconditioner of 'net\.0\.weight' \(and 2 more\).*optimizer without state"):
        make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3))), steps=30).fit(tiny(), ckpt_path=path)


def test_the_state_dict_is_never_empty_and_plain(tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback()
    assert callback.state_dict()

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return all(map(plain, value)) if type(value) is list else type(value) in (int, float, str, bool, type(None))

    make_trainer(callback).fit(tiny())
    assert plain(callback.state_dict())
