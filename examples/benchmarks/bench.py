"""Recipes compared: tasks x recipes x n:m x seeds, every recipe at its own best rate and lam, all with the same steps.

``python examples/benchmarks/bench.py quick`` (`make bench-quick`) takes minutes, ``main`` (`make bench`) hours. Interrupt it
and call it again to go on; a finished run is never run twice. With ``--budget-minutes`` it stops by itself. Results are
lines of ``cells.jsonl`` in ``--out``; at the end, and with ``--table``, the tables are made of these lines anew:
``results.md``, ``results.json``, and for every task a file that ``lightning-step figure`` draws. A task without its data is
left out; what to fetch is said.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from report import write_report
from running import Run, duration, opened, read_lines
from studies import STUDIES, Study

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and report."""
    arguments = parser().parse_args(argv)
    out = arguments.out or HERE / "results" / arguments.study
    lines = out / "cells.jsonl"
    if not arguments.table:
        study = STUDIES[arguments.study]
        study = study.only(arguments.tasks.split(",")) if arguments.tasks else study
        if arguments.seeds:
            study = study.sown(tuple(range(arguments.seeds)))
        complete = run(study, lines, arguments)
    elif not lines.exists():
        raise SystemExit(f"Expected results in {lines}, but got no such file. Call it without --table first.")
    else:
        complete = True
    results = read_lines(lines)
    if results:
        print(write_report(out, results))
    sys.exit(0 if complete else 1)


def run(study: Study, lines: Path, arguments: argparse.Namespace) -> bool:
    """All that can be run here; whether nothing failed."""
    missing = {part.task.name: part.task.missing(arguments.data) for part in study.parts}
    for name, why in missing.items():
        if why:
            print(f"skipped {name}: {why}", flush=True)
    study = study.only([name for name, why in missing.items() if not why])
    for part in study.parts:
        part.task.make_data(arguments.data, 0).prepare_data()  # once, before several workers would at a time
    budget = None if arguments.budget_minutes is None else 60 * arguments.budget_minutes
    with opened(lines) as book:
        benchmark = Run(study, book, arguments.data, arguments.workers, budget)
        needed = study.count()
        there = len({cell.key for cell in study.cells(book.lines)} & book.lines.keys())
        print(f"{needed} runs, {there} there already", flush=True)
        try:
            benchmark.go()
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept, call it again to go on", file=sys.stderr, flush=True)
            os._exit(130)  # without waiting for the workers, which end when this does
    if benchmark.failed:
        print(f"{len(benchmark.failed)} runs failed: {'; '.join(benchmark.failed.values())}", file=sys.stderr)
    if not benchmark.in_time:
        print(f"stopped after {duration(benchmark.budget or 0)}; call it again to go on", flush=True)
    return not benchmark.failed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("study", choices=STUDIES, help="which benchmark")
    made.add_argument("--data", type=Path, default=Path("data"), help="folder with the data of the tasks")
    made.add_argument("--out", type=Path, help="folder of the results (default: results/STUDY beside this file)")
    made.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    made.add_argument("--budget-minutes", type=float, help="start no run that would not end by then")
    made.add_argument("--tasks", help="only these, separated by commas")
    made.add_argument("--seeds", type=int, help="how many seeds, from 0 on")
    made.add_argument("--table", action="store_true", help="only make the tables anew")
    return made


if __name__ == "__main__":
    main()
