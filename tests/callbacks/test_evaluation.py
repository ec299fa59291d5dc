"""Evaluation in a real Trainer computes each mask once, and of the weights that are in place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, Recipe, STEPSparsityCallback, nm_masks
from tests.writes import count_masks

RECIPES: dict[str, Recipe] = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(4)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(4), lam=1e-2),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


def anew(model: nn.Module) -> dict[str, Tensor]:
    """Every masked weight, computed without anything that is kept."""
    latents = dict(model.named_parameters())
    return {name: mask(latents[name]).detach() for name, mask in nm_masks(model).items()}


def shown(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name.rpartition(".")[0]).weight for name in nm_masks(model)}


class Watch(pl.Callback):
    """Compares what every batch sees with the masks computed anew."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        masked, expected = shown(pl_module), anew(pl_module)
        self.seen.append(all(torch.equal(masked[name], weight) for name, weight in expected.items()))

    on_train_batch_start = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = look


class Average(pl.Callback):
    """Swaps an average in around validation, past autograd; of other signs and places, so that masks differ."""

    def swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.copy_(parameter.data.flip(-1))

    on_validation_start = on_validation_end = swap


class AverageOfTheEpoch(pl.Callback):
    on_validation_epoch_start = on_validation_epoch_end = Average.swap


def in_train_mode(model: Any) -> Any:
    """Some models sample in validation, too: they never call eval()."""
    model.on_validation_model_eval = model.on_validation_model_train = lambda: None
    return model


@pytest.mark.parametrize("model_mode", [lambda model: model, in_train_mode], ids=["eval", "train"])
@pytest.mark.parametrize("average", [Average, AverageOfTheEpoch])
@pytest.mark.parametrize("ours_first", [True, False])
@every_recipe
def test_averages_that_are_swapped_in_are_validated_with_their_own_masks(
    recipe: Recipe, average: Any, ours_first: bool, model_mode: Any, tiny: Any, make_trainer: Any
) -> None:
    ours, watch = STEPSparsityCallback(recipe=recipe, verbose=False, total_steps=8), Watch()
    callbacks = [ours, average(), watch] if ours_first else [average(), ours, watch]
    arguments = {"limit_val_batches": 1, "accumulate_grad_batches": 2, "limit_train_batches": 4, "val_check_interval": 1}
    arguments["inference_mode"] = model_mode is not in_train_mode  # nothing is kept of what inference mode computes
    model = model_mode(tiny())
    make_trainer(*callbacks, steps=8, **arguments).fit(model, torch.utils.data.DataLoader(torch.zeros(4)))
    assert len(watch.seen) == 32, "16 batches, each followed by a validation of one"
    assert all(watch.seen)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = count_masks(monkeypatch)
    return shapes


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_loop_of_evaluation_computes_each_mask_once(
    verb: str, inference_mode: bool, tiny: Any, make_trainer: Any, computed: list[tuple[int, ...]]
) -> None:
    callback, model = STEPSparsityCallback(recipe=SRSTE(), verbose=False), tiny()
    make_trainer(callback, steps=3).fit(model)
    computed.clear()
    two = [torch.utils.data.DataLoader(torch.zeros(4)) for _ in range(2)]
    trainer = make_trainer(
        callback, limit_val_batches=4, limit_test_batches=4, limit_predict_batches=4, inference_mode=inference_mode
    )
    model.validation_step = model.test_step = model.predict_step = lambda batch, batch_idx, dataloader_idx: model(
        model.batch(3)[0]
    )
    getattr(trainer, verb)(model, two)
    assert sorted(computed) == sorted(tuple(p.shape) for name, p in model.named_parameters() if name in nm_masks(model))
    assert [mask.kept._weight for mask in nm_masks(model).values()] == [None] * 3
    model.net[0](torch.ones(1, 8)).sum().backward()


def reads_late(model: Any) -> Any:
    """It has masks computed, by a forward pass in training mode, after the last of our hooks that ends evaluation."""
    model = in_train_mode(model)
    model.on_validation_epoch_end = lambda: model(model.batch(3)[0])
    return model


@pytest.mark.parametrize(("keep", "late"), [(True, reads_late), (False, in_train_mode)])
@pytest.mark.parametrize("ours_first", [True, False])
@every_recipe
def test_what_validation_reads_in_training_mode_is_forgotten_when_weights_are_swapped_back(
    recipe: Recipe, ours_first: bool, keep: bool, late: Any, tiny: Any, make_trainer: Any
) -> None:
    ours, watch = STEPSparsityCallback(recipe=recipe, verbose=False, keep_evaluation_weights=keep), Watch()
    callbacks = [ours, Average(), watch] if ours_first else [Average(), ours, watch]
    trainer = make_trainer(*callbacks, steps=6, limit_val_batches=1, val_check_interval=1, inference_mode=False)
    trainer.fit(late(tiny()))
    assert len(watch.seen) == 12
    assert all(watch.seen)


def held(model: nn.Module) -> int:
    """How many tensors of the size of a masked one have been made since `new_tensors` began, and are still there."""
    sizes = {parameter.numel() for name, parameter in model.named_parameters() if name in nm_masks(model)}
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.is_floating_point()]
    return sum(each.numel() in sizes for each in tensors)


@pytest.fixture
def new_tensors() -> Iterator[Callable[[], None]]:
    yield gc.freeze  # what there is already is not listed any more
    gc.unfreeze()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@every_recipe
def test_masked_weights_are_held_during_a_loop_of_evaluation_only_if_they_are_to_be_kept(
    recipe: Recipe, verb: str, keep: bool, tiny: Any, make_trainer: Any, new_tensors: Callable[[], None]
) -> None:
    callback, model = STEPSparsityCallback(recipe=recipe, verbose=False, keep_evaluation_weights=keep), tiny()
    make_trainer(callback, steps=6).fit(model)
    model.validation_step = model.test_step = model.predict_step = lambda batch, batch_idx: model(torch.ones(3, 8))
    expected = model(torch.ones(3, 8)).detach()
    counts: list[int] = []
    for layer in (model.net[0], model.net[2], model.head):
        layer.register_forward_hook(lambda *_: counts.append(held(model)))
    trainer = make_trainer(callback, **{f"limit_{each}_batches": 2 for each in ("val", "test", "predict")})
    data = torch.utils.data.DataLoader(torch.zeros(2))
    new_tensors()
    found = getattr(trainer, verb)(model, data)
    masks_on = not isinstance(recipe, Dense)
    assert counts == ([1, 2, 3, 3, 3, 3] if keep and masks_on else [0] * 6)
    assert held(model) == 0
    if verb == "predict":
        assert all(torch.equal(each, expected) for each in found)


def test_evaluation_that_fails_leaves_nothing_behind(tiny: Any, make_trainer: Any) -> None:
    callback, model = STEPSparsityCallback(recipe=SRSTE(), verbose=False), tiny()
    make_trainer(callback, steps=3).fit(model)

    def validation_step(batch: Any, batch_idx: int) -> None:
        model(model.batch(3)[0])
        raise RuntimeError("of the user's")

    model.validation_step, evaluated = validation_step, model.validation_step
    with pytest.raises(RuntimeError, match="of the user's"):
        make_trainer(callback, limit_val_batches=1).validate(model)
    assert all(mask.kept._weight is None and not mask.kept.windows for mask in nm_masks(model).values())
    model.validation_step = evaluated
    make_trainer(callback, limit_val_batches=1).validate(model, verbose=False)


class ByHand(pl.Callback):
    """Takes away whatever is kept, before every read that could use it."""

    def drop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for mask in nm_masks(pl_module).values():
            mask.kept.train(False)

    on_train_batch_start = drop


class TwoOptimizers(pl.LightningModule):
    """Under manual optimization, one optimizer stepping half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)
        self.manual_backward((self.second(self.first(torch.randn(4, 8)).tanh()) - 1).square().mean())
        for every, optimizer in zip((1, 2), self.optimizers(), strict=True):  # type: ignore[arg-type]
            if batch_idx % every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        fused = torch.optim.AdamW(self.second.parameters(), lr=0.05, fused=True)
        return [torch.optim.AdamW(self.first.parameters(), lr=0.05), fused]

    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.zeros(10))


@every_recipe
def test_two_optimizers_by_hand_train_the_same_bit_for_bit(recipe: Recipe, make_trainer: Any) -> None:
    ends, watch = [], Watch()
    for others in ([watch], [ByHand()]):
        torch.manual_seed(0)
        model = TwoOptimizers()
        callback = STEPSparsityCallback(recipe=recipe, verbose=False, total_steps=[10, 5])
        make_trainer(callback, *others, steps=-1, max_epochs=1).fit(model)
        ends.append(list(model.state_dict().values()))
    assert all(map(torch.equal, *ends))
    assert watch.seen == [True] * 10


@pytest.mark.parametrize("batches", [1, 2])
@every_recipe
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    recipe: Recipe, batches: int, tiny: Any, make_trainer: Any, tmp_path: Any
) -> None:
    def fit(checkpoint: Any = None) -> list[Tensor]:
        callback, model = STEPSparsityCallback(recipe=recipe, verbose=False, total_steps=8), tiny()
        every = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(callback, every, steps=8, accumulate_grad_batches=batches)
        data = torch.utils.data.DataLoader(torch.zeros(batches))
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return list(model.state_dict().values())

    whole = fit()
    for stop in (3, 5):
        resumed = fit(tmp_path / f"step={stop}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
