"""What single hooks of the callbacks are there for, each seen from outside."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_step import SRSTE, STEP, AtStep, STEPSparsityCallback
from lightning_step.errors import ResumeError, TargetError


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_glob_that_matches_nothing_is_found_in_every_stage(verb: str, tiny: Any, make_trainer: Any) -> None:
    with pytest.raises(TargetError, match="every glob of `exclude` to match"):
        getattr(make_trainer(STEPSparsityCallback(exclude=["nett"]), limit_val_batches=1), verb)(tiny())


def test_masks_from_the_first_step_are_announced_once_below_the_table(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(STEPSparsityCallback(recipe=SRSTE())).fit(tiny())
    said = [
        record.getMessage() for record in caplog.records if "N:M masks" in record.getMessage() or "masks on" in record.msg
    ]
    heads = [line.splitlines()[0].split(" on")[0] for line in said]
    assert heads == ["N:M masks", "lightning-step, optimizer step 0: masks", "20 optimizer steps, masks"], "and at the end"


class Counts(pl.Callback):
    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def test_a_lost_preconditioner_is_found_before_the_first_batch(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3))))
    trainer.fit(tiny())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["optimizer_states"][0]["state"] = {}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    counts = Counts()
    with pytest.raises(ResumeError, match="preconditioner"):
        make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3))), counts, steps=30).fit(
            tiny(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    assert counts.batches == 0


def test_a_switch_before_the_first_step_is_no_reason_to_log(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), logger=logger, log_every_n_steps=10).fit(tiny())
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows[1:]] == [10, 20]


def test_batches_within_one_step_are_logged_once(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    module = tiny()
    loader = torch.utils.data.DataLoader(torch.zeros(6))
    trainer = make_trainer(
        STEPSparsityCallback(recipe=SRSTE()), logger=TensorBoardLogger(tmp_path, "tb"), accumulate_grad_batches=3, steps=4
    )
    trainer.fit(module, loader)
    board = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    assert [event.step for event in board.Scalars("sparsity/phase")] == [1, 2, 3, 4]


def test_a_checkpoint_with_more_optimizers_than_the_module_is_refused(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=SRSTE()))
    trainer.fit(tiny())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"]["STEPSparsityCallback"]["optimizers"] *= 2
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ResumeError, match=r"Expected 2 optimizers with masked tensors, as in the checkpoint, but got 1"):
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), steps=30).fit(
            tiny(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
