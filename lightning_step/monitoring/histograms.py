"""Histograms over magnitudes, counted on the device, with the same bins for every tensor, process and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_step.monitoring.measure import looks, sum_over_parts
from lightning_step.sparsifier import Sparsifier

__all__ = ["Bins", "Histogram", "histograms"]

_AT_ONCE = 1 << 22  # elements; larger tensors are counted part by part, to need little memory


@dataclass(frozen=True)
class Bins:
    """Bins of equal width in the logarithm. What lies outside is counted in the first or the last.

    Args:
        low: Decimal logarithm of the first edge.
        per_decade: Bins per factor of ten.
        number: Number of bins.

    Example:
        >>> [round(edge, 3) for edge in Bins(-2, 2, 4).edges()]
        [-2.0, -1.5, -1.0, -0.5, 0.0]
    """

    low: float
    per_decade: int
    number: int

    def edges(self) -> list[float]:
        """Where bins begin and end.

        Returns:
            One more than there are bins, in decimal logarithms.
        """
        return [self.low + i / self.per_decade for i in range(self.number + 1)]

    def place(self, magnitudes: Tensor) -> Tensor:
        """The bin of every element.

        Args:
            magnitudes: Not negative, any float dtype. NaN goes to the last bin.

        Returns:
            Same shape, int32.
        """
        places = ((magnitudes.float().log10() - self.low) * self.per_decade).floor_().clamp_(0, self.number - 1)
        return places.nan_to_num_(nan=self.number - 1).int()


V_BINS = Bins(-40, 5, 240)
WEIGHT_BINS = Bins(-8, 20, 240)


class Histogram(NamedTuple):
    """Counts between edges.

    Example:
        >>> Histogram("v", "fc.weight", [0.0, 1.0, 2.0], [3, 4]).counts
        [3, 4]
    """

    kind: str  # "v", "kept" or "pruned"
    name: str  # of the masked tensor
    edges: list[float]  # one more than counts
    counts: list[int]


@torch.no_grad()
def histograms(sparsifier: Sparsifier) -> list[Histogram]:
    """Of every masked tensor: log10 of v, and the magnitudes of what its mask keeps and prunes.

    Under FSDP2 every process has to call this.

    Args:
        sparsifier: The driver of one optimizer.

    Returns:
        Histograms that hold something.

    Example:
        >>> from lightning_step import Dense
        >>> model = torch.nn.Linear(8, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=Dense())
        >>> [(each.kind, each.name, each.counts) for each in histograms(sparsifier)]
        [('kept', 'weight', [16]), ('pruned', 'weight', [16])]
    """
    rows, spread, names = [], [], []
    for look in looks(sparsifier):
        weight = _counted(WEIGHT_BINS, look.weight.abs(), sparsifier.masks.mask_of(look.name))
        v = weight.new_zeros(V_BINS.number) if look.v is None else _counted(V_BINS, look.v).to(weight.device)
        rows.append(torch.cat([v, weight]).double())
        spread.append(look.shards)
        names.append(look.name)
    table = sum_over_parts(sparsifier, torch.stack([row.to(rows[0].device) for row in rows]), spread).tolist()
    return [each for name, row in zip(names, table, strict=True) for each in _trimmed(name, row)]


def _counted(bins: Bins, magnitudes: Tensor, mask: Tensor | None = None) -> Tensor:
    """Counts per bin; with a mask, those of what it keeps, and behind them those of what it prunes."""
    total = bins.number * (1 if mask is None else 2)
    counts = torch.zeros(total, dtype=torch.int64, device=magnitudes.device)
    flat, kept = magnitudes.reshape(-1), None if mask is None else mask.reshape(-1)
    for begin in range(0, flat.numel(), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        places = bins.place(flat[part])
        if kept is not None:
            places += bins.number * ~kept[part]
        # Without weights this is exact and deterministic on a GPU too, which histc is not.
        counts += torch.bincount(places, minlength=total)
    return counts


def _trimmed(name: str, row: Sequence[float]) -> Iterator[Histogram]:
    weight_edges = [10**edge for edge in WEIGHT_BINS.edges()]
    kinds = (("v", V_BINS.edges()), ("kept", [0.0, *weight_edges[1:]]), ("pruned", [0.0, *weight_edges[1:]]))
    rest = iter(row)
    for kind, edges in kinds:
        counts = [round(next(rest)) for _ in edges[1:]]
        filled = [i for i, count in enumerate(counts) if count]
        if filled:
            first, last = filled[0], filled[-1]
            yield Histogram(kind, name, edges[first : last + 2], counts[first : last + 1])
