"""From folders of runs to a page, and its figures as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from lightning_step.errors import ConfigurationError
from lightning_step.export import atomic_write, check_writable
from lightning_step.figures import blank_figure
from lightning_step.reports.curves import Picture
from lightning_step.reports.html import Markup, figure, figures, paragraph, problems, render
from lightning_step.reports.page import Block, Section, sections
from lightning_step.reports.runs import Run, read_runs
from lightning_step.reports.saving import save_figure
from lightning_step.version import __version__

__all__ = ["write_report"]

FORMATS = ("png", "svg")


def write_report(
    folders: Sequence[str],
    out: str | os.PathLike[str] = "report.html",
    *,
    files: Sequence[str] = (),
    figures_folder: str | os.PathLike[str] | None = None,
    loss: Sequence[str] = (),
    beta2: float | None = None,
    title: str = "Sparsity report",
) -> list[Path]:
    """Write one self-contained HTML page about one run or several.

    Args:
        folders: Folders with event files, or with subfolders that hold them; ``NAME=FOLDER`` chooses a name.
        out: The page to write. One that is there is replaced, as a whole.
        files: Exported files that lie in none of the folders, as ``NAME=FILE``; with a single run ``FILE`` will do.
        figures_folder: Where to write every figure as PNG and SVG, too.
        loss: Which scalars are losses; by default all that have "loss" in their name.
        beta2: Decay of Adam's second moment, where the runs do not say.
        title: Of the page.

    Returns:
        What was written, the page first.

    Raises:
        FileFormatError: If there is nothing to read; see `lightning_step.reports.runs.read_runs`.
        ConfigurationError: If matplotlib is not installed, or an argument does not fit the runs.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     writer.add_scalar("val_loss", 0.5, 10)
        >>> [path.name for path in write_report([writer.log_dir], writer.log_dir + "/report.html")]
        ['report.html']
    """
    if beta2 is not None and not 0 <= beta2 < 1:
        raise ConfigurationError(f"Expected 0 <= beta2 < 1, but got {beta2!r}.")
    out = check_writable(out)
    blank_figure(1, 1)  # without matplotlib, nothing is read in vain
    runs = read_runs(folders, files)
    made = _named_once(sections(runs, loss, beta2))
    page = render(title, _lead(runs), [(section.title, [_markup(block) for block in section.blocks]) for section in made])
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    written = [out]
    if figures_folder is not None:
        pictures = [picture for section in made for block in section.blocks for picture in _pictures(block)]
        written += [save_figure(p.figure, Path(figures_folder) / f"{p.name}.{end}") for p in pictures for end in FORMATS]
    return written


def _lead(runs: Sequence[Run]) -> Markup:
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    date = datetime.now(timezone.utc).date().isoformat()
    said = [f"{run.name}: {problem}" for run in runs for problem in (*run.problems, *_not_finite(run))]
    line = paragraph(f"{count}, written by lightning-step {__version__} on {date}.", muted=True)
    return Markup(f"{line}{problems(said)}")


def _not_finite(run: Run) -> list[str]:
    found = []
    for tag, curve in run.log.scalars.items():
        bad = [step for step, value in zip(*curve, strict=True) if value - value != 0]  # of NaN and infinity only
        if bad:
            times = f"{len(bad):,} time{'s' * (len(bad) != 1)}"
            found.append(f"{tag} was NaN or infinite {times}, first at step {bad[0]:,}")
    return found[:10]


def _named_once(made: Sequence[Section]) -> list[Section]:
    """Names that stay apart as ids and as files, also where the runs' own differ in signs only."""
    taken: set[str] = set()

    def once(picture: Picture) -> Picture:
        names = (f"{picture.name}{f'-{i}' if i else ''}" for i in range(len(taken) + 1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        return picture._replace(name=name)

    def renamed(block: Block) -> Block:
        if isinstance(block, Picture):
            return once(block)
        return [once(picture) for picture in block] if isinstance(block, list) else block

    return [Section(section.title, [renamed(block) for block in section.blocks]) for section in made]


def _markup(block: Block) -> Markup:
    if isinstance(block, Picture):
        return figure(block)
    return figures(block) if isinstance(block, list) else block


def _pictures(block: Block) -> list[Picture]:
    if isinstance(block, Picture):
        return [block]
    return block if isinstance(block, list) else []
