"""Learning-rate schedules and gradient clipping under every recipe, step by step against the oracle, in a real trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_step import STEP, AtStep, STEPSparsityCallback

STEPS, PER_EPOCH = 20, 4


def warm_up(optimizer: Any) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, STEPS)], [5])


SCHEDULES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "every step": lambda o: {"scheduler": lr_scheduler.StepLR(o, 3, 0.7), "interval": "step"},
    "every epoch": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.7), "interval": "epoch"},
    "warm-up": lambda o: {"scheduler": warm_up(o), "interval": "step"},
    "one cycle, of beta1 too": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.03, STEPS), "interval": "step"},
    "plateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.9),
        "interval": "epoch",
        "monitor": "loss",
    },
}


class Scheduled(pl.LightningModule):
    def __init__(self, net: nn.Module, batch: Any, make: Any, schedule: Any = None) -> None:
        super().__init__()
        self.net, self.batch, self.make, self.schedule = net, batch, make, schedule
        self.settings: list[tuple[float, tuple[float, float]]] = []
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.batch(self.global_step)
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.settings.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.history.append({name: p.detach().clone() for name, p in self.net.named_parameters()})

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return optimizer if self.schedule is None else {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(PER_EPOCH))


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.98), weight_decay=0.1)


def check(module: Scheduled, expected: list[dict[str, Tensor]]) -> None:
    assert len(module.history) == STEPS
    for ours, theirs in zip(module.history, expected, strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_frozen_step_takes_the_rate_in_effect(
    schedule: str, every_recipe: Any, by_hand: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    name, recipe = every_recipe
    module = Scheduled(matrix_net(), matrix_batch, adamw, SCHEDULES[schedule])
    matrix_trainer(STEPSparsityCallback(recipe=recipe), steps=STEPS).fit(module)
    for phase in (slice(0, 10), slice(10, STEPS)):
        assert len({lr for lr, _ in module.settings[phase]}) > 1, "the rate has to change in both phases"
    assert (len({betas for _, betas in module.settings}) > 1) is (schedule == "one cycle, of beta1 too")
    check(module, by_hand(name, "AdamW", module.settings))


@pytest.mark.parametrize("how", ["norm", "value"])
def test_clipping_comes_before_the_recipes_own_term(
    how: str, every_recipe: Any, by_hand: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    name, recipe = every_recipe
    bound = {"norm": 0.3, "value": 0.05}[how]
    module = Scheduled(matrix_net(), matrix_batch, adamw)
    clip = {"gradient_clip_val": bound, "gradient_clip_algorithm": how}
    matrix_trainer(STEPSparsityCallback(recipe=recipe), steps=STEPS, **clip).fit(module)
    clipped = by_hand(name, "AdamW", module.settings, **{how: bound})
    check(module, clipped)
    free = by_hand(name, "AdamW", module.settings)
    assert not torch.allclose(clipped[-1]["0.weight"], free[-1]["0.weight"], rtol=1e-3), "the bound has to bind"


@pytest.mark.parametrize("schedule", ["every step", "every epoch"])
def test_every_optimizer_takes_the_rate_in_effect_and_clipped_gradients(
    schedule: str, every_optimizer: Any, by_hand: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    kind, make = every_optimizer
    module = Scheduled(matrix_net(), matrix_batch, make, SCHEDULES[schedule])
    callback = STEPSparsityCallback(recipe=STEP(AtStep(10), lam=0.02))
    matrix_trainer(callback, steps=STEPS, gradient_clip_val=0.3).fit(module)
    for ours, theirs in zip(module.history, by_hand("STEP", kind, module.settings, norm=0.3), strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-8)
