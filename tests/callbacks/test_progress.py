"""What progress bars show of phase and window mean, and where else it must not turn up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, Recipe, SparsityMonitor, STEPSparsityCallback
from lightning_step.callbacks.progress import Progress

SWITCH = AutoSwitch(window=3, threshold=1e-30, t_min=4, t_max=11)
QUIET: dict[str, Any] = {"enable_progress_bar": True, "max_epochs": 1}


class CustomBar(ProgressBar):
    """The least that a bar has to be."""

    def disable(self) -> None: ...

    def enable(self) -> None: ...


def recording(base: type[ProgressBar]) -> Any:
    """A bar that remembers what it showed after every batch."""

    class Recording(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[dict[str, Any]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            self.seen.append(self.get_metrics(trainer, pl_module))

    return Recording()


class ManyBatches:
    """Makes the tiny module's epoch as long as the run."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(20))  # type: ignore[arg-type]


def module(tiny: Any, **methods: Any) -> pl.LightningModule:
    made: pl.LightningModule = tiny()
    made.__class__ = type("Tiny", (ManyBatches, type(made)), methods)
    return made


@pytest.mark.parametrize("base", [TQDMProgressBar, RichProgressBar, CustomBar], ids=lambda base: base.__name__)
def test_every_bar_shows_phase_and_ratio_at_reading_steps(base: Any, tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    if base is RichProgressBar:
        pytest.importorskip("rich")
    bar, logger = recording(base), CSVLogger(tmp_path)
    callback = STEPSparsityCallback(recipe=STEP(SWITCH), read_every=2)
    make_trainer(callback, bar, logger=logger, **QUIET).fit(module(tiny))
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    mean = {int(row["step"]): row["sparsity/window_mean"] for row in table}
    ratio = {step: float(value) / 1e-30 for step, value in mean.items() if value}
    phases = [shown["phase"] for shown in bar.seen]
    assert phases == [1] * 10 + [2] * 10
    assert sorted(ratio) == list(range(3, 12)), "the window is full from step 3 on, and v frozen after step 11"
    for step, shown in enumerate(bar.seen, start=1):
        # Shown is what was read last; the switch at step 11 shows what it fired on.
        read = step if step == 11 else step - step % 2
        assert ("ratio" in shown) == (4 <= step <= 11), step
        assert step > 11 or step < 4 or shown["ratio"] == pytest.approx(ratio[read], rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "phases", "ratio"),
    [
        (Dense(), [1] * 20, []),
        (ASP(AtStep(5)), [1] * 4 + [2] * 16, []),
        (STE(), [2] * 20, []),
        (SRSTE(), [2] * 20, []),
        (STEP(AtStep(5)), [1] * 4 + [2] * 16, []),
        (STEP(SWITCH, masks_from=AtStep(0)), [2] * 20, list(range(3, 12))),
    ],
    ids=["Dense", "ASP", "STE", "SRSTE", "STEP at a step", "STEP, masks from the start"],
)
def test_every_recipe_shows_its_phase(
    recipe: Recipe, phases: list[int], ratio: list[int], tiny: Any, make_trainer: Any
) -> None:
    bar = recording(CustomBar)
    make_trainer(STEPSparsityCallback(recipe=recipe, read_every=1), bar, **QUIET).fit(module(tiny))
    assert [shown["phase"] for shown in bar.seen] == phases
    assert [step for step, shown in enumerate(bar.seen, start=1) if "ratio" in shown] == ratio


def test_it_is_no_metric_of_the_model(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    logger, keeper = CSVLogger(tmp_path), ModelCheckpoint(tmp_path, save_last=True)
    callback = STEPSparsityCallback(recipe=STEP(SWITCH), read_every=1)
    bar = recording(CustomBar)
    trainer = make_trainer(callback, SparsityMonitor(every=0), bar, keeper, logger=logger, **QUIET)
    trainer.fit(module(tiny, training_step=logs_its_loss))
    assert set(bar.seen[-1]) == {"v_num", "loss", "phase"}
    assert set(trainer.callback_metrics) == {"loss"}
    assert set(trainer.logged_metrics) == {"loss"}
    assert Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0] == "epoch,loss,step"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "phase" not in str(saved["callbacks"]["ModelCheckpoint" + str(keeper.state_key)[len("ModelCheckpoint") :]])


def logs_its_loss(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    x, y = self.batch(self.global_step)
    loss = torch.nn.functional.mse_loss(self(x), y)
    self.log("loss", loss, prog_bar=True)
    return loss


def test_without_a_bar_nothing_is_shown_and_nothing_is_missing(tiny: Any, make_trainer: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3))))
    trainer.fit(tiny())
    assert trainer.progress_bar_metrics == {}


def logs_a_phase_of_its_own(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    self.log("phase", 7.0 + self.global_step, prog_bar=True, on_step=self.often, on_epoch=not self.often)
    return logs_its_loss(self, batch, batch_idx)


@pytest.mark.parametrize("often", [True, False], ids=["every step", "every epoch"])
def test_a_metric_of_the_models_own_by_that_name_is_left_alone(often: bool, tiny: Any, make_trainer: Any) -> None:
    bar, made = recording(CustomBar), tiny()
    made.__class__ = type("Tiny", (type(made),), {"training_step": logs_a_phase_of_its_own, "often": often})
    callback = STEPSparsityCallback(recipe=STEP(SWITCH), read_every=1)
    make_trainer(callback, bar, enable_progress_bar=True).fit(made)  # one step an epoch
    own = [7.0 + step for step in range(20)] if often else [1.0, *(7.0 + step for step in range(19))]
    assert [shown["phase"] for shown in bar.seen] == own
    assert "ratio" in bar.seen[9]


def test_a_resumed_run_shows_phase_and_ratio_from_its_first_batch(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    def fit(steps: int, path: str | None = None) -> tuple[Any, pl.Trainer]:
        bar = recording(CustomBar)
        callback = STEPSparsityCallback(recipe=STEP(SWITCH), read_every=5)
        trainer = make_trainer(callback, bar, steps=steps, enable_progress_bar=True)
        trainer.fit(tiny(), ckpt_path=path)
        return bar, trainer

    undisturbed, _ = fit(20)
    for crash in (8, 15):
        path = str(tmp_path / f"{crash}.ckpt")
        fit(crash)[1].save_checkpoint(path)
        resumed, _ = fit(20, path)
        assert resumed.seen[0]["phase"] == (1 if crash < 11 else 2)
        assert ("ratio" in resumed.seen[0]) == (crash < 11)
        assert [shown["phase"] for shown in resumed.seen] == [shown["phase"] for shown in undisturbed.seen[crash:]]
        assert resumed.seen[2] == undisturbed.seen[crash + 2], "the same from the next reading on"


def test_evaluation_shows_nothing_that_is_over(tiny: Any, make_trainer: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback(recipe=STEP(AtStep(3))), recording(CustomBar), limit_val_batches=1, **QUIET)
    trainer.fit(module(tiny))
    assert trainer.progress_bar_metrics["phase"] == 2
    for verb in ("validate", "test", "predict"):
        getattr(trainer, verb)(trainer.lightning_module, **({} if verb == "predict" else {"verbose": False}))
        assert "phase" not in trainer.progress_bar_metrics


def test_validation_inside_of_a_fit_leaves_it_standing(tiny: Any, make_trainer: Any) -> None:
    bar = recording(CustomBar)
    callback = STEPSparsityCallback(recipe=STEP(AtStep(3)), read_every=100)
    settings = {**QUIET, "limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 1}
    make_trainer(callback, bar, **settings).fit(module(tiny))
    assert [shown["phase"] for shown in bar.seen] == [1, 1] + [2] * 18


class TwoOptimizers(ManyBatches):
    automatic_optimization = False

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        x, y = self.batch(batch_idx)
        loss = torch.nn.functional.mse_loss(self(x), y)
        self.manual_backward(loss)
        for i, optimizer in enumerate(self.optimizers()):
            if i == 0 or batch_idx % 2:
                optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.net, self.head)]


def test_several_optimizers_are_told_apart(tiny: Any, make_trainer: Any) -> None:
    bar, made = recording(CustomBar), tiny()
    made.__class__ = type("Two", (TwoOptimizers, type(made)), {})
    callback = STEPSparsityCallback(recipe=STEP(AutoSwitch(window=3, threshold=1e-30, t_min=4, t_max=6)), read_every=1)
    make_trainer(callback, bar, **{**QUIET, "max_steps": -1}).fit(made)
    assert [shown["phase/0"] for shown in bar.seen] == [1] * 5 + [2] * 15
    assert [shown["phase/1"] for shown in bar.seen] == [1] * 11 + [2] * 9
    assert [i for i, shown in enumerate(bar.seen, start=1) if "ratio/0" in shown] == [3, 4, 5, 6]
    assert [i for i, shown in enumerate(bar.seen, start=1) if "ratio/1" in shown] == list(range(6, 14))


class Transfers(TorchDispatchMode):
    """Counts what would wait for a device: numbers that are asked for, and tensors that are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_touched_for_it(tiny: Any, make_trainer: Any) -> None:
    counted: list[int] = []

    class Counting(Progress):
        def update(self, trainer: pl.Trainer) -> None:
            with Transfers() as transfers:
                super().update(trainer)
            counted.append(transfers.calls)

    class Callback(STEPSparsityCallback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            self._console._progress.__class__ = Counting

    make_trainer(Callback(recipe=STEP(SWITCH), read_every=2), recording(CustomBar), **QUIET).fit(module(tiny))
    assert counted == [0] * 20
    with Transfers() as transfers:
        torch.ones(1).item()
    assert transfers.calls > 0, "the counter counts"


def test_numbers_look_like_numbers_on_every_bar(tiny: Any, make_trainer: Any) -> None:
    bar = recording(CustomBar)
    make_trainer(STEPSparsityCallback(recipe=STEP(SWITCH), read_every=1), bar, **QUIET).fit(module(tiny))
    phase, ratio = bar.seen[5]["phase"], bar.seen[5]["ratio"]
    assert (isinstance(phase, int), isinstance(ratio, float)) == (True, True)
    assert (f"{phase}", f"{phase:.3f}", str(phase), f"{phase + 1:.1f}") == ("1", "1", "1", "2.0")
    assert f"{ratio:.3f}" == str(ratio) == f"{float(ratio):.3g}"
