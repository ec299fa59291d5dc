"""Which runs a benchmark consists of, and which of them are known already.

Every row is tuned on the first seed, over the whole grid of its task. Its best settings there, `Study.finalists` of them,
are repeated on the other seeds, and the one with the best mean is its result. Then one thing at a time is changed in it.
Rows that are not tuned are run at the rate that is best for dense training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from cells import Cell
from recipes_compared import AT_ONCE, CHANGES, DEFAULT, ENTRIES, FROM_START, ROWS
from tasks import (
    CHAR,
    CHAR_TUNED,
    CIFAR10,
    CIFAR10_GPU,
    CIFAR10_TUNED,
    DIGITS,
    MULTI30K,
    MULTI30K_TUNED,
    SST2,
    SST2_TUNED,
    WIKITEXT,
    WIKITEXT_GPU,
    WIKITEXT_TUNED,
    Grid,
    Task,
)

Lines = Mapping[str, Mapping[str, Any]]  # results by key


@dataclass(frozen=True)
class Part:
    """One task of a study.

    Args:
        task: Which one.
        rows: Names in `ROWS`.
        patterns: For every row that has masks.
        changes: Names in `CHANGES`; the rows that they change have to be in ``rows``.
        changes_at: The pattern at which things are changed.
        seeds: Other seeds than those of the study; the grid is on the first.
    """

    task: Task
    rows: tuple[str, ...]
    patterns: tuple[str, ...] = ("2:4", "1:8")
    changes: tuple[str, ...] = ()
    changes_at: str = "2:4"
    seeds: tuple[int, ...] | None = None

    def seeds_of(self, study: Study) -> tuple[int, ...]:
        """Its own, or those of its study."""
        return self.seeds or study.seeds

    def groups(self, *, untuned: bool = False) -> list[tuple[str, str]]:
        """Row and pattern of everything that is tuned by itself, or of everything that is not."""
        rows = [row for row in self.rows if ROWS[row].untuned == untuned]
        return [(row, pattern) for row in rows for pattern in (self.patterns if ROWS[row].masked else ("",))]

    def grid(self, row: str, pattern: str, seed: int) -> list[Cell]:
        """Every rate, and every lam for a row that has one."""
        entry = ROWS[row]
        grid = self.task.grid(entry.optimizer)
        lams = grid.lams if entry.has_lam else (None,)
        return [Cell(self.task, row, pattern, rate, lam, seed) for rate, lam in product(grid.rates, lams)]


@dataclass(frozen=True)
class Study:
    """A benchmark.

    Args:
        parts: Its tasks.
        seeds: The grid is on the first.
        finalists: How many settings of each row are repeated on the other seeds.
    """

    parts: tuple[Part, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    finalists: int = 2

    def only(self, names: Sequence[str]) -> Study:
        """Some of its tasks."""
        return replace(self, parts=tuple(part for part in self.parts if part.task.name in names))

    def sown(self, seeds: tuple[int, ...]) -> Study:
        """With other seeds, in all of its parts."""
        return replace(self, seeds=seeds, parts=tuple(replace(part, seeds=None) for part in self.parts))

    def count(self) -> int:
        """How many runs it is in all."""
        total = 0
        for part in self.parts:
            seeds = part.seeds_of(self)
            for row, pattern in part.groups():
                size = len(part.grid(row, pattern, seeds[0]))
                total += size + min(self.finalists, size) * (len(seeds) - 1)
            total += (len(part.changes) + len(part.groups(untuned=True))) * len(seeds)
        return total

    def cells(self, done: Lines) -> list[Cell]:
        """Every run that is known: the grids, then what follows from those that are complete; whatever order they came in.

        Args:
            done: The results so far.

        Returns:
            The runs in the order in which to start them, those that are done among them.
        """
        stages: tuple[list[Cell], list[Cell], list[Cell]] = ([], [], [])
        for part in self.parts:
            best: dict[tuple[str, str], Cell] = {}
            first, *others = part.seeds_of(self)
            for row, pattern in part.groups():
                grid = part.grid(row, pattern, first)
                short = self.shortlist(grid, done)
                repeated = [replace(cell, seed=seed) for cell in short for seed in others]
                stages[0].extend(grid)
                stages[1].extend(repeated)
                if short and all(cell.key in done for cell in repeated):
                    best[row, pattern] = min(short, key=lambda cell: mean(cell, (first, *others), done))
            stages[2].extend(self.untuned(part, best))
            stages[2].extend(self.changed(part, best))
        return [cell for stage in stages for cell in stage]

    def shortlist(self, grid: Sequence[Cell], done: Lines) -> list[Cell]:
        """The best settings of a grid, best first; none before it is complete."""
        if any(cell.key not in done for cell in grid):
            return []
        return sorted(grid, key=lambda cell: cost(done[cell.key]))[: self.finalists]

    def untuned(self, part: Part, best: Mapping[tuple[str, str], Cell]) -> Iterator[Cell]:
        """Rows that take the rate of dense training, on every seed."""
        dense = best.get(("dense", ""))
        if dense is not None:
            for row, pattern in part.groups(untuned=True):
                yield from (Cell(part.task, row, pattern, dense.lr, None, seed) for seed in part.seeds_of(self))

    def changed(self, part: Part, best: Mapping[tuple[str, str], Cell]) -> Iterator[Cell]:
        """One thing changed in the best setting of a row, on every seed."""
        for row in part.changes:
            of = CHANGES[row].of or "STEP"
            base = best.get((of, part.changes_at if ENTRIES[of].masked else ""))
            if base is not None:
                yield from (replace(base.changed(row), seed=seed) for seed in part.seeds_of(self))


def mean(cell: Cell, seeds: Sequence[int], done: Lines) -> float:
    """Mean cost of a setting over some seeds."""
    return statistics.mean(cost(done[replace(cell, seed=seed).key]) for seed in seeds)


def cost(line: Mapping[str, Any]) -> float:
    """What rate and lam are chosen by, as a number of which less is better; a run that broke down is worst."""
    value = float(line["scores"].get(line["metric"]["chosen_by"], math.nan))
    if not math.isfinite(value):
        return math.inf
    return -value if line["metric"]["higher_is_better"] else value


UNTUNED = tuple(row for row, entry in ROWS.items() if entry.untuned)
IN_DEFAULT = ("default, v live", "default, no scaled rate", "default, root of m/n")
COMPARED = ("dense", "ASP", "SR-STE", "STEP", FROM_START, DEFAULT)
OF_TODAY = tuple(row for row, entry in CHANGES.items() if entry.of != AT_ONCE)
AS_THEY_COME = tuple(row for row in UNTUNED if AT_ONCE not in row)
OF_PEERS = tuple(f"{row}, untuned" for row in (DEFAULT, "SR-STE", "ASP"))
MAIN_ROWS = ("dense", "ASP", "STE", "SR-STE", "STEP, as in the paper", DEFAULT, *AS_THEY_COME)
GPU_ROWS = tuple(row for row in MAIN_ROWS if row != "STE")
QUICK_ROWS = ("dense", "ASP", "SR-STE", "STEP", DEFAULT, f"{DEFAULT}, untuned")

COMPARE = Study(
    parts=(
        Part(
            CHAR.sized(pruned_to=("2:4", "1:8")),
            rows=COMPARED,
            changes=(
                "switch at 10 %",
                "switch at 30 %",
                "v frozen for all parameters",
                "the usual lam, 2e-4",
                "the paper's preconditioner",
                "no bound on the step",
                "v not frozen",
                "no masks, v frozen",
            ),
        ),
    )
)

QUICK = Study(
    parts=(
        Part(
            CHAR.sized(
                model={"width": 32, "layers": 2, "heads": 2, "context": 32, "warmup": 10},
                data={"batch_size": 8, "context": 32, "batches": 100},
                steps=200,
                batches=64,
                pruned_to=("2:4",),
                adam=Grid((8e-3, 1.6e-2), (4e-3, 3e-2)),
            ),
            rows=QUICK_ROWS,
            patterns=("2:4",),
            changes=("v not frozen",),
        ),
        Part(
            DIGITS.sized(
                model={"network": "resnet18", "size": "tiny", "dataset": "digits"},
                steps=200,
                pruned_to=("2:4",),
                adam=Grid((4e-3, 1.6e-2), (4e-3, 3e-2)),
            ),
            rows=QUICK_ROWS,
            patterns=("2:4",),
        ),
    ),
    finalists=1,
)

MAIN = Study(
    parts=(
        Part(CHAR, rows=(*COMPARED, AT_ONCE, "STEP, as in the paper", *UNTUNED), changes=tuple(CHANGES)),
        Part(CHAR, rows=("STE", "SR-STE, SGD", "dense, SGD"), patterns=("2:4",)),  # beside the rows above
        Part(CHAR, rows=("ASP", "SR-STE", DEFAULT), patterns=("1:4", "1:16")),
        Part(CHAR_TUNED, rows=("dense", "ASP", "STE", "SR-STE", "STEP", DEFAULT, *AS_THEY_COME), changes=OF_TODAY),
        Part(CHAR_TUNED, rows=("SR-STE, SGD", "dense, SGD"), patterns=("2:4",)),
        Part(CHAR_TUNED, rows=("ASP", "SR-STE", DEFAULT), patterns=("1:4", "1:16")),
        # Three seeds left differences open that had the same sign in all of them.
        Part(
            CHAR_TUNED,
            rows=("dense", "ASP", "SR-STE", DEFAULT, *OF_PEERS),
            patterns=("2:4", "1:4", "1:8", "1:16"),
            seeds=tuple(range(6)),
        ),
        *(
            Part(task, rows=MAIN_ROWS, changes=("dense, twice the steps", *IN_DEFAULT))
            for task in (WIKITEXT_TUNED, CIFAR10_TUNED, SST2_TUNED, MULTI30K_TUNED)
        ),
        *(
            Part(task.sized(adam=Grid((1e-3, 2e-3, 4e-3, 8e-3), (4e-3, 3e-2))), rows=("dense", *OF_PEERS))
            for task in (CIFAR10, MULTI30K, SST2, WIKITEXT)
        ),
    ),
)

GPU = Study(
    parts=(
        Part(CIFAR10_GPU, rows=GPU_ROWS, patterns=("2:4", "1:4", "1:8", "1:16")),
        Part(WIKITEXT_GPU, rows=GPU_ROWS),
    ),
    finalists=1,
)

STUDIES = {"compare": COMPARE, "quick": QUICK, "main": MAIN, "gpu": GPU}
