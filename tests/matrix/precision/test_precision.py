"""Every precision of the trainer under every recipe: single, bf16, and fp16 with a loss scaler on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_step import STEP, AutoSwitch, STEPSparsityCallback, nm_masks, strip

STEPS, SWITCH = 20, 10
MASKED = ("0.weight", "2.weight")
BY_SAMPLES = STEP(AutoSwitch(window=3, threshold=1e-3, t_min=5, t_max=15), lam=0.02)


class Net(pl.LightningModule):
    """Steps on data of its own count; what is in ``bad`` are batches whose loss overflows."""

    def __init__(self, net: nn.Module, batch: Any, make: Any, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.net, self.batch, self.make, self.bad = net, batch, make, bad
        self.good = 0
        self.history: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (part.to(self.net[0].bias.dtype) for part in self.batch(self.good))
        loss = nn.functional.mse_loss(self.net(x), y)
        return loss * float("inf") if self.current_epoch in self.bad else loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scales += [] if scaler is None else [scaler.get_scale()]
        if self.current_epoch not in self.bad:
            self.good += 1
            self.history.append({name: p.detach().clone() for name, p in self.net.named_parameters()})

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1))  # one batch an epoch


class ScaledOnly(MixedPrecision):
    """A loss scaler without half precision: what it does can be seen to the bit."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4))

    def autocast_context_manager(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6))


def adamw(parameters: Any, **more: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.98), weight_decay=0.1, **more)


PRECISIONS: dict[str, Any] = {
    "32-true": lambda: {"precision": "32-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "16-mixed": lambda: {"plugins": [half()]},
}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_ends_with_the_pattern_and_the_dtypes_of_the_precision(
    precision: str, every_recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    name, recipe = every_recipe
    callback = STEPSparsityCallback(recipe=recipe)
    module = Net(matrix_net(torch.float32), matrix_batch, adamw)
    trainer = matrix_trainer(callback, steps=STEPS, **PRECISIONS[precision]())
    trainer.fit(module)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    (sparsifier,) = callback.sparsifiers
    assert [event.step for event in sparsifier.events] == {"Dense": [], "ASP": [10], "STEP": [10]}.get(name, [0])
    for parameter in module.net.parameters():
        state = trainer.optimizers[0].state[parameter]
        assert parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert all(bool(torch.isfinite(tensor).all()) for tensor in (parameter, *state.values()))
    assert strip(module.net) == ([] if name == "Dense" else list(MASKED))
    for masked in MASKED:
        kept = (module.net.get_parameter(masked).reshape(-1, 4) != 0).sum(1)
        assert bool((kept == 2).all()) is (name != "Dense")


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 1e-4), ("16-mixed", 2e-2)])
def test_a_run_equals_the_one_by_hand_in_the_same_precision(
    precision: str,
    tolerance: float,
    every_recipe: Any,
    by_hand: Any,
    matrix_net: Any,
    matrix_batch: Any,
    matrix_trainer: Any,
) -> None:
    name, recipe = every_recipe
    module = Net(matrix_net(torch.float32), matrix_batch, adamw)
    matrix_trainer(STEPSparsityCallback(recipe=recipe), steps=STEPS, **PRECISIONS[precision]()).fit(module)
    settings = [(0.02, (0.9, 0.98))] * STEPS
    expected = by_hand(name, "AdamW", settings, autocast=AUTOCAST.get(precision), dtype=torch.float32)
    for ours, theirs in zip(module.history, expected, strict=True):
        for key, weight in ours.items():
            torch.testing.assert_close(weight, theirs[key], rtol=tolerance, atol=tolerance)
    wrong = by_hand("Dense" if name != "Dense" else "STE", "AdamW", settings, dtype=torch.float32)
    assert any(not torch.allclose(ours, wrong[-1][key], atol=2e-2) for key, ours in module.history[-1].items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_the_dense_phase_is_that_of_the_plain_trainer_bit_for_bit(
    precision: str, every_recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    name, recipe = every_recipe
    dense = {"ASP": SWITCH - 1, "STEP": SWITCH, "Dense": STEPS}.get(name, 0)  # ASP prunes right after its step
    histories = []
    for callbacks in ([], [STEPSparsityCallback(recipe=recipe)]):
        module = Net(matrix_net(torch.float32), matrix_batch, adamw)
        matrix_trainer(*callbacks, steps=STEPS, **PRECISIONS[precision]()).fit(module)
        histories.append(module.history)
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(*histories, strict=True)]
    assert same == [True] * dense + [False] * (STEPS - dense)


def test_phase_two_in_bf16_is_within_its_rounding_of_the_reference(
    matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    from_state: list[tuple[Tensor, Tensor]] = []

    class Checks(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            weight = module.net[0]._parameters["weight"]
            state = optimizer.state.get(weight)
            if nm_masks(module)["net.0.weight"].enabled:
                mask = nm_masks(module)["net.0.weight"].mask(weight)
                w, m, root = (part.detach().double() for part in (weight, state["exp_avg"], state["exp_avg_sq"]))
                grad = weight.grad.double() + 0.02 * (w * ~mask)
                m = 0.9 * m + 0.1 * grad
                move = (m / (1 - 0.9 ** (float(state["step"]) + 1)) / root).clamp(-1, 1)
                self.expected = w * (1 - 0.02 * 0.1) - 0.02 * move

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
            if hasattr(self, "expected"):
                from_state.append((module.net[0]._parameters["weight"].detach().double(), self.expected))

    recipe = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=5, t_max=SWITCH), lam=0.02, max_step=1.0)
    module = Net(matrix_net(torch.float32), matrix_batch, adamw)
    matrix_trainer(STEPSparsityCallback(recipe=recipe), Checks(), steps=STEPS, precision="bf16-true").fit(module)
    assert len(from_state) == STEPS - SWITCH
    for ours, theirs in from_state:
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=5e-4)
        assert (ours - theirs).abs().mean() < 1.5 * 2**-9 * theirs.abs().mean(), "rounded twice, and no more"


SCALED = {
    "AdamW": lambda p: adamw(p, foreach=True),
    "fused AdamW": lambda p: adamw(p, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, betas=(0.9, 0.98)),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02, betas=(0.9, 0.98)),
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_loss_scaling_changes_nothing_and_skipped_steps_are_none(
    make: Any, every_recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    """Right before, at and after the switch, too; scales are powers of two, so all is equal to the bit."""
    bad = (0, 3, 4, 12, 13, 15, 16, 19)
    runs = []
    for overflows, plugins in (((), []), (bad, [ScaledOnly()])):
        callback = STEPSparsityCallback(recipe=every_recipe[1], total_steps=STEPS)
        module = Net(matrix_net(torch.float32), matrix_batch, make, overflows)
        trainer = matrix_trainer(callback, steps=STEPS + len(overflows), plugins=plugins)
        trainer.fit(module)
        runs.append((module, callback.sparsifiers[0], trainer))
    (plain, sparsifier, _), (scaled, other, trainer) = runs
    assert len(set(scaled.scales)) > 3, "the scale has to change"
    assert trainer.global_step == STEPS + len(bad), "Lightning counts skipped steps"
    assert (other.t, other.events, other.frozen) == (sparsifier.t, sparsifier.events, sparsifier.frozen)
    assert other.t == STEPS
    for ours, theirs in zip(scaled.history, plain.history, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_samples_of_v_are_the_same_with_scaling_and_none_is_taken_from_a_skipped_step(
    make: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    gauges: list[list[Any]] = []
    for overflows, plugins in (((), []), ((0, 2, 5, 6, 9), [ScaledOnly()])):
        seen: list[Any] = []
        callback = STEPSparsityCallback(recipe=BY_SAMPLES, read_every=1, total_steps=STEPS)

        class Watches(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
                if module.current_epoch not in module.bad:
                    seen.append(callback.sparsifiers[0].state_dict()["open"])  # noqa: B023

        module = Net(matrix_net(torch.float32), matrix_batch, make, overflows)
        matrix_trainer(callback, Watches(), steps=STEPS + len(overflows), plugins=plugins).fit(module)
        gauges.append([seen, callback.sparsifiers[0].events])
    assert gauges[0] == gauges[1]
    (event,) = gauges[0][1]
    assert 5 <= event.step <= 15
    assert [len(state["masks"]["samples"]) for state in gauges[0][0][:4]] == [1, 2, 3, 3]


class Scheduled(Net):
    """Notes the rate of every step that is not skipped."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.current_epoch not in self.bad:
            self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("fused", [False, True])
def test_a_scheduler_and_a_loss_scaler_work_together(
    fused: bool, every_recipe: Any, by_hand: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    bad = (3, 9, 10, 11, 16)

    def make(parameters: Any) -> Any:
        return adamw(parameters, fused=fused)

    module = Scheduled(matrix_net(torch.float32), matrix_batch, make, bad)
    trainer = matrix_trainer(STEPSparsityCallback(recipe=every_recipe[1]), steps=STEPS + len(bad), plugins=[ScaledOnly()])
    trainer.fit(module)
    assert len(module.rates) == STEPS
    expected = by_hand(every_recipe[0], "AdamW", [(lr, (0.9, 0.98)) for lr in module.rates], dtype=torch.float32)
    for ours, theirs in zip(module.history, expected, strict=True):
        for key, weight in ours.items():
            torch.testing.assert_close(weight, theirs[key], rtol=1e-4, atol=1e-5)
