"""A GAN under manual optimization: two optimizers, toggled, of which one steps twice as often."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as loss_of

from lightning_step import STEP, AtStep, AutoSwitch, STEPSparsityCallback, nm_masks, strip

ROUNDS = 24  # each one step of the generator and two of the discriminator
STEPS = {"generator": ROUNDS, "discriminator": 2 * ROUNDS}


class Gan(pl.LightningModule):
    def __init__(self, kind: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization = False
        self.kind = kind
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.fade = {"generator": 1.0, "discriminator": 1.0}  # of the losses, from round to round
        self.v: dict[str, list[Tensor]] = {name: [] for name in STEPS}

    def noise(self, rows: int = 16) -> Tensor:
        return torch.randn(rows, 4, generator=torch.Generator().manual_seed(self.global_step), dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for _ in range(2):
            self.toggle_optimizer(discriminator)
            fake, real = self.generator(self.noise()).detach(), self.noise().repeat(1, 2).sin()
            scores = self.discriminator(torch.cat([fake, real]))
            loss = loss_of(scores, torch.cat([torch.zeros(16, 1), torch.ones(16, 1)]).double())
            self.manual_backward(loss * self.fade["discriminator"] ** self.current_epoch)
            discriminator.step()
            discriminator.zero_grad()
            self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        loss = loss_of(self.discriminator(self.generator(self.noise())), torch.ones(16, 1).double())
        self.manual_backward(loss * self.fade["generator"] ** self.current_epoch)
        assert all(p.grad is None for p in self.discriminator.parameters())
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        made = [self.kind(getattr(self, name).parameters(), lr=5e-3, betas=(0.5, 0.7)) for name in STEPS]
        for name, optimizer in zip(STEPS, made, strict=True):
            optimizer.register_step_post_hook(lambda o, *_, name=name: self.copy_of_v(name, o))
        return made, []

    def copy_of_v(self, name: str, optimizer: Any) -> None:
        matrices = [p for p in getattr(self, name).parameters() if p.ndim == 2]
        self.v[name].append(torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in matrices]))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1))


def switch_from_copies(v: list[Tensor], switch: AutoSwitch, total: int) -> int:
    """The first step at which the window mean of |v_t - v_{t-1}| is below the threshold."""
    changes = [float((after - before).abs().mean()) for before, after in itertools.pairwise([torch.zeros_like(v[0]), *v])]
    low, window = round(switch.t_min * total), switch.window
    assert window is not None
    assert switch.threshold is not None
    means = {t: sum(changes[t - window : t]) / window for t in range(window, len(changes) + 1)}
    return next(t for t, mean in means.items() if t >= low and mean < switch.threshold)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_each_optimizer_switches_by_its_own_second_moment_at_its_own_step(kind: Any, matrix_trainer: Any) -> None:
    switch = AutoSwitch(window=4, threshold=1e-7, t_min=0.25, t_max=0.9)
    callback = STEPSparsityCallback(recipe=STEP(switch), total_steps=list(STEPS.values()), read_every=1)
    module = Gan(kind)
    module.fade = {"generator": 0.6, "discriminator": 0.8}  # so that v settles early in one and late in the other
    seen: list[tuple[int, ...]] = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            on = {name.split(".")[0]: mask.enabled for name, mask in nm_masks(module).items()}
            seen.append(tuple(int(on[name]) + 1 for name in STEPS))
            assert seen[-1] == tuple(sparsifier.phase for sparsifier in callback.sparsifiers)

    matrix_trainer(callback, Watches(), steps=-1, max_epochs=ROUNDS).fit(module)
    expected = [switch_from_copies(module.v[name], switch, total) for name, total in STEPS.items()]
    assert [[event.step for event in s.events] for s in callback.sparsifiers] == [[step] for step in expected]
    assert {s.events[0].rule for s in callback.sparsifiers} == {"window mean below threshold"}
    assert [s.t for s in callback.sparsifiers] == list(STEPS.values())
    rounds = [expected[0], -(-expected[1] // 2)]
    assert rounds[0] != rounds[1], "they have to switch in different rounds, or nothing is shown"
    assert seen == [(1 + (i >= rounds[0]), 1 + (i >= rounds[1])) for i in range(1, ROUNDS + 1)]


def test_every_recipe_masks_both_networks(every_recipe: Any, matrix_trainer: Any) -> None:
    name, recipe = every_recipe
    callback, module = STEPSparsityCallback(recipe=recipe), Gan()
    matrix_trainer(callback, steps=-1, max_epochs=ROUNDS).fit(module)
    starts = {"Dense": [], "ASP": [10], "STEP": [10]}.get(name, [0])
    assert [[event.step for event in s.events] for s in callback.sparsifiers] == [starts, starts]
    matrices = [f"{network}.{i}.weight" for network in STEPS for i in (0, 2)]
    assert sorted(strip(module)) == ([] if name == "Dense" else sorted(matrices))
    for matrix in matrices:
        sparse = ((module.get_parameter(matrix).reshape(-1, 4) != 0).sum(1) == 2).all()
        assert bool(sparse) is (name != "Dense")


@pytest.mark.parametrize("crash", [6, 14, 18])  # before the first switch, between the two, after both
def test_a_gan_resumed_between_its_switches_equals_the_undisturbed_one(
    crash: int, matrix_trainer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "crash.ckpt"

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 3 * crash:
                trainer.save_checkpoint(path)

    def fit(*callbacks: pl.Callback, **arguments: Any) -> Any:
        callback, module = STEPSparsityCallback(recipe=STEP(AtStep(0.65)), total_steps=[24, 24]), Gan()
        matrix_trainer(callback, *callbacks, steps=-1, max_epochs=ROUNDS).fit(module, **arguments)
        return module, callback

    whole, callback = fit(Saves())
    assert [[event.step for event in s.events] for s in callback.sparsifiers] == [[16], [16]]
    resumed, again = fit(ckpt_path=path)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [(s.t, s.events, s.frozen) for s in again.sparsifiers] == [
        (s.t, s.events, s.frozen) for s in callback.sparsifiers
    ]
