"""What we want the figures to be, so that a table says by itself what is reached and what is missed."""

from __future__ import annotations

from side_by_side import Row

MULTIPLY, US = "one multiply", "us a layer"

# Part, figure, unit: the bound, which is an upper one if it is positive and a lower one if it is negative.
AIMS: dict[tuple[str, str, str], float] = {
    ("masks", "2:4 magnitude_mask", MULTIPLY): 8,
    ("masks", "2:4 magnitude_mask, compiled", MULTIPLY): 3,
    ("masks", "1:8 magnitude_mask", MULTIPLY): 20,
    ("masks", "1:8 magnitude_mask, compiled", MULTIPLY): 8,
    ("masks", "1:16 magnitude_mask", MULTIPLY): 25,
    ("masks", "1:16 magnitude_mask, compiled", MULTIPLY): 10,
    ("optimizer", "phase II, compiled", "fused AdamW"): 0.8,
    ("optimizer", "phase II, eager", "foreach AdamW"): 0.25,
    ("training step", "GPT, phase I", "dense"): 1.01,
    ("training step", "GPT, phase II", "dense"): 1.03,
    ("training step", "GPT, SR-STE's reference", "phase II"): -1.25,
    ("peak memory", "GPT, phase I", "dense"): 1,
    ("peak memory", "GPT, phase II", "dense"): 1,
    ("layers", "phase I, over dense", US): 20,
    ("layers", "phase II, over dense", US): 20,
    ("import", "with lightning_step", "import lightning"): 1.05,
    ("bf16-mixed, compiled", "GPT-2 small, phase II", "dense"): 1,
}


def verdict(row: Row) -> str:
    """Whether a figure is what it should be.

    Args:
        row: The figure.

    Returns:
        The aim and how it went; empty where there is none.
    """
    aim = AIMS.get((row.part, row.what, row.of))
    if aim is None:
        return ""
    reached = row.value <= aim if aim > 0 else row.value >= -aim
    return f"at {'most' if aim > 0 else 'least'} {abs(aim):g}: {'reached' if reached else 'missed'}"
