r"""How much Adam's second moment still moves, and when that is little enough.

Every statistic is split in two, as in torchmetrics: ``*_update`` turns tensors into a (sum, count) pair that may be added
over tensors, processes and steps, ``*_compute`` turns the pair into the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_step.errors import ConfigurationError

__all__ = [
    "Statistic",
    "second_moment_change",
    "statistic_compute",
    "statistic_update",
    "window_length",
    "window_mean",
]

Statistic = Literal["arithmetic", "geometric", "l1", "l2", "drift"]
"""``arithmetic`` and ``geometric`` means of the change of v; mean of ``|v|`` (``l1``) and root mean square of v (``l2``);
``drift``, several numbers, see `lightning_step.functional.drift_update`."""


def second_moment_change(grad: Tensor, v: Tensor, beta2: float | Tensor) -> Tensor:
    r"""The coming change of Adam's second moment, without a copy of it.

    .. math:: v_t - v_{t-1} = (1-\beta_2)\,(g_t^2 - v_{t-1})

    Args:
        grad: The gradient :math:`g_t` the optimizer is about to use (unscaled; coupled weight decay added), any shape.
        v: The second moment **before** the step, :math:`v_{t-1}`, same shape.
        beta2: Decay :math:`\beta_2` of the second moment.

    Returns:
        :math:`v_t - v_{t-1}`, same shape and dtype.

    Example:
        >>> second_moment_change(torch.tensor([2.0]), torch.tensor([3.0]), 0.5)
        tensor([0.5000])

    References:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, ICLR 2015, algorithm 1.
    """
    return (grad.square() - v) * (1 - beta2)


def statistic_update(change: Tensor, v: Tensor, statistic: Statistic) -> Tensor:
    r"""Turn one step's tensors into a (sum, count) pair that can be added up.

    Coordinates that did not change are left out of the geometric mean: a single one would make it zero.

    Args:
        change: :math:`v_t - v_{t-1}`, any shape.
        v: :math:`v_t`, same shape.
        statistic: Which one.

    Returns:
        Two float32 numbers on the device of ``change``, shape ``(2,)``: the sum over the coordinates, and how many.

    Example:
        >>> statistic_update(torch.tensor([-1., 3.]), torch.tensor([1., 4.]), "arithmetic")
        tensor([4., 2.])
    """
    terms, counted = _terms(change.float(), v.float(), statistic)
    return torch.stack([terms.sum(), counted])


def statistic_compute(total: float, count: float, statistic: Statistic) -> float:
    r"""Turn a (sum, count) pair into the value of the statistic.

    .. math:: Z^{arith} = \frac1d \sum_i |\Delta v_i|, \qquad Z^{geo} = \exp\Big(\frac1d \sum_i \log|\Delta v_i|\Big)

    Args:
        total: Sum over all coordinates.
        count: How many coordinates.
        statistic: Which one.

    Returns:
        The value; 0 where nothing was counted (no coordinate changed), NaN or infinity where the sum was not finite.

    Example:
        >>> statistic_compute(4.0, 2.0, "arithmetic")
        2.0

    References:
        Lu et al., 2023, AutoSwitch, options I (arithmetic) and II (geometric).
    """
    if count == 0:
        return 0.0
    mean = total / count
    if statistic == "geometric":
        return math.exp(mean) if mean < 700 else math.inf  # exp overflows a double beyond 709
    return math.sqrt(mean) if statistic == "l2" and mean >= 0 else mean


def window_length(beta2: float) -> int:
    r"""The averaging length of the second moment, :math:`T_w = \mathrm{round}(1/(1-\beta_2))`.

    Args:
        beta2: Decay of the second moment, ``0 <= beta2 < 1``.

    Returns:
        Number of optimizer steps, at least 1.

    Example:
        >>> window_length(0.999)  # 1/(1-.999) is 999.9999999999991 in floating point
        1000
    """
    if not 0 <= beta2 < 1:
        raise ConfigurationError(f"Expected 0 <= beta2 < 1, but got {beta2}. Give the optimizer a beta2 below 1.")
    return round(1 / (1 - beta2))


def window_mean(samples: Sequence[float], length: int) -> float | None:
    """Mean over the newest ``length`` samples, once there are that many.

    Args:
        samples: Values of the statistic, one per optimizer step, newest last.
        length: Window length :math:`T_w` in optimizer steps.

    Returns:
        The mean, correctly rounded so that it does not depend on where a run was resumed; None before the window is full.

    Example:
        >>> window_mean([1.0, 2.0, 4.0], 2), window_mean([1.0], 2)
        (3.0, None)
    """
    if len(samples) < length:
        return None
    return math.fsum(samples[-length:]) / length


def _terms(change: Tensor, v: Tensor, statistic: Statistic) -> tuple[Tensor, Tensor]:
    if statistic == "geometric":
        moved = change != 0
        logs = torch.where(moved, change.abs().clamp_min(torch.finfo(torch.float32).tiny).log(), 0.0)
        return logs, moved.sum().float()
    terms = {"arithmetic": change.abs, "l1": v.abs, "l2": v.square}[statistic]()
    return terms, torch.full((), float(terms.numel()), device=terms.device)
