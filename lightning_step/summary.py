"""Tables as plain text, and the start table: what is masked, what is not, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_step.targets import LeftOut, Target, Targets

__all__ = ["Section", "Sheet", "family", "format_table", "format_targets", "sheet_of_targets"]


@dataclass(frozen=True)
class Section:
    """One table.

    Example:
        >>> print(Section((("name", "n"), ("a", "10")), right=(1,)))
        name   n
        a     10
    """

    rows: tuple[tuple[str, ...], ...]  # cells, the header first
    right: tuple[int, ...] = ()  # columns that are aligned to the right

    def __str__(self) -> str:
        return "\n".join(format_table(self.rows, self.right))


@dataclass(frozen=True)
class Sheet:
    """What is printed at once: a line, tables, and lines below them.

    Example:
        >>> print(Sheet("One layer", (Section((("name", "n"), ("a", "10"))),), ("done",)))
        One layer
        name  n
        a     10
        done
    """

    head: str
    sections: tuple[Section, ...]
    foot: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.head, *map(str, self.sections), *self.foot])


def format_targets(targets: Targets) -> str:
    """Lay out what gets a mask and what stays dense; tensors that differ only in a layer number share a row.

    Args:
        targets: From `find_targets`.

    Returns:
        Several lines of plain text.

    Example:
        >>> from torch import nn
        >>> from lightning_step import NMPattern, find_targets
        >>> print(format_targets(find_targets(nn.Linear(8, 4), NMPattern(2, 4))))
        N:M masks on 1 of 2 tensors: 32 of 36 weights (88.9 %), of which 16 are kept
        masked  layer   shape   n:m  along  tensors
        weight  Linear  (4, 8)  2:4  dim 1        1
        left dense  shape  tensors  why
        bias                     1  1-D (a bias or a scale)
    """
    return str(sheet_of_targets(targets))


def sheet_of_targets(targets: Targets, foot: Sequence[str] = ()) -> Sheet:
    """What `format_targets` lays out.

    Args:
        targets: From `find_targets`.
        foot: Lines below the tables.

    Returns:
        Two tables, or one if nothing is left out.

    Example:
        >>> from torch import nn
        >>> from lightning_step import NMPattern, find_targets
        >>> sheet_of_targets(find_targets(nn.Linear(8, 4), NMPattern(2, 4))).sections[1].rows
        (('left dense', 'shape', 'tensors', 'why'), ('bias', '', '1', '1-D (a bias or a scale)'))
    """
    masked = sum(math.prod(t.shape) for t in targets.masked)
    kept = sum(math.prod(t.shape) * t.pattern.n // t.pattern.m for t in targets.masked)
    total = masked + sum(math.prod(entry.shape) for entry in targets.left_out)
    count = len(targets.masked) + len(targets.left_out)
    head = (
        f"N:M masks on {len(targets.masked)} of {count} tensors: {masked:,} of {total:,} weights "
        f"({masked / total:.1%}), of which {kept:,} are kept".replace("%", " %")
    )
    sections = [Section(_masked_rows(targets.masked), right=(5,))]
    if targets.left_out:
        sections.append(Section(_left_out_rows(targets.left_out), right=(2,)))
    return Sheet(head, tuple(sections), tuple(foot))


def format_table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Pad columns to one width.

    Args:
        rows: Cells, the header first.
        right: Columns that are aligned to the right.

    Returns:
        One line per row.

    Example:
        >>> format_table([["name", "n"], ["a", "10"]], right=[1])
        ['name   n', 'a     10']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = set(right)
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in aligned else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def family(name: str) -> str:
    """The name that tensors of one kind share.

    Args:
        name: Full name of a tensor.

    Returns:
        The same with a star in the place of every layer's number.

    Example:
        >>> family("blocks.11.fc.weight")
        'blocks.*.fc.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _masked_rows(masked: Sequence[Target]) -> tuple[tuple[str, ...], ...]:
    merged: dict[tuple[str, ...], list[str]] = {}
    for t in masked:
        key = (family(t.name), t.kind, str(t.shape), str(t.pattern), f"dim {t.dim}")
        merged.setdefault(key, []).append(t.name)
    rows: list[tuple[str, ...]] = [("masked", "layer", "shape", "n:m", "along", "tensors")]
    for (shared, *cells), names in merged.items():
        rows.append((shared if len(names) > 1 else names[0], *cells, str(len(names))))
    return tuple(rows)


def _left_out_rows(left_out: Sequence[LeftOut]) -> tuple[tuple[str, ...], ...]:
    # Biases and scales are many and of no interest: one row for all of the same reason.
    merged: dict[tuple[str, str, str], list[str]] = {}
    for entry in left_out:
        if len(entry.shape) == 1:
            key = ("biases and scales", "", entry.reason)
        else:
            key = (family(entry.name), str(entry.shape), entry.reason)
        merged.setdefault(key, []).append(entry.name)
    rows: list[tuple[str, ...]] = [("left dense", "shape", "tensors", "why")]
    for (shared, shape, why), names in merged.items():
        rows.append((shared if len(names) > 1 else names[0], shape, str(len(names)), why))
    return tuple(rows)
