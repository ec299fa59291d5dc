"""What `STEPSparsityCallback` says while a Lightning ``Trainer`` fits: start table, switches, progress, end table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_module, rank_zero_only

from lightning_step.callbacks.progress import Progress
from lightning_step.callbacks.trainer import callbacks_of
from lightning_step.events import SwitchEvent
from lightning_step.export import accelerations, short_form
from lightning_step.outcome import sheet_of_outcome
from lightning_step.recipes import Recipe, describe
from lightning_step.resume import brief
from lightning_step.sparsifier import Sparsifier
from lightning_step.summary import Sheet, sheet_of_targets
from lightning_step.targets import merge_targets
from lightning_step.terminal import show, tell

__all__ = ["Console", "present", "say"]


class Console:
    """Speaks on rank 0, through Lightning's logger. Every process calls every method: some have to count together.

    Example:
        >>> console = Console()
        >>> console.event(SwitchEvent(5, True, True, "t_max reached", "T_max = 5", "2 tensors"))
    """

    def __init__(self) -> None:
        self._verbose = False
        self._silent = True  # until the start table is there, a switch at step 0 is kept for below it
        self._sparsifiers: Sequence[Sparsifier] = ()
        self._progress = Progress((), 1)
        self._outcome: Sheet | None = None

    def prepare(self, verbose: bool) -> None:
        """A fit is about to start. Keeps silent until `begin`.

        Args:
            verbose: False: only the progress bar is kept up to date.
        """
        self._verbose, self._silent, self._outcome = verbose, True, None

    def begin(
        self, pl_module: pl.LightningModule, recipe: Recipe, sparsifiers: Sequence[Sparsifier], read_every: int
    ) -> None:
        """The optimizers are hooked. Shows the start table.

        Args:
            pl_module: The module to fit.
            recipe: Its recipe.
            sparsifiers: One per optimizer that holds masked tensors.
            read_every: Optimizer steps between two readings of the samples.
        """
        self._sparsifiers, self._progress = sparsifiers, Progress(sparsifiers, read_every)
        if self._verbose:
            runtimes = short_form(accelerations(pl_module, torch.bfloat16))  # no sparse kernel takes 2:4 in float32
            targets = merge_targets([sparsifier.targets for sparsifier in sparsifiers])
            present(sheet_of_targets(targets, [runtimes, f"recipe: {brief(describe(recipe))}"]))
        self._silent = not self._verbose

    def first(self) -> None:
        """The run is a new one. Says what is to be known before the first step, and what has switched already."""
        for sparsifier in self._sparsifiers:
            for line in (*sparsifier.notes, *sparsifier.events):
                self._say(f"lightning-step, {line}")

    def event(self, event: SwitchEvent) -> None:
        """Something switches.

        Args:
            event: What, and why.
        """
        self._say(f"lightning-step, {event}")

    def progress(self, trainer: pl.Trainer) -> None:
        """After every batch. Keeps the progress bar up to date.

        Args:
            trainer: The trainer.
        """
        self._progress.update(trainer)

    def finish(self) -> None:
        """Training ends as it should. Counts what it left, while that is still on the device."""
        if self._verbose and self._sparsifiers:
            self._outcome = sheet_of_outcome(self._sparsifiers)

    def close(self, trainer: pl.Trainer) -> None:
        """All is done, files are written. Shows the end table, if training has come to its end.

        Args:
            trainer: The trainer.
        """
        if self._outcome is not None:
            written = tuple(f"exported to {path}" for path in _exports(trainer))
            present(Sheet(self._outcome.head, self._outcome.sections, self._outcome.foot + written))
        self._outcome = None

    def _say(self, line: str) -> None:
        if not self._silent:
            say(line)


def _exports(trainer: pl.Trainer) -> Iterator[str]:
    """Files that other callbacks have written in this fit; callbacks do not import each other."""
    for callback in callbacks_of(trainer):
        written = getattr(callback, "written", None)  # of a callback that is not ours it may be anything
        yield from (path for path in (written if isinstance(written, list) else []) if isinstance(path, str))


@rank_zero_only
def present(sheet: Sheet) -> None:
    """Show tables on rank 0.

    Args:
        sheet: The tables.

    Example:
        >>> present(Sheet("One layer", ()))
    """
    show(sheet, _log())


@rank_zero_only
def say(line: str) -> None:
    """Say something on rank 0.

    Args:
        line: What to say.

    Example:
        >>> say("lightning-step, wrote out/model.safetensors")
    """
    tell(line, _log())


def _log() -> logging.Logger:
    """The logger behind ``rank_zero_info``, which is that of whoever was imported last."""
    log: logging.Logger = rank_zero_module.log
    return log
