"""A collection as an attribute of a LightningModule, logged as any other metric."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torchmetrics import MetricCollection

from lightning_step import STEP, AtStep, STEPSparsityCallback
from lightning_step.metrics import Density, FlipRate, KeptMagnitude, NMCompliance, metric_inputs


class Model(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection([Density(), NMCompliance(), FlipRate(), KeptMagnitude()], prefix="sparse/")
        self.masks: dict[str, torch.Tensor] = {}
        self.logged: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def on_train_epoch_start(self) -> None:
        self.masks = {name: inputs["mask"] for name, inputs in metric_inputs(self)}
        if "sparse/Density" in self.trainer.callback_metrics:
            self.keep()

    def on_train_epoch_end(self) -> None:
        for name, inputs in metric_inputs(self):
            self.metrics.update(**inputs, before=self.masks[name])
        self.log_dict(self.metrics)

    def on_train_end(self) -> None:
        self.keep()

    def keep(self) -> None:
        values = self.trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in values if name.startswith("sparse/")})


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_values_are_those_of_each_epoch_in_every_precision(precision: Any, tmp_path: Any) -> None:
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[STEPSparsityCallback(recipe=STEP(AtStep(3)), verbose=False)],
    )
    trainer.fit(model)
    assert [values["sparse/Density"] for values in model.logged] == [1, 0.5, 0.5]
    assert [values["sparse/NMCompliance"] for values in model.logged] == [0, 1, 1]
    assert all(0.5 < values["sparse/KeptMagnitude"] < 1 for values in model.logged)
    assert all(0 <= values["sparse/FlipRate"] < 0.5 for values in model.logged)
    assert model.logged[0]["sparse/FlipRate"] > 0
    assert not any("metrics" in key for key in model.state_dict()), "nothing of it in a checkpoint"
