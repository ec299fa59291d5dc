r"""Which n each layer gets, when all of them share one budget.

Every form works on the steps between neighbouring choices of n, for instance from 2:8 to 4:8 of one layer. What a layer
costs is what it keeps, times how often its weights are used; what a step is worth differs from form to form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_step.functional.mask import as_groups
from lightning_step.pattern import NMPattern

__all__ = [
    "Layer",
    "choices_of",
    "cost",
    "erk_allocation",
    "magnitude_allocation",
    "order_statistics",
    "search_allocation",
]


class Layer(NamedTuple):
    """What an allocation may know of one layer.

    Example:
        >>> cost(Layer((4, 8), NMPattern(2, 4)), 1)
        8.0
    """

    shape: tuple[int, ...]
    pattern: NMPattern  # m stays; n may be another
    uses: float = 1.0  # of every weight in one forward pass; 1 where weights are counted, not multiplications
    magnitudes: tuple[float, ...] = ()  # sum over groups of the k-th largest magnitude, k = 1 ... m
    squares: tuple[float, ...] = ()  # the same of its square


def order_statistics(weight: Tensor, pattern: NMPattern, dim: int = -1) -> Tensor:
    r"""Sums over all groups of the k-th largest magnitude, and of its square, for every place k.

    .. math:: A_k = \sum_G |w|_{G,(k)}, \qquad B_k = \sum_G |w|^2_{G,(k)}, \qquad |w|_{G,(1)} \ge \dots \ge |w|_{G,(m)}

    n:m keeps the first n places of every group, so that these sums say what any n keeps and what it drops. They may be
    added over parts of a tensor.

    Args:
        weight: Any float dtype, shape ``(..., k*m, ...)``. NaN counts as 0.
        pattern: The n:m pattern; only ``m`` is used.
        dim: The dimension that holds the groups.

    Returns:
        Shape ``(2, m)``, float64.

    Example:
        >>> order_statistics(torch.tensor([1., -3., 0., 2.]), NMPattern(1, 2)).tolist()
        [[5.0, 1.0], [13.0, 1.0]]
    """
    groups = as_groups(torch.nan_to_num(weight.detach().abs().float()), pattern, dim)
    place = dim % weight.dim() + 1
    ranked = groups.sort(dim=place, descending=True).values.movedim(place, -1).reshape(-1, pattern.m)
    return torch.stack([ranked.sum(0, dtype=torch.float64), ranked.double().square().sum(0)])


def choices_of(pattern: NMPattern) -> tuple[int, ...]:
    """The n a layer may get: powers of two, the one it has, and m, which keeps all of it.

    Args:
        pattern: The n:m it has.

    Returns:
        Rising.

    Example:
        >>> choices_of(NMPattern(3, 8))
        (1, 2, 3, 4, 8)
    """
    powers = (1 << i for i in range(pattern.m.bit_length()))
    return tuple(sorted({n for n in powers if n <= pattern.m} | {pattern.n, pattern.m}))


def cost(layer: Layer, n: int) -> float:
    """What a layer costs at ``n``: weights kept, times uses.

    Args:
        layer: The layer.
        n: Weights kept in every group.

    Returns:
        The cost.

    Example:
        >>> cost(Layer((4, 8), NMPattern(2, 4), uses=10.0), 2)
        160.0
    """
    return math.prod(layer.shape) // layer.pattern.m * n * layer.uses


def erk_allocation(layers: Sequence[Layer], budget: float) -> list[NMPattern]:
    r"""Small layers stay denser: the density of a layer follows the sum of its sizes over their product.

    .. math:: \frac{n_l}{m} \approx \min\Big(1,\; \kappa\, \frac{\sum_i d_{l,i}}{\prod_i d_{l,i}}\Big)

    with the largest :math:`\kappa` that the budget allows, rounded down to the choices there are; what is left by rounding
    goes to the layers that are next in line.

    Args:
        layers: The layers; their weights do not matter.
        budget: What they may cost together.

    Returns:
        A pattern per layer, in order.

    Example:
        >>> layers = [Layer((64, 64), NMPattern(2, 8)), Layer((8, 64), NMPattern(2, 8))]
        >>> [str(pattern) for pattern in erk_allocation(layers, budget=(64 * 64 + 8 * 64) / 4)]
        ['1:8', '8:8']

    References:
        Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse connectivity
        <https://arxiv.org/abs/1707.04780>`_, 2018; Evci et al., `Rigging the Lottery
        <https://arxiv.org/abs/1911.11134>`_, ICML 2020.
    """

    def worth(layer: Layer, low: int, high: int) -> float:
        return sum(layer.shape) / math.prod(layer.shape) * layer.pattern.m / high

    return _raised(layers, budget, worth)


def magnitude_allocation(layers: Sequence[Layer], budget: float) -> list[NMPattern]:
    r"""Every weight counts alike: keep what is large against the mean magnitude of its own layer.

    A step from n to n' is worth the mean normalized magnitude of the weights that it would keep in addition, per use,

    .. math:: \frac{1}{u_l}\,\frac{1}{n'-n} \sum_{k=n+1}^{n'} \frac{A_{l,k}}{\frac1m \sum_j A_{l,j}}

    and steps are taken from the most to the least worthy, as far as the budget goes.

    Args:
        layers: The layers.
        budget: What they may cost together.

    Returns:
        A pattern per layer, in order.

    Example:
        >>> flat, peaked = (1.0, 1.0, 1.0, 1.0), (4.0, 0.0, 0.0, 0.0)
        >>> layers = [Layer((4, 4), NMPattern(2, 4), magnitudes=each) for each in (flat, peaked)]
        >>> [str(pattern) for pattern in magnitude_allocation(layers, budget=20)]
        ['4:4', '1:4']
    """

    def worth(layer: Layer, low: int, high: int) -> float:
        parts = _shares(layer.magnitudes, layer.pattern.m)
        return layer.pattern.m * math.fsum(parts[low:high]) / (high - low) / layer.uses

    return _raised(layers, budget, worth)


def search_allocation(layers: Sequence[Layer], budget: float) -> list[NMPattern]:
    r"""Every layer counts alike: least sum over layers of the share of squared weights that is dropped.

    .. math:: \min_{n}\; \sum_l e_l(n_l), \qquad e_l(n) = \frac{\sum_{k>n} B_{l,k}}{\sum_k B_{l,k}}, \qquad
        \sum_l \mathrm{cost}_l(n_l) \le \mathrm{budget}

    As in DominoSearch it starts dense and tightens one layer at a time, the one that loses least for what it saves, until
    the budget holds. Then layers are loosened, and pairs exchanged, as long as that helps; no single such move can better
    the result. The published search looks at weights while they are trained under a penalty; this one at those there are.

    Args:
        layers: The layers.
        budget: What they may cost together.

    Returns:
        A pattern per layer, in order.

    Example:
        >>> flat, peaked = (1.0, 1.0, 1.0, 1.0), (4.0, 0.1, 0.0, 0.0)
        >>> layers = [Layer((4, 4), NMPattern(2, 4), squares=each) for each in (flat, peaked)]
        >>> [str(pattern) for pattern in search_allocation(layers, budget=20)]
        ['4:4', '1:4']

    References:
        Sun et al., DominoSearch: Find layer-wise fine-grained N:M sparse schemes from dense neural networks, NeurIPS 2021.
    """
    search = _Search(layers, budget)
    search.tighten()
    while search.move():
        pass
    return [NMPattern(n, layer.pattern.m) for n, layer in zip(search.kept(), layers, strict=True)]


def _shares(sums: Sequence[float], m: int) -> list[float]:
    """Sums divided by their own sum. A layer of zeros says nothing of its places: then all are alike."""
    total = math.fsum(sums)
    return [value / total for value in sums] if total > 0 and math.isfinite(total) else [1 / m] * m


def _raised(layers: Sequence[Layer], budget: float, worth: Callable[[Layer, int, int], float]) -> list[NMPattern]:
    """From the narrowest choice of every layer up, most worthy steps first; those that cost too much are left out."""
    kept = [choices_of(layer.pattern)[0] for layer in layers]
    spent = math.fsum(cost(layer, n) for layer, n in zip(layers, kept, strict=True))
    steps = []
    for i, layer in enumerate(layers):
        # Of steps that are worth the same the one that leads to the lower density comes first.
        steps += [(-worth(layer, a, b), b / layer.pattern.m, i, a, b) for a, b in pairwise(choices_of(layer.pattern))]
    for _, _, i, low, high in sorted(steps):
        more = cost(layers[i], high) - cost(layers[i], low)
        if kept[i] == low and spent + more <= _with_slack(budget):
            kept[i], spent = high, spent + more
    return [NMPattern(n, layer.pattern.m) for n, layer in zip(kept, layers, strict=True)]


def _with_slack(budget: float) -> float:
    return budget * (1 + 1e-9)  # a share like 0.29 of 100 is 28.999999999999996


class _Search:
    """Where the search is: the place of every layer among its choices."""

    def __init__(self, layers: Sequence[Layer], budget: float) -> None:
        self.choices = [choices_of(layer.pattern) for layer in layers]
        parts = [_shares(layer.squares, layer.pattern.m) for layer in layers]
        self.errors = [[math.fsum(p[n:]) for n in c] for p, c in zip(parts, self.choices, strict=True)]
        self.costs = [[cost(layer, n) for n in c] for layer, c in zip(layers, self.choices, strict=True)]
        self.at = [len(c) - 1 for c in self.choices]
        self.budget = _with_slack(budget)

    def kept(self) -> list[int]:
        return [choices[at] for choices, at in zip(self.choices, self.at, strict=True)]

    def spent(self) -> float:
        return math.fsum(costs[at] for costs, at in zip(self.costs, self.at, strict=True))

    def tighten(self) -> None:
        while self.spent() > self.budget and any(self.at):
            lost, saved = self._change(-1)
            price = lost / -saved
            # Of layers that lose the same the densest is tightened.
            same = price <= price.min() * (1 + 1e-9)
            density = torch.tensor([n / choices[-1] for n, choices in zip(self.kept(), self.choices, strict=True)])
            self.at[int(torch.where(same, density, -1.0).argmax())] -= 1

    def move(self) -> bool:
        """Take the one move that helps most, if there is any: loosen a layer, or loosen one and tighten another."""
        (down, saved), (up, more) = self._change(-1), self._change(+1)
        # Row i loosens layer i, column j tightens layer j, and the last column none.
        down, saved = torch.cat([down, down.new_zeros(1)]), torch.cat([saved, saved.new_zeros(1)])
        change = up[:, None] + down
        change[:, :-1].fill_diagonal_(math.inf)
        change[more[:, None] + saved > self.budget - self.spent()] = math.inf
        best = int(change.argmin())
        i, j = divmod(best, change.shape[1])
        if not change[i, j] < -1e-12:
            return False
        self.at[i] += 1
        if j < len(self.at):
            self.at[j] -= 1
        return True

    def _change(self, way: int) -> tuple[Tensor, Tensor]:
        """Change of error and of cost if each layer went one choice up or down; infinite where there is none."""
        inside = [0 <= at + way < len(c) for at, c in zip(self.at, self.choices, strict=True)]

        def change(table: list[list[float]], nowhere: float) -> Tensor:
            rows = zip(table, self.at, inside, strict=True)
            return torch.tensor([row[at + way] - row[at] if ok else nowhere for row, at, ok in rows], dtype=torch.float64)

        return change(self.errors, math.inf), change(self.costs, float(way))
