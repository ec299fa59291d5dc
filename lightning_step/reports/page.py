"""What stands on the page of a report, section by section."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_step.reports.curves import Line, Picture, draw_lines, draw_loss, draw_switch
from lightning_step.reports.drawing import COLOURS
from lightning_step.reports.firings import setting_of, verdicts
from lightning_step.reports.groups import MaskedGroup, layer_curves, masked_groups
from lightning_step.reports.heatmap import MAX_LAYERS, draw_layers
from lightning_step.reports.html import Markup, paragraph, preformatted, text
from lightning_step.reports.losses import is_validation, loss_curves
from lightning_step.reports.runs import Run
from lightning_step.reports.summary import criteria_table, loss_table, summary_table

__all__ = ["Block", "Section", "sections"]

Block = Markup | Picture | list[Picture]
"""Text, a picture over the whole width, or small pictures beside each other."""

MAX_COMPARED = 24  # scalars; of more, nobody would look at all
_STYLES = ("-", "--", ":", "-.")
_MASKS = {
    "flip_rate": "Share of the mask that changed in the last logged step. It should fall: masks settle.",
    "density": "Share of the masked tensors that is in force: 1 while dense, n/m with masks on.",
    "kept_magnitude": "Share of the sum of |w| that the mask keeps, or would keep while the run is dense.",
}
_MOMENT = {
    "v_l2": "Root of the sum of squares of the second moment over all masked tensors; once frozen, of the frozen one.",
    "v_l1": "Sum of the second moment over all masked tensors; once frozen, of the frozen one.",
    "v_near_zero": "Share of the coordinates whose v is so small that Adam divides by eps instead.",
    "ratio": "Window mean of Z by the threshold: AutoSwitch fires below 1.",
}
_LIMITS = (
    "Below each curve: where the other criteria would have switched that run, computed from what it logged, with this "
    "package's default limits. A log that does not hold every step leaves bounds, because a norm of v cannot fall faster "
    "than beta2 lets it. What comes after a switch is the run's own course, which another switch would have changed."
)
_NO_LAYERS = (
    "No run logged its layers one by one. Add SparsityMonitor(per_layer=True) to the trainer's callbacks, and the next "
    "report shows which layers pay for sparsity."
)


class Section(NamedTuple):
    """A heading and what stands below it.

    Example:
        >>> Section("Summary", [paragraph("Nothing.")]).title
        'Summary'
    """

    title: str
    blocks: list[Block]


def sections(runs: Sequence[Run], loss_tags: Sequence[str] = (), beta2: float | None = None) -> list[Section]:
    """All sections for these runs; what was not logged is said, not left out.

    Args:
        runs: The runs.
        loss_tags: Which scalars are losses; by default all that are called so.
        beta2: Decay of Adam's second moment, where the runs do not say.

    Returns:
        In the order of the page.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> [section.title for section in sections([Run("a", Path("a"), EventLog())])]
        ['Summary', 'The switch', 'Loss by phase', 'Masks', 'Second moment', 'Layers', 'Other scalars']
    """
    recipes = [(run.name, text) for run in runs for tag, text in run.log.texts.items() if "sparsity/recipe" in tag]
    return [
        Section("Summary", [summary_table(runs, loss_tags), *(preformatted(f"{n}, as logged", t) for n, t in recipes)]),
        Section("The switch", [paragraph(_LIMITS, muted=True), *(block for run in runs for block in _switch(run, beta2))]),
        Section("Loss by phase", _losses(runs, loss_tags)),
        Section("Masks", _of_groups(runs, _MASKS, "No run logged masks.")),
        Section("Second moment", _of_groups(runs, _MOMENT, "No run logged its second moment.")),
        Section("Layers", _layers(runs)),
        Section("Comparison of the runs" if len(runs) > 1 else "Other scalars", _compared(runs, loss_tags)),
    ]


def _switch(run: Run, beta2: float | None) -> list[Block]:
    blocks: list[Block] = []
    for group in masked_groups(run):
        setting = setting_of(group, beta2)
        said = verdicts(group, setting)
        caption = f"Limits are fractions of {setting.steps:,} steps; {setting.source}."
        finite = any(map(math.isfinite, group.curve("variance_change").values))
        if finite:
            blocks.append(Picture(_slug("variance", group.label), group.label, draw_switch(group, said), caption))
        else:
            blocks.append(Markup(f"<h3>{text(group.label)}</h3>"))
            blocks.append(paragraph(f"No variance curve: this run logged no finite sample of Z. {caption}", muted=True))
        blocks.append(criteria_table(said, group, setting))
    return blocks or [
        Markup(f"<h3>{text(run.name)}</h3>"),
        paragraph(
            "This run logged nothing of sparsity: it was trained without STEPSparsityCallback, or with its monitor off."
        ),
    ]


def _losses(runs: Sequence[Run], tags: Sequence[str]) -> list[Block]:
    pictures, without = [], []
    size = (11.0, 3.6) if len(runs) == 1 else (5.5, 3.4)
    for run in runs:
        marks = [mark for group in masked_groups(run) for mark in group.marks]
        lines = [
            Line(tag, curve, COLOURS[i % len(COLOURS)], *((2.0, "o-") if is_validation(tag) else (1.0, "-")))
            for i, (tag, curve) in enumerate(loss_curves(run, tags).items())
        ]
        if lines:
            drawn = draw_loss(lines, marks, run.last_step, size)
            pictures.append(Picture(_slug("loss", run.name), run.name, drawn, "Shaded: masks are on." if marks else ""))
        else:
            without.append(paragraph(f"{run.name} logged no scalar with “loss” in its name; --loss TAG names one."))
    shown: list[Block] = [pictures] if pictures and len(runs) > 1 else [*pictures]
    return [loss_table(runs, tags), *shown, *without]


def _of_groups(runs: Sequence[Run], names: dict[str, str], nothing: str) -> list[Block]:
    groups = [(i, group) for i, run in enumerate(runs) for group in masked_groups(run)]
    pictures = []
    for name, meaning in names.items():
        lines = [
            Line(group.label, curve, *_look(i, _number(group))) for i, group in groups if (curve := group.curve(name)).steps
        ]
        if lines:
            pictures.append(Picture(_slug("scalar", name), name, draw_lines(lines, name.replace("_", " ")), meaning))
    return [pictures] if pictures else [paragraph(nothing)]


def _layers(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        marks = [mark for group in masked_groups(run) for mark in group.marks]
        for what in ("kept_magnitude", "flip_rate"):
            curves = layer_curves(run, what)
            if curves:
                words = what.replace("_", " ")
                more = f" The first {MAX_LAYERS} of {len(curves)} are shown." if len(curves) > MAX_LAYERS else ""
                caption = f"At the right: the last value. White lines: masks on (solid), v frozen (dotted).{more}"
                name, title = _slug(f"layers-{what}", run.name), f"{run.name}: {words} of every layer"
                blocks.append(Picture(name, title, draw_layers(curves, words, marks), caption))
    return blocks or [paragraph(_NO_LAYERS)]


def _compared(runs: Sequence[Run], loss_tags: Sequence[str]) -> list[Block]:
    hidden = {"epoch", "hp_metric"} | (
        {tag for run in runs for tag in loss_curves(run, loss_tags)} if len(runs) < 2 else set()
    )
    logged = dict.fromkeys(tag for run in runs for tag in sorted(run.log.scalars))
    tags = [tag for tag in logged if tag not in hidden and not re.match(r"(?:[^/]*-)?sparsity/", tag)]
    pictures = []
    for i, tag in enumerate(tags[:MAX_COMPARED]):
        lines = [Line(run.name, run.log.scalars[tag], *_look(k)) for k, run in enumerate(runs) if tag in run.log.scalars]
        pictures.append(Picture(_slug("scalar", str(i), tag), tag, draw_lines(lines, tag), ""))
    rest, blocks = tags[MAX_COMPARED:], [pictures] if pictures else [paragraph("There are no others.")]
    note = paragraph(f"{len(rest)} more scalars are not shown: {', '.join(rest)[:2000]}.")
    return [*blocks, note] if rest else [*blocks]


def _look(run: int, optimizer: int = 0) -> tuple[str, float, str]:
    """Colour, width and style of a line: one colour for a run, as long as there are colours."""
    return COLOURS[run % len(COLOURS)], 1.6, _STYLES[(run // len(COLOURS) + optimizer) % len(_STYLES)]


def _number(group: MaskedGroup) -> int:
    _, _, number = group.prefix.partition("/")
    return int(number or 0)


def _slug(*parts: str) -> str:
    """A name for ids and files."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:60] for part in parts).strip("-")
