"""Optimizers without a second moment to freeze: at work under every recipe but STEP, which refuses them by name."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adamax, AdamW, Muon, RMSprop

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, Sparsifier, STEPSparsityCallback, nm_masks, strip
from lightning_step.errors import OptimizerError

STRANGERS = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.05),
    "Adamax": lambda p: Adamax(p, lr=0.02),
    "Adafactor": lambda p: Adafactor(p, lr=0.02),
}
WITHOUT_SWITCH = {"Dense": Dense(), "ASP": ASP(AtStep(6)), "STE": STE(), "SRSTE": SRSTE(lam=0.01)}


class OneOptimizer(pl.LightningModule):
    def __init__(self, net: nn.Module, make: Any, batch: Any) -> None:
        super().__init__()
        self.net, self.make, self.batch = net, make, batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.batch(self.global_step)
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1))


class MuonAndAdamW(OneOptimizer):
    """Muon for the first matrix, AdamW for the rest, by hand."""

    def __init__(self, net: nn.Module, batch: Any) -> None:
        super().__init__(net, None, batch)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.batch(self.global_step // 2)
        self.manual_backward(nn.functional.mse_loss(self.net(x), y))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        rest = [p for name, p in self.net.named_parameters() if name != "0.weight"]
        return [Muon([self.net[0].weight], lr=0.02), AdamW(rest, lr=0.02)], []


def sparse_groups(weight: Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)
def test_step_refuses_a_stranger_with_masked_tensors_by_name_when_fitting_starts(
    make: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    module = OneOptimizer(matrix_net(), make, matrix_batch)
    name = type(make(module.net.parameters())).__name__
    trainer = matrix_trainer(STEPSparsityCallback(recipe=STEP(AtStep(6))))
    with pytest.raises(OptimizerError, match=rf"but got torch\.optim\.\w*\.?{name}\. .*SRSTE, STE, ASP, Dense"):
        trainer.fit(module)
    assert trainer.global_step == 0


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("recipe", WITHOUT_SWITCH.values(), ids=WITHOUT_SWITCH)
def test_the_other_recipes_work_with_any_optimizer(
    recipe: Any, make: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    weights = {}
    for callbacks in ([], [STEPSparsityCallback(recipe=recipe)]):
        module = OneOptimizer(matrix_net(), make, matrix_batch)
        matrix_trainer(*callbacks, steps=12).fit(module)
        weights[bool(callbacks)] = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        masked = strip(module.net)
    assert masked == ([] if recipe == Dense() else ["0.weight", "2.weight"])
    assert all(sparse_groups(module.net.get_parameter(name)) for name in masked)
    same = all(torch.equal(weights[True][name], weight) for name, weight in weights[False].items())
    assert same is (recipe == Dense())


@pytest.mark.parametrize("recipe", WITHOUT_SWITCH.values(), ids=WITHOUT_SWITCH)
def test_muon_for_one_matrix_and_adamw_for_the_rest(
    recipe: Any, matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    seen: list[float] = []
    module = MuonAndAdamW(matrix_net(), matrix_batch)
    callback = STEPSparsityCallback(recipe=recipe, total_steps=12)
    trainer = matrix_trainer(callback, steps=24)

    class Watches(pl.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            momentum = trainer.optimizers[0].state[module.net[0]._parameters["weight"]]["momentum_buffer"]
            seen.append(float(momentum.norm()))

    trainer.callbacks.append(Watches())
    trainer.fit(module)
    assert [s.t for s in callback.sparsifiers] == [12, 12]
    assert all(norm > 0 for norm in seen)
    assert strip(module.net) == ([] if recipe == Dense() else ["0.weight", "2.weight"])
    for layer in (0, 2):
        assert sparse_groups(module.net[layer].weight) is (recipe != Dense())


def test_muon_is_refused_under_step_where_it_holds_masked_tensors(
    matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    trainer = matrix_trainer(STEPSparsityCallback(recipe=STEP(AtStep(6))))
    with pytest.raises(OptimizerError, match=r"but got torch\.optim\.Muon\. It has a momentum only.* `exclude`"):
        trainer.fit(MuonAndAdamW(matrix_net(), matrix_batch))


def test_an_optimizer_without_masked_tensors_is_left_alone_under_step(
    matrix_net: Any, matrix_batch: Any, matrix_trainer: Any
) -> None:
    callback = STEPSparsityCallback(recipe=STEP(AtStep(6), scope="all"), exclude=["net.0"])
    module = MuonAndAdamW(matrix_net(), matrix_batch)
    hooks: list[int] = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
            hooks[:] = [len(optimizer._optimizer_step_pre_hooks) for optimizer in trainer.optimizers]

    trainer = matrix_trainer(callback, Watches(), steps=24)
    trainer.fit(module)
    assert hooks == [0, 1]
    (only,) = callback.sparsifiers
    assert (only.t, [event.step for event in only.events]) == (12, [6])
    assert sorted(only.frozen) == ["net.0.bias", "net.2.bias", "net.2.weight"]
    assert list(nm_masks(module)) == ["net.2.weight"]


# schedulefree -------------------------------------------------------------------------------------------------------


def schedule_free(matrix_net: Any) -> Any:
    model = matrix_net()
    return model, schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02)


def train_schedule_free(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
    optimizer.train()
    for t in range(steps):
        x, y = batch(t)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("recipe", [STE(), SRSTE(lam=0.01)], ids=["STE", "SRSTE"])
def test_masks_follow_the_weights_that_schedulefree_trains_and_those_it_evaluates(
    recipe: Any, matrix_net: Any, matrix_batch: Any
) -> None:
    model, optimizer = schedule_free(matrix_net)
    Sparsifier(model, optimizer, recipe=recipe)
    train_schedule_free(model, optimizer, matrix_batch, 30)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(sparse_groups(model[i].weight) for i in (0, 2))
    optimizer.eval()
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not any(torch.equal(averaged[name], trained[name]) for name in averaged)
    assert strip(model) == ["0.weight", "2.weight"]
    for i in (0, 2):
        weight = model[i].weight
        assert sparse_groups(weight)
        assert torch.equal(weight, torch.where(weight != 0, averaged[f"{i}.weight"], 0.0)), "what is kept is the average"


def test_schedulefree_is_refused_by_recipes_that_freeze_or_hold_zeros(matrix_net: Any) -> None:
    model, optimizer = schedule_free(matrix_net)
    name = r"schedulefree\.\w+\.AdamWScheduleFree"
    with pytest.raises(OptimizerError, match=rf"but got {name}\. It trains one set of weights and evaluates another"):
        Sparsifier(model, optimizer, recipe=STEP(AtStep(6)))
    with pytest.raises(OptimizerError, match=rf"keeps the weights only once, but got {name}\. .* Use SRSTE or STE"):
        Sparsifier(model, optimizer, recipe=ASP(AtStep(6)))
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_weights_that_schedulefree_averages_come_back_after_pruning(matrix_net: Any, matrix_batch: Any) -> None:
    """Why it is refused: zeros held where the model trains are no zeros of the average."""
    model, optimizer = schedule_free(matrix_net)
    train_schedule_free(model, optimizer, matrix_batch, 5)
    pruned = torch.zeros(16, 8, dtype=torch.bool)
    pruned[:, ::2] = True
    for _ in range(20):
        model[0].weight.data[pruned] = 0.0
        model[0].weight.grad = torch.where(pruned, 0.0, torch.ones(16, 8, dtype=torch.float64))
        optimizer.step()
    model[0].weight.data[pruned] = 0.0
    optimizer.eval()
    assert bool((model[0].weight[pruned] != 0).all())
