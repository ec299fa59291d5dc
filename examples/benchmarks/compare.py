"""Dense, ASP, SR-STE and STEP on the demo task: equal steps, each at its own best rate and lam, three seeds, 2:4 and 1:8.

``python examples/benchmarks/compare.py`` runs one common grid on seed 0, repeats the two best settings of each row on the
other seeds and keeps the one with the lowest mean, then changes one thing at a time in STEP at its 2:4 setting. Every
finished run is kept as JSON in ``--out``: interrupt it and call it again to go on. At the end ``results.json`` and
``results.md`` are written there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes_compared import ABLATIONS, PATTERNS, ROWS
from report import best_on_average, best_on_one_seed, write_results
from training import TASK, Run, quiet, train

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
LAMS = (4e-3, 1.6e-2, 6.4e-2)
SEEDS = (0, 1, 2)
FINALISTS = 2

Results = dict[str, dict[str, Any]]


def cells() -> list[tuple[str, str]]:
    """Row and pattern of every cell that is tuned by itself."""
    return [(row, pattern) for row, what in ROWS.items() for pattern in (PATTERNS if what.masked else ("",))]


def grid(row: str, pattern: str, seed: int) -> list[Run]:
    """Every rate, and every lam for a row that has one."""
    lams = LAMS if ROWS[row].has_lam else (None,)
    return [Run(row, pattern, rate, lam, seed) for rate in RATES for lam in lams]


def main() -> None:
    """Run what is not there yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("examples/benchmarks/results/compare"))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    runs_folder = args.out / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)

    # 1. The grid, on seed 0.
    results = execute([run for cell in cells() for run in grid(*cell, SEEDS[0])], runs_folder, args.processes)
    # 2. One seed is too little to choose by: the two best settings of each row, on the other seeds too.
    shortlist = {cell: best_on_one_seed(*cell, results, FINALISTS) for cell in cells()}
    repeated = [replace(run, seed=seed) for runs in shortlist.values() for run in runs for seed in SEEDS[1:]]
    results |= execute(repeated, runs_folder, args.processes)
    best = {cell: best_on_average(runs, results, SEEDS) for cell, runs in shortlist.items()}
    # 3. One thing changed at a time, at STEP's setting.
    changed = [replace(best["STEP", PATTERNS[0]], row=row, seed=seed) for row in ABLATIONS for seed in SEEDS]
    results |= execute(changed, runs_folder, args.processes)

    table = write_results(args.out, results, best, RATES, LAMS, SEEDS, args.processes)
    print(table)


def execute(runs: Sequence[Run], folder: Path, processes: int) -> Results:
    """Train what has no result yet, several at a time, and say how far it is."""
    results: Results = {}
    for run in runs:
        path = folder / f"{run.key}.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["task"] == TASK:  # else: of other steps or another model, train anew
                results[run.key] = result
    missing = [run for run in runs if run.key not in results]
    print(f"{len(runs)} runs, {len(results)} there already", flush=True)
    started = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=quiet) as pool:
        futures = {pool.submit(train, run): run for run in missing}
        for done, future in enumerate(as_completed(futures), start=1):
            run, result = futures[future], future.result()
            (folder / f"{run.key}.json").write_text(json.dumps(result, indent=1) + "\n")
            results[run.key] = result
            left = (time.monotonic() - started) / done * (len(missing) - done) / 60
            switch = f", {result['switches'][-1]}" if result["switches"] else ""
            print(f"[{done}/{len(missing)}, {left:.0f} min left] {run.key}: {result['val_loss']:.4f}{switch}", flush=True)
    return results


if __name__ == "__main__":
    main()
