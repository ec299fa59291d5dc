"""From ``results.json`` of the comparison to JSON lines, which ``lightning-step figure`` draws.

``python examples/benchmarks/json_lines.py`` writes ``results/compare/results.jsonl``; its fields are those that
`lightning_step.reports.results` describes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results" / "compare"
# The rows that change one thing in STEP, in the words of the figures. The other ones are recipes of their own.
CHANGED: dict[str, dict[str, Any]] = {
    "switch at 10 %": {"switch": 0.1},
    "switch at 30 %": {"switch": 0.3},
    "v not frozen": {"frozen": False},
    "v frozen for all parameters": {"change": "v frozen for all parameters"},
    "the usual lam, 2e-4": {"change": "lam 2e-4"},
    "the paper's preconditioner": {"change": "the paper's preconditioner"},
    "no bound on the step": {"change": "no bound on the step"},
    "no masks, v frozen": {"change": "no masks"},
}


def lines(runs: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One result for each run, and STEP's own once more as the other side of what was changed in it."""
    tuned = {(run["pattern"], run["rate"], run["lam"]) for run in runs if run["row"] in CHANGED}
    for run in runs:
        changes = CHANGED.get(run["row"], {})
        made = {"recipe": "STEP" if changes else run["row"], **common(run), **changes}
        yield made
        if run["row"] == "STEP" and (run["pattern"], run["rate"], run["lam"]) in tuned:
            yield {**made, "frozen": True}
            yield {**made, "switch": run["switch_steps"][0] / run["task"]["steps"]}


def common(run: Mapping[str, Any]) -> dict[str, Any]:
    """What every result has."""
    n, m = map(int, run["pattern"].split(":")) if run["pattern"] else (None, None)
    steps = run["task"]["steps"]
    every = steps // (len(run["val_losses"]) - 1)  # the last value is of a validation after the end
    losses = [[every * (i + 1), loss] for i, loss in enumerate(run["val_losses"][:-1])]
    return {
        "n": n,
        "m": m,
        "seed": run["seed"],
        "lr": run["rate"],
        "lam": run["lam"],
        "loss": run["val_loss"],
        "optimizer": "AdamW",
        "losses": losses,
    }


def main() -> None:
    """Write the lines."""
    runs = json.loads((FOLDER / "results.json").read_text())["runs"]
    text = "".join(json.dumps(line) + "\n" for line in lines(runs))
    (FOLDER / "results.jsonl").write_text(text)
    print(f"wrote {FOLDER / 'results.jsonl'} ({len(text.splitlines())} lines)")


if __name__ == "__main__":
    main()
