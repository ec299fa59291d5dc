"""The tables of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_step import recipes
from lightning_step.reports.exported import ExportedFile
from lightning_step.reports.firings import Setting, Verdict
from lightning_step.reports.groups import MaskedGroup, masked_groups, recipe_of, switch_reasons
from lightning_step.reports.html import Markup, swatch, table, text
from lightning_step.reports.losses import is_validation, loss_curves, phase_losses
from lightning_step.reports.runs import Run
from lightning_step.resume import brief

__all__ = ["criteria_table", "loss_table", "number", "summary_table"]

MISSING = "—"


def number(value: float | None) -> str:
    """A number as a table shows it.

    Args:
        value: The number; None where there is none.

    Returns:
        Four to five digits.

    Example:
        >>> number(1.41108), number(4.3e-8), number(None), number(float("nan"))
        ('1.4111', '4.3e-08', '—', 'nan')
    """
    if value is None:
        return MISSING
    return f"{value:.4f}" if math.isfinite(value) and 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def summary_table(runs: Sequence[Run], loss_tags: Sequence[str] = ()) -> Markup:
    """One row for each run: recipe, pattern, steps, switches, losses, density, files.

    Args:
        runs: The runs.
        loss_tags: Which scalars are losses; see `loss_curves`.

    Returns:
        The table.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> "<td>dense, or not logged</td>" in summary_table([Run("a", Path("a"), EventLog())])
        True
    """
    head = ["run", "recipe", "n:m", "steps", "switch", "final losses", "density", "exported files"]
    rows = [
        [
            _named(i, run),
            text(_recipe(run)),
            text(_patterns(run)),
            text(f"{_steps(run):,}"),
            _lines(_switches(run), "wide"),
            _lines(_final_losses(run, loss_tags), "whole"),
            text(_density(run)),
            _lines([_file(file) for file in run.files], "wide"),
        ]
        for i, run in enumerate(runs)
    ]
    return table(head, rows, numbers=[3])


def criteria_table(verdicts: Sequence[Verdict], group: MaskedGroup, setting: Setting) -> Markup:
    """What every criterion says of one run, below what the run did.

    Args:
        verdicts: What they say.
        group: The run.
        setting: What they were computed with.

    Returns:
        The table.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> group = MaskedGroup(Run("a", Path("a"), EventLog()), "sparsity")
        >>> setting = Setting(100, 0.99, 100, "arithmetic", "as given")
        >>> "cannot be told" in criteria_table([Verdict("Staleness", None, "no v_l1")], group, setting)
        True
    """
    own = [[text("this run"), text("; ".join(_marks(group)) or "no switch"), text("as it was trained")]]
    said = [[text(verdict.criterion), text(verdict.says), text(verdict.why)] for verdict in verdicts]
    return table(["criterion", "would have switched at", "computed from"], own + said)


def loss_table(runs: Sequence[Run], loss_tags: Sequence[str] = ()) -> Markup:
    """What each loss was in each phase.

    Args:
        runs: The runs.
        loss_tags: See `loss_curves`.

    Returns:
        The table.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.figures import Curve
        >>> from lightning_step.reports.event_files import EventLog
        >>> "1.5000" in loss_table([Run("a", Path("a"), EventLog({"val_loss": Curve((1,), (1.5,))}))])
        True
    """
    head = ["run", "loss", "last while dense", "highest with masks on", "final", "best"]
    rows = []
    for i, run in enumerate(runs):
        starts = [mark.step for group in masked_groups(run) for mark in group.marks if mark.what == "masks on"]
        for tag, curve in loss_curves(run, loss_tags).items():
            values = phase_losses(curve, min(starts, default=None))
            rows.append([_named(i, run), text(tag), *(text(number(value)) for value in values)])
    return table(head, rows, numbers=range(2, 6))


def _named(index: int, run: Run) -> Markup:
    kind = "whole" if len(run.name) < 32 else "wide"
    return Markup(f'<div class="{kind}">{swatch(index)}{text(run.name)}</div>')


def _lines(values: Sequence[str], kind: str) -> Markup:
    return Markup("".join(f'<div class="{kind}">{text(value)}</div>' for value in values) or MISSING)


def _recipe(run: Run) -> str:
    described = recipe_of(run)
    if described:
        return brief(_changed(described))
    texts = [text for tag, text in run.log.texts.items() if "sparsity/recipe" in tag]
    found = next((match for each in texts if (match := re.search(r"### Recipe\s+`([^`]+)`", each))), None)
    if found:
        return re.sub(r"\b\w+=None, |, \w+=None\b", "", found[1])
    return "not logged" if masked_groups(run) else "dense, or not logged"


def _changed(described: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the fields that are at their defaults, which would fill the table."""
    made = getattr(recipes, str(described.get("type")), None)
    try:
        usual = recipes.describe(made()) if callable(made) else {}
    except TypeError:  # it has no default
        usual = {}
    other = {key: value for key, value in described.items() if key == "type" or value != usual.get(key, value is None)}
    return {key: _changed(value) if isinstance(value, Mapping) else value for key, value in other.items()}


def _patterns(run: Run) -> str:
    for file in run.files:
        if file.patterns:
            return _counted(file.patterns)
    texts = [text for tag, text in run.log.texts.items() if "sparsity/recipe" in tag]
    rows = [match for each in texts for match in re.finditer(r"\s(\d+:\d+)\s+dim \d+\s+(\d+)$", each, re.MULTILINE)]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[1]] = counts.get(row[1], 0) + int(row[2])
    return _counted(counts) if counts else MISSING


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{pattern} ({count} tensor{'s' * (count != 1)})" for pattern, count in counts.items())


def _steps(run: Run) -> int:
    return max([run.last_step, *(s for file in run.files if isinstance(s := file.info.get("steps"), int))])


def _marks(group: MaskedGroup) -> list[str]:
    return [f"{mark.what} at step {mark.step:,}{' or before' * mark.or_before}" for mark in group.marks]


def _switches(run: Run) -> list[str]:
    said = switch_reasons(run)
    if said:
        return [re.sub(r"^optimizer step", "step", line) for line in said]
    groups = masked_groups(run)
    several = len(groups) > 1
    return [
        f"{f'optimizer {i}: ' if several else ''}{mark} (the reason was not logged)"
        for i, group in enumerate(groups)
        for mark in _marks(group)
    ]


def _final_losses(run: Run, tags: Sequence[str]) -> list[str]:
    shown = []
    for tag, curve in loss_curves(run, tags).items():
        values = phase_losses(curve, None)
        best = f" (best {number(values.best)})" if is_validation(tag) else ""
        shown.append(f"{tag} {number(values.final)}{best}")
    return shown[:6]


def _density(run: Run) -> str:
    curves = [group.curve("density") for group in masked_groups(run)]
    logged = [curve.values[-1] for curve in curves if curve.values]
    densities = logged or [file.density for file in run.files if file.patterns][:1]
    return ", ".join(f"{density:.4g}" for density in densities) or MISSING


def _file(file: ExportedFile) -> str:
    return f"{file.path.name} ({file.format}): {file.bytes:,} bytes, {100 * file.share:.1f} % of dense"
