from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, Recipe, STEPSparsityCallback, nm_masks, strip
from lightning_step.functional import violation_update
from lightning_step.pattern import NMPattern

LATE = AtStep(1_000_000)


def masks_on(module: nn.Module) -> set[bool]:
    return {mask.enabled for mask in nm_masks(module).values()}


def optimizer_settings() -> list[Any]:
    settings: list[dict[str, Any]] = [
        {"optimizer": "Adam"},
        {"optimizer": "Adam", "weight_decay": 0.1, "foreach": True},
        {"optimizer": "AdamW", "foreach": False},
        {"optimizer": "AdamW", "foreach": True, "amsgrad": True},
        {"optimizer": "AdamW", "fused": True},
        {"optimizer": "AdamW", "maximize": True},
    ]
    return [pytest.param(s, id="-".join(str(v) for v in s.values())) for s in settings]


@pytest.mark.parametrize("settings", optimizer_settings())
@pytest.mark.parametrize("recipe", [Dense(), ASP(LATE), STEP(LATE), STEP(AutoSwitch(t_min=9, t_max=10_000))], ids=repr)
def test_phase_one_is_bit_identical_to_the_stock_optimizer(
    recipe: Recipe, settings: dict[str, Any], tiny: Any, make_trainer: Any
) -> None:
    plain, sparse = tiny(**settings), tiny(**settings)
    stock = make_trainer(gradient_clip_val=0.1)
    stock.fit(plain)
    ours = make_trainer(STEPSparsityCallback(recipe=recipe), gradient_clip_val=0.1)
    ours.fit(sparse)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, sparse.state_dict()[name]), name
    for mine, theirs in zip(ours.optimizers[0].state.values(), stock.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("recipe", [STEP(AtStep(5)), SRSTE(), STE(), ASP(AtStep(5))], ids=repr)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8)])
def test_after_fit_every_group_holds_the_pattern(recipe: Recipe, n: int, m: int, tiny: Any, make_trainer: Any) -> None:
    module = tiny()
    make_trainer(STEPSparsityCallback(n, m, recipe=recipe)).fit(module)
    seen = {name: module.get_submodule(name.rpartition(".")[0]).weight.detach().clone() for name in nm_masks(module)}
    assert sorted(strip(module)) == sorted(seen) == ["head.weight", "net.0.weight", "net.2.weight"]
    for name, masked in seen.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight, masked), "what the forward pass saw is what strip leaves"
        assert violation_update(weight, NMPattern(n, m), 1)[0] == 0
        assert weight.count_nonzero() == weight.numel() * n // m


def test_the_loss_goes_down_in_both_phases(tiny: Any, make_trainer: Any) -> None:
    losses = []
    for steps in (1, 60, 150):
        trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(60))), steps=steps, limit_val_batches=1)
        trainer.fit(tiny())
        losses.append(trainer.validate(trainer.lightning_module, verbose=False)[0]["val_loss"])
    assert losses[0] > 2 * losses[1] > 2 * losses[2]


def test_the_start_table_and_the_switch_are_shown(tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(STEPSparsityCallback(recipe=STEP(AutoSwitch(window=3, t_min=4, t_max=8)), exclude=["head"])).fit(tiny())
    text = caplog.text
    assert "N:M masks on 2 of 6 tensors: 256 of 298 weights (85.9 %), of which 128 are kept" in text
    assert "net.0.weight  Linear  (16, 8)  2:4  dim 1" in text
    assert "head.weight" in text
    assert "excluded by 'head'" in text
    assert "recipe: STEP(switch=AutoSwitch(" in text
    assert text.count("lightning-step, optimizer step 8: masks on, second moment frozen (2 tensors); t_max reached: ") == 1
    assert "against 1e-08 (T_w = 3, T_min = 4, T_max = 8)" in text


def test_a_window_that_cannot_fill_is_announced(tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(STEPSparsityCallback()).fit(tiny())
    assert "averages 1000 optimizer steps but may wait for 10 at most: T_max will decide" in caplog.text


def test_verbose_false_says_nothing(tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(STEPSparsityCallback(verbose=False, recipe=SRSTE())).fit(tiny())
    assert "N:M masks" not in caplog.text
    assert "masks on" not in caplog.text


def test_what_the_switch_sees_is_logged(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    recipe = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=10))
    make_trainer(STEPSparsityCallback(recipe=recipe, read_every=1), logger=loggers, log_every_n_steps=2).fit(tiny())
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    by_step = {int(row["step"]): row for row in table}
    assert sorted(by_step) == list(range(2, 21, 2))
    assert all(float(by_step[t]["sparsity/phase"]) == (1 if t < 10 else 2) for t in by_step)
    assert all(float(by_step[t]["sparsity/variance_change"]) > 0 for t in (2, 4, 6, 8))
    assert all(float(by_step[t]["sparsity/threshold"]) == 1e-30 for t in (2, 4, 6, 8))
    assert by_step[2]["sparsity/window_mean"] == "", "no window mean before the window is full"
    assert all(float(by_step[t]["sparsity/window_mean"]) > 0 for t in (4, 6, 8))
    assert float(by_step[10]["sparsity/window_mean"]) > 0, "what the switch fired on"
    assert by_step[12]["sparsity/variance_change"] == "", "v is frozen: nothing moves"
    assert all(0 <= float(by_step[t]["sparsity/flip_rate"]) < 1 for t in (12, 14, 16, 18, 20))
    assert list((tmp_path / "tb" / "version_0").glob("events.out.tfevents*"))


def test_the_switch_is_logged_even_between_two_logs(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    recipe = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=7))
    logger = CSVLogger(tmp_path, name="csv")
    make_trainer(STEPSparsityCallback(recipe=recipe), logger=logger, log_every_n_steps=10).fit(tiny())
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows[1:]] == [7, 10, 20]


def test_accumulated_batches_count_as_one_step(tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback(recipe=STEP(AtStep(3)))
    make_trainer(callback, steps=6, accumulate_grad_batches=2, limit_train_batches=1).fit(tiny())
    assert callback.sparsifiers[0].t == 6
    assert callback.sparsifiers[0].events[0].step == 3


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_of_a_checkpoint_sees_the_phase_it_was_written_in(
    verb: str, tiny: Any, make_trainer: Any, tmp_path: Any
) -> None:
    recipe, path = STEP(AtStep(3)), str(tmp_path / "last.ckpt")
    trainer = make_trainer(STEPSparsityCallback(recipe=recipe), limit_val_batches=1)
    trainer.fit(tiny())
    trainer.save_checkpoint(path)
    fresh = tiny()
    again = make_trainer(STEPSparsityCallback(recipe=recipe), limit_val_batches=1)
    getattr(again, verb)(fresh, ckpt_path=path)
    assert masks_on(fresh) == {True}
    assert torch.equal(fresh.net[0].weight, trainer.lightning_module.net[0].weight)


def test_evaluation_without_a_checkpoint_is_dense(tiny: Any, make_trainer: Any) -> None:
    module = tiny()
    make_trainer(STEPSparsityCallback(), limit_val_batches=1).validate(module, verbose=False)
    assert masks_on(module) == {False}


def test_a_second_fit_goes_on_in_its_phase(tiny: Any, make_trainer: Any) -> None:
    module, callback = tiny(), STEPSparsityCallback(recipe=STEP(AtStep(3)))
    trainer = make_trainer(callback, steps=5)
    trainer.fit(module)
    trainer.fit_loop.epoch_loop.max_steps = 9
    with pytest.warns(UserWarning, match="fitted before.*frozen second moment is gone"):
        trainer.fit(module)
    assert masks_on(module) == {True}
    assert callback.sparsifiers[0].t == 9
    assert callback.sparsifiers[0].frozen == []


def test_hooks_are_taken_off_when_fitting_ends(tiny: Any, make_trainer: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback())
    trainer.fit(tiny())
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class BuildsLate(pl.LightningModule):
    """Its layers come in configure_model."""

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            torch.manual_seed(3)
            self.layer = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(2, 8)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1))


def test_layers_made_in_configure_model_are_masked(make_trainer: Any) -> None:
    module = BuildsLate()
    make_trainer(STEPSparsityCallback(recipe=SRSTE())).fit(module)
    assert masks_on(module) == {True}


def test_two_optimizers_have_each_its_own_phase(make_trainer: Any) -> None:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.b(self.a(torch.ones(2, 8))).square().mean()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.a.parameters()), torch.optim.Adam(self.b.parameters())], []

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.zeros(1))

    callback = STEPSparsityCallback(recipe=STEP(AtStep(2)))
    module = Two()
    make_trainer(callback, steps=8).fit(module)
    assert [[e.step for e in s.events] for s in callback.sparsifiers] == [[2], [2]]
    assert [s.frozen for s in callback.sparsifiers] == [["a.weight"], ["b.weight"]]
