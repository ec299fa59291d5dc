"""Accumulating k micro-batches is one batch of k, under every recipe, in a real trainer."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_step import STEP, AutoSwitch, STEPSparsityCallback

STEPS, ROWS = 20, 12
BY_SAMPLES = STEP(AutoSwitch(window=3, threshold=2e-4, t_min=5, t_max=15), lam=0.02)


class Parts(pl.LightningModule):
    def __init__(self, net: nn.Module, batch: Any, make: Any, parts: int) -> None:
        super().__init__()
        self.net, self.batch, self.make, self.parts = net, batch, make, parts
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        size = ROWS // self.parts
        rows = slice(batch_idx * size, (batch_idx + 1) * size)
        x, y = self.batch(self.global_step)
        return nn.functional.mse_loss(self.net(x[rows]), y[rows])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(self.parts))  # an epoch is one optimizer step


class Records(pl.Callback):
    """Weights, the weights that the forward pass sees, and the samples, after every optimizer step."""

    def __init__(self, callback: STEPSparsityCallback) -> None:
        self.callback, self.seen = callback, []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        (sparsifier,) = self.callback.sparsifiers
        weights = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        masks = [module.net[i].weight.detach() != 0 for i in (0, 2)]
        self.seen.append((weights, masks, sparsifier.state_dict()["open"], sparsifier.t, sparsifier.events[:]))


def run(recipe: Any, make: Any, parts: int, net: Any, batch: Any, trainer: Any) -> Any:
    callback = STEPSparsityCallback(recipe=recipe, read_every=1)
    records = Records(callback)
    module = Parts(net(), batch, make, parts)
    trainer(callback, records, steps=STEPS, accumulate_grad_batches=parts).fit(module)
    return records.seen


def check(whole: Any, parts: Any) -> None:
    assert len(whole) == len(parts) == STEPS
    for t, (ours, theirs) in enumerate(zip(parts, whole, strict=True), 1):
        for name, weight in theirs[0].items():
            torch.testing.assert_close(ours[0][name], weight, rtol=1e-7, atol=1e-10)
        assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=0)
        assert ours[3] == theirs[3] == t
        assert [(e.step, e.rule) for e in ours[4]] == [(e.step, e.rule) for e in theirs[4]]


@pytest.mark.parametrize("k", [2, 6])
def test_k_micro_batches_equal_one_batch_under_every_recipe(
    k: int, every_recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    def adamw(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.98))

    whole, parts = (run(every_recipe[1], adamw, n, matrix_net, matrix_batch, matrix_trainer) for n in (1, k))
    check(whole, parts)


@pytest.mark.parametrize("fused", [False, True])
def test_one_overflow_among_the_micro_batches_skips_the_whole_step(
    fused: bool, every_recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    """Lightning counts that step; masks, samples and switches do not, and the weights stay."""

    class Overflows(Parts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if (self.global_step, batch_idx) == (7, 1) else 1)

    def adamw(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.98), fused=fused)

    callback = STEPSparsityCallback(recipe=every_recipe[1], read_every=1)
    records = Records(callback)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    module = Overflows(matrix_net(torch.float32), lambda t: [x.float() for x in matrix_batch(t)], adamw, 3)
    matrix_trainer(callback, records, steps=STEPS, accumulate_grad_batches=3, plugins=[plugin]).fit(module)
    assert [seen[3] for seen in records.seen] == [*range(1, 8), *range(7, STEPS)]
    moved = [any(not torch.equal(a[0][k], b[0][k]) for k in a[0]) for a, b in itertools.pairwise(records.seen)]
    assert [i + 1 for i, changed in enumerate(moved) if not changed] == [7]


def test_k_micro_batches_give_the_same_samples_under_every_optimizer(
    every_optimizer: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    whole, parts = (run(BY_SAMPLES, every_optimizer[1], n, matrix_net, matrix_batch, matrix_trainer) for n in (1, 3))
    check(whole, parts)
    assert [len(state["masks"]["samples"]) for _, _, state, _, _ in parts[:4]] == [1, 2, 3, 3]
    (event,) = parts[-1][4]
    assert 5 <= event.step <= 15
