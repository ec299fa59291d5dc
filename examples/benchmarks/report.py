"""From finished runs to ``results.json`` and a Markdown page."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipes_compared import ABLATIONS, PATTERNS, ROWS
from training import TASK, Run

Results = Mapping[str, Mapping[str, Any]]


def best_on_one_seed(row: str, pattern: str, results: Results, count: int) -> list[Run]:
    """The settings of a row with the lowest validation losses in the grid, best first."""
    found = [result for result in results.values() if (result["row"], result["pattern"]) == (row, pattern)]
    found.sort(key=lambda result: float(result["val_loss"]))
    return [Run(row, pattern, result["rate"], result["lam"], result["seed"]) for result in found[:count]]


def best_on_average(runs: Sequence[Run], results: Results, seeds: Sequence[int]) -> Run:
    """The setting with the lowest mean validation loss over all seeds."""
    return min(runs, key=lambda run: statistics.mean(_losses(run, results, seeds)))


def write_results(
    folder: Path,
    results: Results,
    best: Mapping[tuple[str, str], Run],
    rates: Sequence[float],
    lams: Sequence[float],
    seeds: Sequence[int],
    processes: int,
) -> str:
    """Write both files.

    Args:
        folder: Where to.
        results: Every run by its key.
        best: The best setting of every row, by row and pattern.
        rates: Rates of the grid.
        lams: Lams of the grid.
        seeds: All seeds; the grid was on the first.
        processes: How many ran at a time.

    Returns:
        The Markdown page.
    """
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {processes} runs at a time, 1 thread each"
    facts = {
        "task": TASK,
        "grid": {"rates": rates, "lams": lams, "seed": seeds[0]},
        "seeds": seeds,
        "python": platform.python_version(),
        "machine": machine,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "runs": sorted(results.values(), key=lambda result: (result["row"], result["seed"], result["val_loss"])),
    }
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    dense = best["dense", ""]
    changed = {name: replace(best["STEP", PATTERNS[0]], row=name) for name in ABLATIONS}
    page = [
        f"Validation loss in nats per character, lower is better; {TASK['steps']} steps; mean ± standard deviation over "
        f"seeds {', '.join(map(str, seeds))}. Rate and lam of each row: of its two best settings in the grid below (seed "
        f"{seeds[0]}), the one with the lowest mean over all seeds.\n"
    ]
    for pattern in PATTERNS:
        rows = {row: run for (row, of), run in best.items() if of in (pattern, "")}
        page += [f"**{pattern}**\n", *_table(rows, results, seeds, dense), *_one_shot(pattern, dense, results, seeds), ""]
    page += [
        f"One thing changed in STEP, {PATTERNS[0]}, at STEP's rate and lam:\n",
        *_table(changed, results, seeds, dense),
        f"\nThe grid, seed {seeds[0]}:\n",
        *_grid(results, rates, lams, seeds[0]),
        f"\n{machine}; Python {facts['python']}, torch {TASK['torch']}, lightning {TASK['lightning']}, lightning-step "
        f"{TASK['lightning-step']}; {facts['date']}; `{facts['command']}`.",
    ]
    text = "\n".join(page) + "\n"
    (folder / "results.md").write_text(text)
    return text


def _losses(run: Run, results: Results, seeds: Sequence[int]) -> list[float]:
    return [float(results[replace(run, seed=seed).key]["val_loss"]) for seed in seeds]


def _table(runs: Mapping[str, Run], results: Results, seeds: Sequence[int], dense: Run) -> list[str]:
    lines = [
        "| recipe | validation loss | above dense | per seed | rate | lam | switch after step |",
        "|---|---|---|---|---|---|---|",
    ]
    base = statistics.mean(_losses(dense, results, seeds))
    for row, run in runs.items():
        losses = _losses(run, results, seeds)
        lam = f"{run.lam:g}" if run.lam is not None and (ROWS | ABLATIONS)[row].has_lam else ""
        switches = _switches([results[replace(run, seed=seed).key] for seed in seeds])
        lines.append(f"| {row} | {_cells(losses, base)} | {run.rate:g} | {lam} | {switches} |")
    return lines


def _one_shot(pattern: str, dense: Run, results: Results, seeds: Sequence[int]) -> list[str]:
    """The dense runs, pruned at the end and not trained on."""
    losses = [float(results[replace(dense, seed=seed).key]["pruned"][pattern]) for seed in seeds]
    base = statistics.mean(_losses(dense, results, seeds))
    return [f"| dense, pruned at the end | {_cells(losses, base)} | {dense.rate:g} |  |  |"]


def _cells(losses: Sequence[float], base: float) -> str:
    mean, each = statistics.mean(losses), ", ".join(f"{loss:.4f}" for loss in losses)
    return f"{mean:.4f} ± {statistics.stdev(losses):.4f} | {mean - base:+.4f} | {each}"


def _switches(results: Sequence[Mapping[str, Any]]) -> str:
    """Steps of all switches, per seed where they differ, and the rule that fired."""
    found = {" and ".join(map(str, result["switch_steps"])) for result in results}
    rules = {event.split("; ")[1].split(":")[0] for result in results for event in result["switches"]}
    return ", ".join(sorted(found)) + (f" ({', '.join(sorted(rules))})" if rules else "")


def _grid(results: Results, rates: Sequence[float], lams: Sequence[float], seed: int) -> list[str]:
    head = " | ".join(f"rate {rate:g}" for rate in rates)
    lines = [f"| recipe | n:m | lam | {head} |", "|---|---|---|" + "---|" * len(rates)]
    for name, row in ROWS.items():
        for pattern in PATTERNS if row.masked else ("",):
            for lam in lams if row.has_lam else (None,):
                cells = [f"{results[Run(name, pattern, rate, lam, seed).key]['val_loss']:.4f}" for rate in rates]
                lines.append(f"| {name} | {pattern} | {'' if lam is None else f'{lam:g}'} | {' | '.join(cells)} |")
    return lines
