r"""How far Adam's second moment has drifted, measured against the noise it has anyway. Nothing here has a scale.

Note [Drift against noise]
    Let :math:`x = \sqrt{\hat v}`, what Adam divides by, and :math:`\sigma_i^2` the variance of :math:`g_i^2`. Were the
    gradients of all steps drawn alike, v would still move: :math:`\hat v_t` is a mean of :math:`g^2` over about
    :math:`1/(1-\beta_2)` steps, so that over a lag of :math:`L` steps (to first order in the noise)

    .. math:: E\,\lVert x_t - x_{t-L} \rVert^2 = f_{t,L} \sum_i \frac{\sigma_i^2}{4\,\hat v_i}, \qquad
        f_{t,L} = \kappa_t + \kappa_{t-L} - 2 \beta_2^L \frac{1-\beta_2^{t-L}}{1-\beta_2^t} \kappa_{t-L}, \qquad
        \kappa_t = \frac{1-\beta_2}{1+\beta_2} \cdot \frac{1+\beta_2^t}{1-\beta_2^t}

    Whatever is observed above that is drift. The ratio of the two sides is 1 at rest and 2 where drift and noise are alike,
    whatever the size of the gradients, the number of coordinates, and :math:`\beta_2`.

Note [A sketch in place of a copy]
    The left side needs :math:`x_{t-L}`, a copy of v. A sketch does as well: each coordinate gets a sign and one of
    127 sums, both fixed by its number. The squared length of a difference of two sketches is that of the difference itself
    on average, within about 13 %. Sums add up over processes and can be saved, where copies of shards could not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_step.functional.autoswitch import Statistic

__all__ = [
    "Sketch",
    "drift_noise",
    "drift_update",
    "expected_drift",
    "make_sketch",
    "sketch",
    "squared_distance",
    "statistic_size",
]

_WIDTH = 127  # a prime: no width of a layer is a multiple of it


class Sketch(NamedTuple):
    """How to make a sketch of one vector, see Note [A sketch in place of a copy].

    Example:
        >>> make_sketch(torch.arange(4)).places.shape
        torch.Size([127, 1])
    """

    places: Tensor  # int64, (127, k): places in the vector that each sum takes; behind the last one is a zero
    signs: Tensor  # float32, the shape of the vector


def make_sketch(numbers: Tensor) -> Sketch:
    """Decide where each coordinate goes.

    Args:
        numbers: The number of each coordinate in the whole, int64, shape ``(d,)``; what it gets depends on this alone.

    Returns:
        The way to make sketches.

    Example:
        >>> make_sketch(torch.arange(300)).places.shape
        torch.Size([127, 3])
    """
    sums = numbers % _WIDTH
    order = sums.argsort(stable=True)
    sizes = torch.bincount(sums, minlength=_WIDTH)
    places = torch.full((_WIDTH, max(1, int(sizes.max()))), len(numbers), dtype=torch.int64, device=numbers.device)
    inside = torch.arange(places.shape[1], device=numbers.device) < sizes[:, None]
    places[inside] = order
    return Sketch(places, 1.0 - 2.0 * _bits(numbers))


def sketch(values: Tensor, made: Sketch) -> Tensor:
    """Reduce a vector to 127 signed sums, in a fixed order of summation.

    Args:
        values: Shape ``(d,)``.
        made: From `make_sketch` for these coordinates.

    Returns:
        Shape ``(127,)``, linear in ``values``.

    Example:
        >>> values = torch.randn(5)
        >>> bool(sketch(values, make_sketch(torch.arange(5))).square().sum().isclose(values.square().sum()))
        True
    """
    signed = values * made.signs
    return torch.cat([signed, signed.new_zeros(1)])[made.places].sum(1)


def drift_update(grad: Tensor, v: Tensor, made: Sketch) -> Tensor:
    r"""Turn one step's tensors into sums that may be added over tensors and processes.

    Args:
        grad: The effective gradient of the step, shape ``(d,)``.
        v: The second moment **after** the step, same shape. Coordinates where it is 0 count for nothing.
        made: From `make_sketch` for these coordinates.

    Returns:
        :math:`\sum g^4/v`, the number of coordinates, :math:`\sum g^2`, :math:`\sum v`, and the sketch of
        :math:`\sqrt v`: shape ``(131,)``, float32.

    Example:
        >>> drift_update(torch.tensor([2., 0.]), torch.tensor([1., 0.]), make_sketch(torch.arange(2)))[:4]
        tensor([16.,  2.,  4.,  1.])
    """
    squares = grad.float().square()
    # g^4 first would underflow or overflow long before its ratio to v does.
    fourth = torch.where(v > 0, squares * (squares / v), 0.0)
    count = torch.full((), float(v.numel()), device=v.device)
    return torch.cat([torch.stack([fourth.sum(), count, squares.sum(), v.sum()]), sketch(v.sqrt(), made)])


def statistic_size(statistic: Statistic) -> int:
    """How many numbers an update of a statistic is made of.

    Args:
        statistic: Which one.

    Returns:
        2 for a (sum, count) pair, more for ``"drift"``.

    Example:
        >>> statistic_size("l1"), statistic_size("drift")
        (2, 131)
    """
    return _WIDTH + 4 if statistic == "drift" else 2


def drift_noise(fourth: float, squares: float, v: float, t: int, beta2: float) -> tuple[float, float]:
    r"""What one step says of the noise in :math:`\sqrt{\hat v}`; sum both numbers over steps and divide.

    .. math:: \sum_i \frac{(g_i^2 - \hat v_i)^2}{4\,\hat v_i}, \qquad 1 - 2\,\frac{1-\beta_2}{1-\beta_2^t} + \kappa_t

    The second number is what the first would be for :math:`\sigma_i^2 = 4 \hat v_i`, summing to 1: the gradient of the step
    is itself a part of :math:`\hat v`, so that it is nearer to it than a new one would be.

    Args:
        fourth: :math:`\sum g^4/v`.
        squares: :math:`\sum g^2`.
        v: :math:`\sum v`, not corrected, as are all three.
        t: Optimizer steps taken.
        beta2: Decay of the second moment.

    Returns:
        The two numbers.

    Example:
        >>> [round(x, 4) for x in drift_noise(4.0, 2.0, 1.0, t=10_000, beta2=0.5)]  # 4 - 4 + 1, over 4
        [0.25, 0.3333]
    """
    corrected = 1 - beta2**t
    noise = (fourth * corrected - 2 * squares + v / corrected) / 4
    return noise, 1 - 2 * (1 - beta2) / corrected + _spread(t, beta2)


def expected_drift(t: int, lag: int, beta2: float) -> float:
    r"""The factor :math:`f_{t,L}` of Note [Drift against noise].

    Args:
        t: Optimizer steps taken.
        lag: How many of them lie between the two second moments, below ``t``.
        beta2: Decay of the second moment.

    Returns:
        The factor.

    Example:
        >>> round(expected_drift(100_000, 10_000, 0.999) / (2 * 0.001 / 1.999), 3)  # two independent ones
        1.0
    """
    before = t - lag
    common = beta2**lag * (1 - beta2**before) / (1 - beta2**t)
    return _spread(t, beta2) + _spread(before, beta2) * (1 - 2 * common)


def squared_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Squared length of the difference of two sketches.

    Args:
        one: A sketch.
        other: Another one, of the same coordinates.

    Returns:
        An estimate of the squared distance of what they are made of.

    Example:
        >>> squared_distance([1.0, 2.0], [1.0, 0.0])
        4.0
    """
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def _spread(t: int, beta2: float) -> float:
    """Variance of the corrected mean of ``t`` draws of variance 1."""
    return (1 - beta2) / (1 + beta2) * (1 + beta2**t) / (1 - beta2**t)


def _bits(numbers: Tensor) -> Tensor:
    """A bit for every number, as good as random: the finalizer of MurmurHash3 on 32 bits."""
    mixed = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) & 1).float()
