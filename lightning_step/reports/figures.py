"""The figures that one draws again and again, each by its name, from runs or from the results of a benchmark."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_step.errors import ConfigurationError
from lightning_step.reports.curves import Line, draw_lines, draw_switch
from lightning_step.reports.drawing import COLOURS
from lightning_step.reports.firings import setting_of, verdicts
from lightning_step.reports.groups import masked_groups
from lightning_step.reports.losses import is_validation, loss_curves
from lightning_step.reports.quality import draw_frozen, draw_losses, draw_patterns, draw_switch_points
from lightning_step.reports.results import Result, read_results
from lightning_step.reports.runs import Run, read_runs
from lightning_step.reports.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "NamedFigure", "write_figure"]


class NamedFigure(NamedTuple):
    """A figure that the command line knows.

    Example:
        >>> FIGURES["patterns"].inputs
        'results'
    """

    inputs: str  # runs, results, or runs or results
    help: str
    of_runs: Callable[[Sequence[Run], Sequence[str], float | None], Figure] | None = None
    of_results: Callable[[Sequence[Result]], Figure] | None = None


def write_figure(
    name: str,
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    *,
    tags: Sequence[str] = (),
    beta2: float | None = None,
) -> Path:
    """Draw one figure by its name.

    Args:
        name: One of `FIGURES`.
        inputs: Folders of runs, as `write_report` takes them, or one or more files of results (JSON lines).
        out: The file; its ending says in which format: png, svg, pdf.
        tags: Which scalars of the runs to draw, for figures that have a choice.
        beta2: Decay of Adam's second moment, where the runs do not say.

    Returns:
        The file.

    Raises:
        FileFormatError: If an input cannot be read.
        ConfigurationError: If there is no such figure, its inputs are of the wrong kind, or hold nothing to draw.

    Example:
        >>> write_figure("patterns", ["results.jsonl"], "a.png")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a file of JSON lines, but got 'results.jsonl': No such file ...
    """
    if name not in FIGURES:
        raise ConfigurationError(f"Expected the figure to be one of {list(FIGURES)}, but got {name!r}.")
    kind = FIGURES[name]
    files = [path for path in inputs if Path(path).suffix in (".jsonl", ".json")]
    if kind.of_results is not None and (kind.of_runs is None or files):
        return save_figure(kind.of_results([result for path in inputs for result in read_results(path)]), out)
    if kind.of_runs is None or files:
        raise ConfigurationError(f"Expected folders of runs for the figure {name!r}, but got {files}.")
    return save_figure(kind.of_runs(read_runs(inputs), tags, beta2), out)


def _loss(runs: Sequence[Run], tags: Sequence[str], beta2: float | None) -> Figure:
    """Of every run the losses asked for, else its first of validation."""
    lines = []
    for i, run in enumerate(runs):
        curves = loss_curves(run, tags)
        found = [tag for tag in curves if is_validation(tag)] or [*curves]
        for tag in [*curves] if tags else found[:1]:
            name = f"{run.name}, {tag}" if len(tags) > 1 else run.name
            lines.append(Line(name, curves[tag], COLOURS[i % len(COLOURS)], 1.6, ("-", "--", ":")[i // len(COLOURS) % 3]))
    return _drawn(lines, ", ".join(tags) or "loss", "a scalar with “loss” in its name, or one that --tag names")


def _norm(runs: Sequence[Run], tags: Sequence[str], beta2: float | None) -> Figure:
    wanted = tags[0] if tags else "v_l2"
    groups = [(i, group) for i, run in enumerate(runs) for group in masked_groups(run)]
    lines = [Line(group.label, group.curve(wanted), COLOURS[i % len(COLOURS)]) for i, group in groups]
    return _drawn([line for line in lines if line.curve.steps], f"norm of v ({wanted})", f"sparsity/{wanted}")


def _variance(runs: Sequence[Run], tags: Sequence[str], beta2: float | None) -> Figure:
    groups = [group for run in runs for group in masked_groups(run)]
    sampled = [group for group in groups if any(map(math.isfinite, group.curve("variance_change").values))]
    if len(sampled) != 1:
        raise ConfigurationError(
            f"Expected one run that sampled Z, but got {[group.label for group in sampled]} among "
            f"{[run.name for run in runs]}. Name the folder of one run of a recipe with AutoSwitch; `report` draws several."
        )
    [group] = sampled
    return draw_switch(group, verdicts(group, setting_of(group, beta2)))


def _drawn(lines: Sequence[Line], ylabel: str, needed: str) -> Figure:
    if not lines:
        raise ConfigurationError(f"Expected runs that logged {needed}, but got none.")
    return draw_lines(lines, ylabel, (8, 4.2))


FIGURES: Mapping[str, NamedFigure] = {
    "loss": NamedFigure("runs or results", "loss over time; of results one panel for each optimizer", _loss, draw_losses),
    "norm": NamedFigure("runs", "the norm of the second moment over time, dense against masked runs", _norm),
    "variance": NamedFigure("runs", "Z on a log axis with the threshold and where each criterion fires", _variance),
    "patterns": NamedFigure("results", "loss at the end against n:m, one line for each recipe", None, draw_patterns),
    "frozen": NamedFigure("results", "loss at the end with v frozen against v live", None, draw_frozen),
    "switch": NamedFigure("results", "loss at the end against a forced switch point", None, draw_switch_points),
}
