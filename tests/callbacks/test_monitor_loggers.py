"""Whom the monitor tells, how often, and what it costs between two logs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.overrides import TorchFunctionMode

from lightning_step import SRSTE, STEP, AutoSwitch, SparsityMonitor, STEPSparsityCallback
from lightning_step.errors import ArgumentTypeError, ConfigurationError

SWITCHING = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=9), lam=1e-3)
STEPS = 20


# Loggers ----------------------------------------------------------------------------------------------------------------


class Keeps(Logger):
    """The least that Lightning asks of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, dict[str, float]] = {}

    name, version = "keeps", 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if "sparsity/phase" in metrics:
            assert step not in self.kept
            self.kept[step] = dict(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nobody asked for hyperparameters")


def test_any_logger_gets_the_scalars_and_what_it_cannot_show_is_left_out(
    tiny: Any, make_trainer: Any, board: Any, read: Any, tmp_path: Path
) -> None:
    results = []
    for loggers in ([own := Keeps()], [CSVLogger(tmp_path, "csv"), own2 := Keeps()], [board, own3 := Keeps()]):
        make_trainer(STEPSparsityCallback(recipe=SWITCHING), logger=loggers, log_every_n_steps=4).fit(tiny())
        results.append(loggers[-1].kept)
    assert own.kept and own2.kept and own3.kept  # noqa: PT018
    assert results[0] == results[1] == results[2]
    assert sorted(results[0]) == [4, 8, 9, 12, 16, 20]
    assert {type(value) for values in results[0].values() for value in values.values()} == {float}


def test_without_a_logger_nothing_is_measured(tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback(recipe=SRSTE())
    make_trainer(callback, SparsityMonitor(every=2), logger=False).fit(tiny())
    assert callback.sparsifiers[0].measure_every == 0
    assert "monitor" not in callback.state_dict()


# How often, and not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "monitor", "expected"),
    [
        (True, [], [5, 9, 10, 15, 18]),
        (7, [], [7, 9, 14, 18]),
        (True, [SparsityMonitor(every=7)], [7, 9, 14, 18]),
        (4, [SparsityMonitor(every=7)], [7, 9, 14, 18]),
        (8, [SparsityMonitor(per_layer=True)], [8, 9, 16, 18]),
        (True, [SparsityMonitor(every=0)], []),
        (0, [SparsityMonitor(every=7)], []),
    ],
)
def test_how_often_is_said_by_the_trainer_or_by_the_monitor(
    argument: Any, monitor: list[Any], expected: list[int], tiny: Any, make_trainer: Any
) -> None:
    logger = Keeps()
    callbacks = [*monitor, STEPSparsityCallback(recipe=SWITCHING, monitor=argument)]
    make_trainer(*callbacks, logger=logger, log_every_n_steps=5, steps=18).fit(tiny())
    assert sorted(logger.kept) == expected
    flips = [step for step, values in logger.kept.items() if "flip_rate" in "".join(values)]
    assert flips == [step for step in expected if step > 9]


def test_monitor_false_turns_everything_off(tiny: Any, make_trainer: Any, board: Any, read: Any) -> None:
    callback = STEPSparsityCallback(recipe=SWITCHING, monitor=False)
    make_trainer(callback, SparsityMonitor(every=1), logger=board).fit(tiny())
    assert not [tag for tags in read(board).Tags().values() if isinstance(tags, list) for tag in tags if "sparsity" in tag]
    assert callback.sparsifiers[0].measure_every == 0


def test_every_special_can_be_turned_off(tiny: Any, make_trainer: Any, board: Any, read: Any) -> None:
    monitor = SparsityMonitor(histograms_every=0, text=False, layout=False, figure=False, hparams=False)
    make_trainer(STEPSparsityCallback(recipe=SWITCHING), monitor, logger=board).fit(tiny())
    tags = read(board).Tags()
    assert [tags[kind] for kind in ("histograms", "images", "tensors")] == [[], [], []]
    assert "sparsity/v_l1" in tags["scalars"]


def test_two_monitors_or_one_with_nothing_to_see_are_refused(tiny: Any, make_trainer: Any) -> None:
    with pytest.raises(ConfigurationError, match="one SparsityMonitor per Trainer, but got several"):
        make_trainer(STEPSparsityCallback(), SparsityMonitor(), type("Mine", (SparsityMonitor,), {})()).fit(tiny())
    with pytest.raises(ConfigurationError, match=r"Expected a STEPSparsityCallback beside .* but got \['SparsityMonitor'"):
        make_trainer(SparsityMonitor()).fit(tiny())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"every": 1.5}, ArgumentTypeError, "Expected `every` to be an integer .* but got 1.5"),
        ({"every": -1}, ConfigurationError, "Expected `every` >= 0 .* but got -1"),
        ({"histograms_every": True}, ArgumentTypeError, "Expected `histograms_every` to be an integer .* but got True"),
        ({"every": 4, "histograms_every": 6}, ConfigurationError, "a multiple of `every` .* but got 6 and 4"),
    ],
)
def test_intervals_that_are_none_are_refused_at_construction(arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        SparsityMonitor(**arguments)


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ConfigurationError), ("often", ArgumentTypeError), (0.5, ArgumentTypeError)]
)
def test_a_monitor_that_is_no_interval_is_refused_at_construction(value: Any, error: Any) -> None:
    with pytest.raises(error, match=f"^Expected `monitor` .*but got {value!r}"):
        STEPSparsityCallback(monitor=value)


SECTION = "sparsity: {recipe: {class_path: lightning_step.SRSTE}}"
LISTED = "trainer: {callbacks: [{class_path: lightning_step.SparsityMonitor, init_args: {every: 3, per_layer: true}}]}"


@pytest.mark.filterwarnings("ignore")  # Lightning's own: no workers, no validation loop
@pytest.mark.parametrize(
    ("files", "steps"),
    [([SECTION], [2, 4, 5]), ([SECTION, LISTED], [3, 5]), ([SECTION, "sparsity: {monitor: {every: 4}}"], [4, 5])],
    ids=["section", "section and monitor", "monitor in the section"],
)
def test_a_configuration_file_turns_it_on_and_thins_it_out(
    files: list[str], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_step.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model=lightning.pytorch.demos.boring_classes.BoringModel", "--optimizer=AdamW"]
    arguments += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=out", "--trainer.enable_checkpointing=false"]
    arguments += ["--trainer.max_steps=5", "--trainer.log_every_n_steps=2", "--trainer.accelerator=cpu"]
    arguments += [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.limit_val_batches=0",
    ]
    for i, text in enumerate(files):
        (tmp_path / f"{i}.yaml").write_text(text)
        arguments.append(f"--config={i}.yaml")
    assert main(arguments) == 0
    with next((tmp_path / "out").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity/phase"]]
    assert [int(row["step"]) for row in rows] == steps
    assert ("sparsity/layer/layer.weight/v_l1" in rows[0]) == (LISTED in files)


# No wait, no trace ------------------------------------------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """Notes every call of torch, and above all those that wait for the device."""

    WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.now: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.now.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Notes(pl.Callback):
    def __init__(self, mode: Calls) -> None:
        self.mode, self.per_step = mode, {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode.now = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.per_step[trainer.global_step] = list(self.mode.now)


def test_between_two_logs_nothing_is_computed_and_nobody_waits(tiny: Any, make_trainer: Any, board: Any, read: Any) -> None:
    noted = []
    for monitor in (True, False):
        with Calls() as mode:
            notes = Notes(mode)
            callback = STEPSparsityCallback(recipe=SWITCHING, read_every=3, monitor=monitor)
            # One batch an epoch: what Lightning logs itself would depend on the logger.
            make_trainer(callback, notes, logger=board, log_every_n_steps=5).fit(tiny())
        noted.append(notes.per_step)
    logged = {5, 9, 10, 15, 20}
    for t in range(2, STEPS + 1):
        assert (noted[0][t] == noted[1][t]) == (t not in logged), t
    for t in (12, 13, 14, 16):
        assert not set(noted[0][t]) & {"tolist", "cpu", "numpy"}, t
    transfers = [call for call in noted[0][15] if call in ("tolist", "cpu")]
    assert transfers.count("cpu") <= 1
    assert len([call for call in transfers if call == "tolist"]) <= 8


# Resume -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [7, 9, 12])
def test_a_resumed_run_logs_what_the_undisturbed_one_logs_and_nothing_twice(
    stop: int, tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    def fit(steps: int, logger: Any, path: Any = None) -> STEPSparsityCallback:
        callback = STEPSparsityCallback(recipe=SWITCHING)
        trainer = make_trainer(callback, steps=steps, logger=logger, log_every_n_steps=3)
        trainer.fit(tiny(), ckpt_path=path, weights_only=None if path is None else True)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return callback

    whole, parts = Keeps(), Keeps()
    undisturbed = fit(STEPS - 2, whole)
    fit(stop, parts)
    resumed = fit(STEPS - 2, parts, tmp_path / "a.ckpt")
    extra = {stop} - set(whole.kept)  # the end of the first part
    assert {t: parts.kept[t] for t in sorted(parts.kept) if t not in extra} == whole.kept
    curves = [callback.state_dict()["monitor"][0]["variance_change"] for callback in (undisturbed, resumed)]
    assert [point for point in curves[1] if point[0] not in extra] == curves[0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_batch_of_a_step_that_was_logged_before_the_resume_is_not_logged_again(
    tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """The checkpoint is written between two optimizer steps, in the middle of an accumulation."""
    logger = Keeps()

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:  # two steps and one batch
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    loader = torch.utils.data.DataLoader(torch.zeros(12))
    for path, extra in ((None, [Stop()]), (tmp_path / "mid.ckpt", [])):
        logger.kept = {t: values for t, values in logger.kept.items() if t <= 2}
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), *extra, logger=logger, accumulate_grad_batches=3, steps=4).fit(
            tiny(), loader, ckpt_path=path, weights_only=None if path is None else True
        )
    assert sorted(logger.kept) == [1, 2, 3, 4]


# Several optimizers -----------------------------------------------------------------------------------------------------


def two(width: int = 8) -> pl.LightningModule:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = torch.nn.Linear(8, width), torch.nn.Linear(width, 8)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.b(self.a(torch.randn(4, 8))).square().mean()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=0.25)], []

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.zeros(6))

    return Two()


def test_several_optimizers_have_each_their_own_tags(make_trainer: Any, board: Any, read: Any) -> None:
    keeps = Keeps()
    keeps.log_metrics = lambda metrics, step=None: keeps.kept.setdefault(step, {}).update(metrics)  # type: ignore
    module = two()
    callback = STEPSparsityCallback(recipe=SRSTE())
    make_trainer(callback, logger=[board, keeps], steps=-1, max_epochs=1, log_every_n_steps=2).fit(module)
    assert sorted(keeps.kept) == [2, 4, 6]
    last = {tag: value for tag, value in keeps.kept[6].items() if tag.startswith("sparsity/")}
    assert last["sparsity/0/lr"] == 1e-3
    assert last["sparsity/1/lr"] == 0.25
    v = callback.sparsifiers[0].optimizer.state[dict(module.named_parameters())["a.weight"]]["exp_avg_sq"]
    assert last["sparsity/0/v_l1"] == pytest.approx(float(v.double().sum()))
    assert "sparsity/1/v_l1" not in last, "SGD has no second moment"
    assert last["sparsity/1/density"] == 0.5
    histograms = set(read(board).Tags()["histograms"])
    assert histograms <= {f"sparsity/{k}/{name}" for k, name in [("0/v", "a.weight")]} | {
        f"sparsity/{i}/{kind}/{name}" for i, name in enumerate(["a.weight", "b.weight"]) for kind in ("kept", "pruned")
    }
