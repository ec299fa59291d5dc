from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import IterableDataset

from lightning_step.callbacks.trainer import builds_late, callbacks_of, log_interval, total_steps


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
