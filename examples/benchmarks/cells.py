"""One run of a benchmark: what it depends on, and the key that is made of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from recipes_compared import ENTRIES, Entry
from tasks import Task

from lightning_step.recipes import describe


@dataclass(frozen=True)
class Cell:
    """One setting of one row, for one seed."""

    task: Task
    row: str
    pattern: str  # "2:4"; "" where there are no masks
    lr: float
    lam: float | None
    seed: int

    @property
    def entry(self) -> Entry:
        """The row's recipe, and what else belongs to it."""
        return ENTRIES[self.row]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.task.steps * self.entry.steps

    @property
    def sizes(self) -> tuple[int, int] | tuple[None, None]:
        """The two numbers of the pattern."""
        if not self.pattern:
            return None, None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    def config(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain values; the recipe with every default it has today."""
        n, m = self.sizes
        entry = self.entry
        config = {
            "task": {**self.task.config(), "steps": self.steps},
            "row": self.row,
            "recipe": describe(entry.make(self.lam or 0.0)),
            "optimizer": entry.optimizer,
            "n": n,
            "m": m,
            "lr": self.lr,
            "lam": self.lam,
            "seed": self.seed,
        }
        return dict(json.loads(json.dumps(config)))  # as it is read back: a tuple would differ from its list

    @property
    def key(self) -> str:
        """Hash of `config`."""
        return key_of(self)

    def changed(self, row: str) -> Cell:
        """The same setting with another row, which may set a lam of its own."""
        lam = ENTRIES[row].lam
        return replace(self, row=row, lam=self.lam if lam is None else lam)

    def __str__(self) -> str:
        lam = "" if self.lam is None else f", lam {self.lam:g}"
        return f"{self.task.name}, {self.row}{self.pattern and f' {self.pattern}'}, rate {self.lr:g}{lam}, seed {self.seed}"


@cache
def key_of(cell: Cell) -> str:
    """Worked out once for each: a study asks for all its keys again and again."""
    return hash_of(cell.config())


def hash_of(config: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of what is the same for equal settings, in whatever order they are written."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
