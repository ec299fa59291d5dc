"""One-off: ``results/compare`` from a file for each run to lines of ``cells.jsonl``. Removed once it was used.

Every number of the old files is in the lines; a line says the same of every run, in the words of `training.described`. The
commit is the one that recorded the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cells import Cell
from recipes_compared import ENTRIES
from studies import COMPARE
from training import described

FOLDER = Path(__file__).parent / "results" / "compare"
COMMIT = "b6481914f6f0376166426dd92179fe1c74dcafb2"


def line_of(old: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The new line of an old run."""
    [part] = COMPARE.parts
    fixed, has_lam = ENTRIES[old["row"]].lam, ENTRIES[old["row"]].has_lam
    lam = (old["lam"] if has_lam else None) if fixed is None else fixed
    cell = Cell(part.task, old["row"], old["pattern"], old["rate"], lam, old["seed"])
    task = old["task"]
    assert (task["steps"], task["model"], task["data"]) == (cell.steps, part.task.model, part.task.data)
    assert len(old["val_losses"]) == 11
    assert old["val_losses"][-1] == old["val_loss"]
    return {
        "key": cell.key,
        **described(cell),
        "loss": old["val_loss"],
        "scores": {"val_loss": old["val_loss"]},
        "losses": [[100 * (i + 1), loss] for i, loss in enumerate(old["val_losses"][:-1])],
        "pruned": {pattern: {"val_loss": loss} for pattern, loss in old["pruned"].items()},
        "switches": old["switches"],
        "switch_steps": old["switch_steps"],
        "seconds": old["seconds"],
        "versions": {"python": whole["python"], **{name: task[name] for name in ("torch", "lightning", "lightning-step")}},
        "machine": whole["machine"],
        "commit": COMMIT,
        "changed": False,
        "finished": whole["date"],
    }


def main() -> None:
    """Write the lines; every file of a run has to be one of them."""
    whole = json.loads((FOLDER / "results.json").read_text())
    files = [json.loads(path.read_text()) for path in sorted((FOLDER / "runs").glob("*.json"))]
    assert sorted(map(json.dumps, files)) == sorted(map(json.dumps, whole["runs"]))
    lines = [line_of(run, whole) for run in whole["runs"]]
    known = {cell.key for cell in COMPARE.cells({line["key"]: line for line in lines})}
    assert {line["key"] for line in lines} == known, "nothing is missing, and nothing is too much"
    assert len(known) == len(lines) == COMPARE.count()
    (FOLDER / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} runs")


if __name__ == "__main__":
    main()
