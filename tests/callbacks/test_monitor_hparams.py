"""TensorBoard's page of hyperparameters, as its own server reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_step import SRSTE, STEP, AutoSwitch, SparsityMonitor, STEPSparsityCallback

SWITCHING = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=9), lam=1e-3)


def sessions(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, float], list[str]]]:
    """What TensorBoard's own server shows on its page of hyperparameters: values, metrics, and columns."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3], include_metrics=True
    )
    experiment = get_experiment.Handler(context.RequestContext(), backend, "", api_pb2.GetExperimentRequest()).run()
    columns = [info.name.tag for info in experiment.metric_infos]
    shown = {info.name for info in experiment.hparam_infos}
    for group in list_session_groups.Handler(context.RequestContext(), backend, "", request).run().session_groups:
        assert len(group.sessions) == 1
        values = {k: getattr(v, str(v.WhichOneof("kind"))) for k, v in group.hparams.items() if k in shown}
        yield values, {metric.name.tag: metric.value for metric in group.metric_values}, columns


@pytest.mark.parametrize("default_metric", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_the_page_of_hyperparameters_has_ours_and_theirs_once_and_the_final_metrics(
    saved: bool, default_metric: bool, make_trainer: Any, tiny: Any, read: Any, tmp_path: Path
) -> None:
    module = tiny()
    if saved:
        module.save_hyperparameters({"width": 8, "optimizer": {"name": "AdamW", "betas": [0.9, 0.99]}, "tied": False})
    logger = TensorBoardLogger(tmp_path, name="tb", default_hp_metric=default_metric)
    monitor = SparsityMonitor(figure=False)
    stop = pl.callbacks.EarlyStopping("val_loss", patience=99, check_on_train_epoch_end=True)
    trainer = make_trainer(STEPSparsityCallback(recipe=SWITCHING), monitor, stop, logger=logger, limit_val_batches=1)
    trainer.fit(module)
    ((values, metrics, columns),) = sessions(tmp_path / "tb")
    ours = {key: value for key, value in values.items() if key.startswith("sparsity/")}
    assert ours["sparsity/pattern"] == "2:4"
    assert ours["sparsity/recipe"] == "STEP"
    assert ours["sparsity/recipe/lam"] == 1e-3
    assert ours["sparsity/recipe/switch/t_max"] == 9
    theirs = {key: value for key, value in values.items() if key not in ours}
    expected = {"width": 8, "optimizer/name": "AdamW", "optimizer/betas": "[0.9, 0.99]", "tied": False}
    assert theirs == (expected if saved else {})
    finals = {
        name: read(logger).Scalars(f"sparsity/{name}")[-1].value
        for name in ("flip_rate", "kept_magnitude", "density", "ratio")
    }
    assert {name: metrics[f"sparsity/{name}"] for name in finals} == finals
    assert metrics["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert ("hp_metric" in columns) == (saved and default_metric)
    assert logger.hparams == (dict(module.hparams) if saved else {}), "what Lightning saves beside it is theirs alone"


def test_further_metrics_can_be_named(make_trainer: Any, tiny: Any, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="tb")
    make_trainer(
        STEPSparsityCallback(recipe=SRSTE()), SparsityMonitor(metrics=["val_loss"]), logger=logger, limit_val_batches=1
    ).fit(tiny())
    ((_, metrics, _),) = sessions(tmp_path / "tb")
    assert metrics["val_loss"] > 0
