"""Where the time of a training step goes, in the demo and the four example tasks, and how much of it is ours.

``python examples/benchmarks/speed/profile_tasks.py`` takes some minutes on one thread of a CPU and writes ``results.json``
and ``results.md`` to ``--out``. Each task is trained by a real Trainer, dense and in phase II of the default recipe (masks
on, v frozen), on random batches of the shapes that its data have. Fits without a profiler take turns and give the times;
three more of each kind give the shares, by the Python functions that every operation was called from. The profiler makes
Python slower, so that its share is an upper bound. ``--only char,wikitext`` runs some tasks, ``--quick`` tries the command.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import chosen, parser_of, write
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from self_time import Times, least, page, profile_of, times_of
from side_by_side import Settings, facts
from startup_speed import elapsed, quiet
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from training_speed import recipe_of
from typing_extensions import override

from lightning_step import STEPSparsityCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from tasks import TASKS

WARM = 4  # steps before any that is counted; the first is of phase I
PROFILED = 2  # steps; more take the profiler minutes to sort out
KINDS = ("dense", "phase II")


def tokens(*shape: int, below: int = 4000) -> Tensor:
    """Random subwords or characters; the lowest are special ones."""
    return torch.randint(3, below, shape)


BATCHES: dict[str, Callable[[], Any]] = {
    "char": lambda: (tokens(16, 64, below=128), tokens(16, 64, below=128)),
    "cifar10": lambda: [torch.randn(64, 3, 32, 32), torch.randint(10, (64,))],
    "multi30k": lambda: {"source": tokens(32, 24), "target": tokens(32, 24)},
    "sst2": lambda: {
        "input_ids": tokens(32, 32),
        "attention_mask": torch.ones(32, 32, dtype=torch.long),
        "labels": torch.randint(2, (32,)),
    },
    "wikitext": lambda: tokens(16, 65),
}


class Clock(Callback):
    """Times steps, from the start of a batch to the start of the next; or profiles as many."""

    def __init__(self, steps: int, profiler: profile | None = None) -> None:
        self.steps, self.profiler = steps, profiler
        self._starts: list[float] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._starts.append(time.perf_counter())
        if self.profiler is not None and batch_idx == WARM:
            self.profiler.start()
        if self.profiler is not None and batch_idx == WARM + self.steps:
            self.profiler.stop()

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in zip(self._starts[WARM:], self._starts[WARM + 1 :], strict=False)]


def fit(name: str, kind: str, clock: Clock) -> None:
    """Train a task's model for as long as the clock needs."""
    seed_everything(0, verbose=False)
    model = TASKS[name].make_model(1e-4, Path())
    batches: Any = [BATCHES[name]() for _ in range(WARM + clock.steps + 1)]
    masks = [STEPSparsityCallback(n=2, m=4, recipe=recipe_of(kind), verbose=False)] if kind == KINDS[1] else []
    with quiet(), tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=10, callbacks=[*masks, clock],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ).fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # fmt: skip


def profiled(name: str, kind: str, steps: int) -> Times:
    """Self times of some steps."""
    config = _ExperimentalConfig(verbose=True)  # or events have no stack
    profiler = profile(activities=[ProfilerActivity.CPU], with_stack=True, experimental_config=config)
    fit(name, kind, Clock(steps, profiler))
    return times_of(profiler.events())  # type: ignore[no-untyped-call]


def timed(name: str, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps, from fits that take turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(rounds):
        for kind in KINDS if i % 2 == 0 else KINDS[::-1]:
            clock = Clock(steps)
            fit(name, kind, clock)
            seconds[kind] += clock.seconds
    return seconds


def main() -> None:
    """Measure and write."""
    arguments = parser_of(__doc__, Path("out/profile"), "tasks").parse_args()
    names = chosen(arguments.only, BATCHES, "tasks")
    torch.set_num_threads(arguments.threads)
    steps, rounds = (1, 1) if arguments.quick else (10, 4)
    start, profiles = time.perf_counter(), []
    for name in names:
        seconds = timed(name, steps, rounds)
        found = [[profiled(name, kind, min(steps, PROFILED)) for kind in KINDS] for _ in range(min(rounds, 3))]
        profiles.append(profile_of(name, seconds, *(least(each) for each in zip(*found, strict=True))))
        print(f"{name}: done after {elapsed(start)}", file=sys.stderr)
    settings = Settings(torch.device("cpu"), rounds, arguments.quick, largest=0, threads=arguments.threads)
    about = {**facts(settings), "steps": steps, "quick": arguments.quick}
    data = {**about, "tasks": [{**each._asdict(), "top": [top._asdict() for top in each.top]} for each in profiles]}
    write(arguments.out, data, page(profiles, about))


if __name__ == "__main__":
    main()
