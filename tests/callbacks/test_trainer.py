from __future__ import annotations

import csv
import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import IterableDataset

from lightning_step import STEP, AtStep, STEPSparsityCallback
from lightning_step.callbacks.trainer import builds_late, callbacks_of, log_interval, total_steps
from lightning_step.errors import ArgumentTypeError, ConfigurationError, OptimizerError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 7}, 7),
        ({"steps": -1}, None),
        ({"steps": -1, "max_epochs": 3, "limit_train_batches": 1}, 3),
        ({"steps": 2, "max_epochs": 3}, 2),
    ],
)
def test_total_steps(arguments: dict[str, Any], expected: int | None, tiny: Any, make_trainer: Any) -> None:
    class Asks(pl.Callback):
        answer: Any = "not asked"

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.answer = total_steps(trainer)
            trainer.should_stop = True

    asks = Asks()
    make_trainer(asks, **arguments, max_time={"seconds": 2}).fit(tiny())
    assert asks.answer == expected


def test_total_steps_of_an_iterable_data_set_without_end_is_unknown(tiny: Any, make_trainer: Any) -> None:
    class Endless(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(1)

    class Asks(pl.Callback):
        answer: Any = "not asked"

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.answer = total_steps(trainer)
            trainer.limit_train_batches = 1

    asks = Asks()
    trainer = make_trainer(asks, steps=-1, max_epochs=1, max_time={"seconds": 1})
    trainer.fit(tiny(), torch.utils.data.DataLoader(Endless()))
    assert asks.answer is None


def test_log_interval_is_zero_without_a_logger(make_trainer: Any, tmp_path: Any) -> None:
    assert log_interval(make_trainer(log_every_n_steps=5)) == 0
    assert log_interval(make_trainer(log_every_n_steps=5, logger=pl.loggers.CSVLogger(tmp_path))) == 5


def test_callbacks_of_lists_them_in_order(make_trainer: Any) -> None:
    first, second = pl.Callback(), pl.Callback()
    assert [callback for callback in callbacks_of(make_trainer(first, second)) if callback in (first, second)] == [
        first,
        second,
    ]


def test_builds_late_sees_configure_model_and_setup(tiny: Any) -> None:
    class Configures(pl.LightningModule):
        def configure_model(self) -> None: ...

    class SetsUp(pl.LightningModule):
        def setup(self, stage: str) -> None: ...

    assert builds_late(Configures())
    assert builds_late(SetsUp())
    assert not builds_late(tiny())


class ManyByHand(pl.LightningModule):
    """Some optimizers under manual optimization, each of which steps once every so many batches."""

    def __init__(self, every: list[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in every)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for i, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            optimizer.zero_grad()
            self.manual_backward(self.layers[i](torch.ones(2, 8)).square().mean())
            if batch_idx % self.every[i] == 0:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters()) for layer in self.layers], []

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(12))


@pytest.mark.parametrize(
    ("every", "arguments", "given", "expected"),
    [
        ([1], {"steps": 7}, None, [7]),
        ([1], {"steps": 7, "max_epochs": 1}, None, [None]),  # nobody knows which ends the run
        ([1], {"steps": -1, "max_epochs": 1}, None, [None]),
        ([1, 1], {"steps": 7}, None, [None, None]),
        ([1, 3], {"steps": -1, "max_epochs": 1}, [12, 4], [12, 4]),
        ([1, 1], {"steps": -1, "max_epochs": 1}, 12, [12, 12]),
    ],
)
def test_total_steps_of_each_optimizer_under_manual_optimization(
    every: list[int], arguments: dict[str, Any], given: Any, expected: list[Any], make_trainer: Any
) -> None:
    class Asks(pl.Callback):
        answer: Any = "not asked"

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.answer = [total_steps(trainer, i, given) for i in range(len(every))]

    asks = Asks()
    make_trainer(asks, **arguments).fit(ManyByHand(every))
    assert asks.answer == expected


def test_fractions_are_of_the_steps_of_each_optimizer(make_trainer: Any) -> None:
    callback = STEPSparsityCallback(recipe=STEP(AtStep(0.5)), total_steps=[12, 4])
    trainer = make_trainer(callback, steps=-1, max_epochs=1)
    trainer.fit(ManyByHand([1, 3]))
    assert trainer.global_step == 16, "Lightning adds them up"
    assert [(s.t, [e.step for e in s.events]) for s in callback.sparsifiers] == [(12, [6]), (4, [2])]


def test_given_steps_come_before_what_the_trainer_expects(tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback(recipe=STEP(AtStep(0.5)), total_steps=8)
    make_trainer(callback, steps=20).fit(tiny())
    assert [event.step for event in callback.sparsifiers[0].events] == [4]


def test_a_fraction_of_unknown_steps_is_refused_and_whole_steps_are_not(make_trainer: Any) -> None:
    message = r"because step=0\.5 is a fraction of it, but got .*manual optimization.* pass `total_steps`.*whole number"
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(0.5))), steps=8).fit(ManyByHand([1, 1]))
    callback = STEPSparsityCallback(recipe=STEP(AtStep(2)))
    make_trainer(callback, steps=8).fit(ManyByHand([1, 1]))
    assert [event.step for s in callback.sparsifiers for event in s.events] == [2, 2]


@pytest.mark.parametrize("given", [[12], [12, 4, 4]])
def test_total_steps_of_another_number_of_optimizers_are_refused(given: list[int], make_trainer: Any) -> None:
    callback = STEPSparsityCallback(total_steps=given)
    with pytest.raises(
        ConfigurationError, match=rf"one entry for each of the 2 optimizers .* but got {re.escape(str(given))}"
    ):
        make_trainer(callback).fit(ManyByHand([1, 1]))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (0, ConfigurationError),
        ([5, -1], ConfigurationError),
        *((x, ArgumentTypeError) for x in (True, 1.5, "9", [2.0], [None])),
    ],
)
def test_total_steps_that_are_no_numbers_of_steps_are_refused_at_construction(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^Expected `total_steps` .*but got {re.escape(repr(given))}\.$"):
        STEPSparsityCallback(total_steps=given)


def test_an_optimizer_that_is_refused_leaves_no_hook_on_those_before_it(make_trainer: Any) -> None:
    class Mixed(ManyByHand):
        def configure_optimizers(self) -> Any:
            self.made = [torch.optim.AdamW(self.layers[0].parameters()), torch.optim.SGD(self.layers[1].parameters())]
            return self.made, []

    module = Mixed([1, 1])
    with pytest.raises(OptimizerError, match=r"torch\.optim\.sgd\.SGD"):
        make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(2)))).fit(module)
    assert not module.made[0]._optimizer_step_pre_hooks
    assert not module.made[0]._optimizer_step_post_hooks


def test_with_several_optimizers_a_batch_is_one_step_of_the_log(make_trainer: Any, tmp_path: Any) -> None:
    class Logs(ManyByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("theirs", float(batch_idx))

    recipe = STEP(AtStep(7))
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = STEPSparsityCallback(recipe=recipe)
    make_trainer(callback, steps=-1, max_epochs=1, logger=logger, log_every_n_steps=5).fit(Logs([1, 1, 1]))
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    ours = {int(row["step"]): row for row in rows if row["sparsity/0/phase"]}
    assert sorted(ours) == [5, 7, 10, 12], "every five batches, at the switch, and at the end"
    assert [ours[step]["sparsity/2/phase"] for step in sorted(ours)] == ["1.0", "2.0", "2.0", "2.0"]
    assert {float(row["theirs"]) for row in rows if row["theirs"]} == {4.0, 9.0}
