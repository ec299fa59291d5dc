"""The end table: what training left of every kind of layer, and why it switched when it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_step.functional import density_update, kept_magnitude_update
from lightning_step.sharding import any_sharded, local, shards
from lightning_step.sparsifier import Sparsifier
from lightning_step.summary import Section, Sheet, family

__all__ = ["sheet_of_outcome"]


@dataclass
class _Row:
    """Sums over tensors of one kind."""

    on: bool
    names: list[str] = field(default_factory=list)
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))  # see `_counts`
    flipped: float = 0.0
    measured: float = 0.0

    @property
    def density(self) -> float:
        ones, entries = self.counts[:2].tolist()
        return float(ones / entries) if self.on else 1.0

    def cells(self) -> tuple[str, ...]:
        kept, magnitude = self.counts[2:].tolist()
        return (
            _percent(self.density),
            _percent(kept / magnitude if magnitude else 0.0),
            _percent(self.flipped / self.measured, 3) if self.measured else "",
            str(len(self.names)),
        )


def sheet_of_outcome(sparsifiers: Sequence[Sparsifier]) -> Sheet:
    """Lay out what training left. Under FSDP2 every process has to call this.

    Args:
        sparsifiers: One per optimizer that holds masked tensors.

    Returns:
        A table with n:m, density, kept magnitude and the flip rate measured last, and below it what switched when and why.

    Example:
        >>> from torch import nn
        >>> from lightning_step import STE
        >>> model = nn.Linear(4, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> print(sheet_of_outcome([Sparsifier(model, optimizer, 2, 4, recipe=STE())]))
        0 optimizer steps, masks on: 2 of 4 weights in 1 tensor are kept
        masked  layer   n:m  density  kept |w|  tensors
        weight  Linear  2:4   50.0 %    70.0 %        1
        optimizer step 0: masks on (1 tensor); fixed step reached: step 0
    """
    rows = _rows(sparsifiers)
    header = ("masked", "layer", "n:m", "density", "kept |w|", "flip rate", "tensors")
    table: list[tuple[str, ...]] = [header]
    for (shared, kind, pattern, _), row in rows.items():
        table.append((shared if len(row.names) > 1 else row.names[0], kind, pattern, *row.cells()))
    if not any(row.measured for row in rows.values()):
        table = [(*cells[:5], cells[6]) for cells in table]
    section = Section(tuple(table), right=tuple(range(3, len(table[0]))))
    return Sheet(_head(sparsifiers, list(rows.values())), (section,), tuple(_reasons(sparsifiers)))


def _head(sparsifiers: Sequence[Sparsifier], rows: Sequence[_Row]) -> str:
    taken = [sparsifier.t for sparsifier in sparsifiers]
    steps = f"{' and '.join(f'{t:,}' for t in taken)} optimizer step{'s' * (taken != [1])}"
    if not any(row.on for row in rows):
        return f"{steps}, masks never came on"
    # Shapes of whole tensors: what is counted may be weighed by the number of processes.
    sizes = {target.name: math.prod(target.shape) for s in sparsifiers for target in s.targets.masked}
    shares = {name: row.density for row in rows for name in row.names}
    kept = sum(round(size * shares[name]) for name, size in sizes.items())
    tensors = f"{len(sizes)} tensor{'s' * (len(sizes) != 1)}"
    phase = "masks on" if all(row.on for row in rows) else "masks on in part"
    return f"{steps}, {phase}: {kept:,} of {sum(sizes.values()):,} weights in {tensors} are kept"


def _reasons(sparsifiers: Sequence[Sparsifier]) -> list[str]:
    lines = []
    for i, sparsifier in enumerate(sparsifiers):
        whose = f"optimizer {i}, " if len(sparsifiers) > 1 else ""
        if not sparsifier.masks.enabled:
            lines.append(f"{whose}masks off: kept |w| is what they would keep")
        lines += [f"{whose}{event}" for event in sparsifier.events]
    return lines


def _rows(sparsifiers: Sequence[Sparsifier]) -> dict[tuple[str, str, str, bool], _Row]:
    rows: dict[tuple[str, str, str, bool], _Row] = {}
    for sparsifier in sparsifiers:
        on, counts, now = sparsifier.masks.enabled, _counts(sparsifier), sparsifier.masks.state_dict()["now"]
        for target in sparsifier.targets.masked:
            n, m = now[target.name]
            row = rows.setdefault((family(target.name), target.kind, f"{n}:{m}", on), _Row(on))
            row.names.append(target.name)
            row.counts += counts[target.name]
            rate, size = sparsifier.masks.flip_rates.get(target.name), math.prod(target.shape)
            if rate is not None:
                row.flipped, row.measured = row.flipped + rate * size, row.measured + size
    return rows


@torch.no_grad()
def _counts(sparsifier: Sparsifier) -> dict[str, torch.Tensor]:
    """Ones and entries of every mask, kept and whole magnitude of every tensor; each maybe times the number of processes."""
    table = []
    for name, parameter in sparsifier.masks.parameters.items():
        mask = sparsifier.masks.mask_of(name)
        counted = torch.cat([density_update(mask), kept_magnitude_update(local(parameter), mask)])
        table.append(counted * shards(parameter))
    sums = torch.stack([row.to(table[0].device) for row in table])
    if any_sharded(sparsifier.masks.parameters.values()):
        sums = sparsifier.reduce(sums)
    return dict(zip(sparsifier.masks.parameters, sums.cpu(), strict=True))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
