"""What masks do to Adam's second moment, measured: the figures of ``docs/how-step-works.md``.

``python examples/second_moment.py`` trains the character transformer three times, dense, under SR-STE and under STEP, and
watches the masked tensors. It takes about three minutes on one core. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from char_transformer import CharTransformer, TopicsDataModule
from demo import LAM, PLAIN, THRESHOLD, keep_quiet
from torch import Tensor
from typing_extensions import override

from lightning_step import SRSTE, STEP, AutoSwitch, Dense, Recipe, STEPSparsityCallback, __version__
from lightning_step.functional import magnitude_mask
from lightning_step.optim import adapter_for
from lightning_step.summary import format_table

RECIPES: dict[str, Recipe] = {
    "dense": Dense(),
    "SR-STE": SRSTE(lam=LAM),
    "STEP": STEP(AutoSwitch(threshold=THRESHOLD), lam=LAM),
}
COLOURS = {"dense": "#757575", "SR-STE": "#c62828", "STEP": "#1565c0"}


@dataclass
class Series:
    """What one run did, measured at some of its steps."""

    steps: list[int] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)  # sum of v over all masked tensors
    kept: list[float] = field(default_factory=list)  # mean size of a step in learning rates, over kept weights
    pruned: list[float] = field(default_factory=list)  # the same over the weights that the mask drops, or would drop
    switch: int | None = None


class Recorder(pl.Callback):
    """Reads v and the size of every coordinate's step, and changes nothing.

    Args:
        sparsity: The callback that knows which tensors hold masks.
        every: Measure every so many optimizer steps.
    """

    def __init__(self, sparsity: STEPSparsityCallback, every: int) -> None:
        self.sparsity, self.every = sparsity, every
        self.series = Series()
        self._before: dict[str, Tensor] = {}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called when gradients are there, right before the arithmetic. Keeps the weights."""
        if (trainer.global_step + 1) % self.every == 0:
            self._before = {name: p.detach().clone() for name, p in self._watched(pl_module).items()}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after the step. Compares, and reads v."""
        optimizer, [sparsifier] = trainer.optimizers[0], self.sparsity.sparsifiers
        self.series.switch = sparsifier.events[0].step if sparsifier.events else None
        if not self._before:
            return
        group, norm = optimizer.param_groups[0], 0.0
        moved: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in self._watched(pl_module).items():
            before = self._before[name]
            # Decoupled weight decay is no part of Adam's step: it is taken out again.
            step = (before * (1 - self.rate * group["weight_decay"]) - p.detach()).abs() / self.rate
            mask = magnitude_mask(before, self.sparsity.pattern, dim=1)
            moved[True].append(step[mask])
            moved[False].append(step[~mask])
            v = adapter_for(optimizer).second_moment(optimizer, p)
            assert v is not None  # a step has been taken
            norm += float(v.sum())
        self.series.steps.append(trainer.global_step)
        # Once frozen, the optimizer holds the preconditioner in its place: v is what it was at the switch.
        self.series.norm.append(self.series.norm[-1] if sparsifier.frozen and self.series.norm else norm)
        self.series.kept.append(float(torch.cat(moved[True]).mean()))
        self.series.pruned.append(float(torch.cat(moved[False]).mean()))
        self._before = {}

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before the batch. Keeps the rate, which the schedule moves on before the batch ends."""
        self.rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def _watched(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        assert self.sparsity.targets is not None  # set when fitting starts
        parameters = dict(pl_module.named_parameters())
        return {target.name: parameters[target.name] for target in self.sparsity.targets.masked}


def main() -> None:
    """Train, draw, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each of the three runs")
    parser.add_argument("--every", type=int, default=10, help="measure every so many of them")
    parser.add_argument("--out", type=Path, default=Path("out/second-moment"), help="folder for figures and numbers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_quiet()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    runs = {name: record(recipe, args) for name, recipe in RECIPES.items()}
    numbers = {name: vars(run) for name, run in runs.items()}
    (args.out / "second-moment.json").write_text(json.dumps({"made": made(args.seed), "runs": numbers}, indent=0) + "\n")
    draw_norm(runs, args.out / "v-norm.svg")
    draw_steps(runs, args.out / "step-size.svg")
    print("\n".join(format_table(summary(runs), right=[1, 2, 3, 4])))
    print(made(args.seed))


def summary(runs: Mapping[str, Series]) -> list[list[str]]:
    """What every run ends with; the means are over the last tenth of what was measured."""
    rows = [["", "switch", "sum of v", "step of kept", "step of pruned"]]
    for name, run in runs.items():
        last = max(1, len(run.steps) // 10)
        means = [sum(values[-last:]) / last for values in (run.norm, run.kept, run.pruned)]
        rows.append([name, "" if run.switch is None else str(run.switch), *(f"{mean:.3g}" for mean in means)])
    return rows


def made(seed: int) -> str:
    """By what, where and when."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, 1 thread"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}"
    return f"seed {seed}; {machine}; {versions}, lightning-step {__version__}; {date.today()}"


def record(recipe: Recipe, args: argparse.Namespace) -> Series:
    """Train one model under a recipe, and watch it."""
    pl.seed_everything(args.seed, verbose=False)
    data = TopicsDataModule(batches=min(args.steps, 100), seed=args.seed)
    sparsity = STEPSparsityCallback(n=2, m=4, recipe=recipe, verbose=False)
    recorder = Recorder(sparsity, args.every)
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=math.ceil(args.steps / data.batches),
        callbacks=[sparsity, recorder],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        **PLAIN,
    )
    trainer.fit(CharTransformer(), data)
    return recorder.series


def draw_norm(runs: dict[str, Series], path: Path) -> None:
    """The sum of v over the masked tensors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        axes.plot(run.steps, run.norm, color=COLOURS[name], linewidth=1.6, label=name)
    _finish(axes, runs["STEP"].switch, "sum of v over the masked tensors")
    axes.legend(frameon=False)
    _save(figure, path)


def draw_steps(runs: dict[str, Series], path: Path) -> None:
    """How far kept and pruned weights move in a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("kept", "pruned"), strict=True):
        for name, run in runs.items():
            axes.plot(run.steps, getattr(run, kind), color=COLOURS[name], linewidth=1.4, label=name)
        _finish(axes, runs["STEP"].switch, "mean step, in learning rates" if kind == "kept" else "")
        axes.set_title(f"{kind} weights")
    axes.legend(frameon=False)
    _save(figure, path)


def _finish(axes: Any, switch: int | None, label: str) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if switch is not None:
        axes.axvline(switch, color="#2e7d32", linewidth=1.0, linestyle="--")
        axes.annotate(
            f"STEP switches at {switch}",
            (switch, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color="#2e7d32",
            fontsize=8,
        )


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
