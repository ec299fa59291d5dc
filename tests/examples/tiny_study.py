"""A study of a few steps a run, and results of it as the harness would write them."""

from __future__ import annotations

import json
from pathlib import Path

import training
from cells import Cell
from recipes_compared import ENTRIES
from studies import Part, Study
from tasks import CHAR, Grid

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "benchmarks"
TINY = CHAR.sized(
    name="tiny",
    model={"width": 8, "layers": 1, "heads": 2, "context": 8, "warmup": 1},
    data={"batch_size": 4, "context": 8, "batches": 2},
    steps=4,
    validate_every=2,
    adam=Grid((1e-3, 1e-2), (0.0, 1e-1)),
    sgd=Grid((1e-1,), (1e-3,)),
    pruned_to=("2:4", "1:8", "1:3"),  # nothing is a multiple of 3 wide
    batches=2,
)
BROKEN = TINY.sized(name="broken", model={"width": 8, "layers": 1, "heads": 3, "context": 8}, adam=Grid((1e-3,), ()))
STUDY = Study(
    (
        Part(TINY, ("dense", "SR-STE", "STEP"), ("2:4",), ("v not frozen", "lam 0.001", "dense, twice the steps")),
        Part(BROKEN, ("dense",)),
    ),
    seeds=(0, 1),
    finalists=1,
)


def cell(**changes: object) -> Cell:
    settings = {"task": TINY, "row": "SR-STE", "pattern": "2:4", "lr": 1e-2, "lam": 1e-3, "seed": 0, **changes}
    return Cell(**settings)


def line_of(row: str, seed: int, score: float, **changes: object) -> dict[str, object]:
    """A result as the harness writes it, made by hand."""
    setting = cell(**{"row": row, "seed": seed, "lam": None, "pattern": "2:4" if ENTRIES[row].masked else "", **changes})
    return {
        "key": setting.key,
        **json.loads(json.dumps(training.described(setting))),
        "loss": score,
        "scores": {"val_loss": score},
        "losses": [],
        "pruned": {},
        "switches": [],
        "switch_steps": [],
        "seconds": 36.0,
        "versions": {"torch": "1"},
        "machine": "a machine",
        "commit": "c" * 40,
        "changed": False,
        "finished": "2026-01-01T00:00:00+00:00",
    }
