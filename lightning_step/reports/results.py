"""Results of a benchmark: one JSON object a line, one line a run.

.. code-block:: text

    recipe     string   how masks were learned: dense, ASP, SR-STE, STEP; the legend of a figure
    n, m       integers the pattern; null or absent where there were no masks
    loss       number   at the end, lower is better; NaN where the run broke down
    seed       integer  0 if absent; runs that differ in it alone are averaged
    lr         number   learning rate; tuned for each recipe and pattern, see `best_cells`
    lam        number   strength of the SR-STE term, or null; tuned, too
    optimizer  string   a panel of its own in the figure of losses; absent: Adam
    switch     number   the fraction of the run at which it was forced to switch; null where it was not forced
    frozen     boolean  whether the second moment was frozen with masks on; null where the recipe decides
    change     string   what else differs from the recipe; such runs are in no figure of recipes
    losses     list     [optimizer step, validation loss] pairs over time

Other fields may be there and are not read.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_step.errors import FileFormatError, PatternError
from lightning_step.figures import Curve
from lightning_step.pattern import NMPattern

__all__ = ["Cell", "Result", "best_cells", "read_results"]

KeyT = TypeVar("KeyT", bound=Hashable)


class Result(NamedTuple):
    """One run of a benchmark; see the head of this file for what the fields mean.

    Example:
        >>> str(Result("STEP", NMPattern(2, 4), 1.41).pattern)
        '2:4'
    """

    recipe: str
    pattern: NMPattern | None
    loss: float
    seed: int = 0
    lr: float | None = None
    lam: float | None = None
    optimizer: str = "Adam"
    switch: float | None = None
    frozen: bool | None = None
    change: str | None = None
    losses: Curve = Curve((), ())


class Cell(NamedTuple):
    """The best setting of what is compared, over its seeds.

    Example:
        >>> best_cells([Result("STEP", None, 1.0 + seed, seed) for seed in (0, 1)], lambda run: run.recipe)["STEP"].mean
        1.5
    """

    mean: float
    spread: float  # standard deviation over the seeds; 0 for a single one
    runs: Sequence[Result]  # one per seed
    settings: int  # how many were tried, of which this is the best


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read a file of results.

    Args:
        path: JSON lines; empty lines are passed over.

    Returns:
        One result for each line.

    Raises:
        FileFormatError: If it cannot be read, holds no result, or a line is none; the error names the line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "results.jsonl"
        >>> _ = file.write_text('{"recipe": "STEP", "n": 2, "m": 4, "seed": 1, "loss": 1.41}')
        >>> read_results(file)[0].loss
        1.41
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no text, or a null byte in the name
        raise FileFormatError(
            f"Expected a file of JSON lines, but got {str(path)!r}: {getattr(error, 'strerror', None) or error}."
        ) from error
    results = [_result(line, f"line {i} of {str(path)!r}") for i, line in enumerate(lines, 1) if line.strip()]
    if not results:
        raise FileFormatError(f"Expected a JSON object a line in {str(path)!r}, but got an empty file.")
    return results


def best_cells(results: Iterable[Result], key: Callable[[Result], KeyT]) -> dict[KeyT, Cell]:
    """Tune learning rate and lam for each thing that is compared: of its settings with the most seeds, the best.

    A grid is often on one seed and its best settings on several; a single lucky seed must not win over a mean.

    Args:
        results: All runs.
        key: What is compared: two runs of the same key differ in seed, lr and lam alone.

    Returns:
        A cell for each key with a setting whose losses are all finite.

    Example:
        >>> runs = [Result("STEP", None, loss, seed, lr) for loss, seed, lr in ((1.0, 0, 0.1), (1.5, 0, 0.2), (1.3, 1, 0.2))]
        >>> best_cells(runs, lambda result: result.recipe)["STEP"].runs[0].lr
        0.2
    """
    grouped: dict[KeyT, dict[tuple[float | None, float | None], dict[int, Result]]] = {}
    for result in results:
        grouped.setdefault(key(result), {}).setdefault((result.lr, result.lam), {})[result.seed] = result
    cells = {}
    for name, settings in grouped.items():
        most = max(len(seeds) for seeds in settings.values())
        tried = [[*seeds.values()] for seeds in settings.values() if len(seeds) == most]
        sound = [runs for runs in tried if all(math.isfinite(run.loss) for run in runs)]
        if sound:
            best = min(sound, key=lambda runs: statistics.mean(run.loss for run in runs))
            losses = [run.loss for run in best]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells[name] = Cell(statistics.mean(losses), spread, best, len(settings))
    return cells


def _result(line: str, where: str) -> Result:
    try:
        body = json.loads(line)
        if not isinstance(body, dict):
            raise TypeError("it is no object")
        n, m = body.get("n"), body.get("m")
        if (n is None) != (m is None):
            raise TypeError(f"n is {n!r} and m is {m!r}")
        return Result(
            recipe=_of(str, body, "recipe"),
            pattern=None if n is None or m is None else NMPattern(n, m),
            loss=float(_of((int, float), body, "loss")),
            seed=_of(int, body, "seed", 0),
            lr=_of((int, float), body, "lr", None),
            lam=_of((int, float), body, "lam", None),
            optimizer=_of(str, body, "optimizer", "Adam"),
            switch=_of((int, float), body, "switch", None),
            frozen=_of(bool, body, "frozen", None),
            change=_of(str, body, "change", None),
            losses=_curve(body.get("losses") or []),
        )
    except (ValueError, TypeError, KeyError, RecursionError, PatternError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)[:300]
        raise FileFormatError(
            f"Expected a result as JSON, with a recipe (string) and a loss (number) at least, but got {line[:80]!r} in "
            f"{where}: {reason}."
        ) from error


def _of(kind: Any, body: dict[str, Any], name: str, *default: Any) -> Any:
    value = body[name] if not default else body.get(name, default[0])
    if value is None and default:
        return default[0]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r}")
    return value


def _curve(pairs: Any) -> Curve:
    points = {int(step): float(loss) for step, loss in pairs}
    return Curve(tuple(sorted(points)), tuple(points[step] for step in sorted(points)))
