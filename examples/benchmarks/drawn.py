"""Results for ``lightning-step figure``, and the order of rows in tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes_compared import ENTRIES

Line = Mapping[str, Any]
ORDER = list(ENTRIES)


def drawable(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """What ``lightning-step figure`` reads.

    A row in which others change something stands there once more, on the other side of what they change. Rows that are not
    tuned are left out: no figure says that they are not.
    """
    lines = [line for line in lines if not line.get("untuned")]
    fields = ("recipe", "n", "m", "seed", "lr", "lam", "loss", "optimizer", "switch", "frozen", "change", "losses")
    changed = {
        key: {(a["lr"], a["of"], a["n"], a["m"]) for a in lines if a[key] is not None} for key in ("frozen", "switch")
    }
    lams = {(a["of"], a["n"], a["m"]): a["lam"] for a in lines if a["frozen"] is not None or a["switch"] is not None}
    rows = []
    for line in sorted(lines, key=sorting):
        row = {name: line[name] for name in fields}
        rows.append(row)
        at = (line["lr"], line["row"], line["n"], line["m"])
        if line["lam"] != lams.get(at[1:]):
            continue
        if at in changed["frozen"]:
            rows.append({**row, "frozen": True})
        if at in changed["switch"] and line["switch_steps"]:
            rows.append({**row, "switch": line["switch_steps"][-1] / line["steps"]})
    return rows


def sorting(line: Line) -> tuple[Any, ...]:
    """An order that does not depend on which run was finished first."""
    return (position(line["row"]), line["row"], narrowness(pattern_of(line)), line["lr"], line["lam"] or 0.0, line["seed"])


def pattern_of(line: Line) -> str:
    """The pattern as it is written; empty without masks."""
    return "" if line["n"] is None else f"{line['n']}:{line['m']}"


def narrowness(pattern: str) -> tuple[float, int]:
    """Patterns in order: what keeps most comes first."""
    n, m = map(int, pattern.split(":")) if pattern else (1, 1)
    return -n / m, m


def position(row: str) -> int:
    """Rows in the order of the table of recipes."""
    return ORDER.index(row) if row in ORDER else len(ORDER)
