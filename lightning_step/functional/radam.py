r"""RAdam: one reference step, and one with its second moment frozen.

Note [Rectified]
    RAdam trusts v only once :math:`\rho_t`, the number of gradients it averages, is above 5; before that it takes plain
    momentum steps, undivided. So there is nothing worth freezing before: the switch waits. After it, the rectification
    :math:`r_t` goes on as a schedule of the step alone. It is RAdam's warm-up of the rate: held at its value of the switch
    it would keep the rate small for good, and the step right after the switch would not be RAdam's own.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from lightning_step.functional.adam import AdamState, decayed

__all__ = ["preconditioned_radam_step", "radam_step", "rectification"]

Number = TypeVar("Number", float, Tensor)  # a step count on the host, or one that stays on the device

TRACTABLE = 5.0  # what rho_t has to exceed


def rectification(t: Number, beta2: float) -> Number:
    r"""The rectification of step t.

    .. math:: r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}, \quad
        \rho_t = \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t}, \quad \rho_\infty = \frac{2}{1-\beta_2} - 1

    Args:
        t: The step, the first is 1: a number, or a tensor that stays on its device.
        beta2: Decay of the second moment.

    Returns:
        :math:`r_t`, below 1; 0 while :math:`\rho_t \le 5`, where RAdam does not look at v.

    Example:
        >>> rectification(5.0, 0.999), round(rectification(6.0, 0.999), 4), round(rectification(20000.0, 0.999), 4)
        (0.0, 0.0258, 1.0)

    References:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
        <https://arxiv.org/abs/1908.03265>`_, ICLR 2020.
    """
    longest = 2 / (1 - beta2) - 1
    if longest <= TRACTABLE:
        return t * 0.0
    length: Number = longest - 2 * t * beta2**t / (1 - beta2**t)
    if isinstance(length, Tensor):
        rooted = _squared(length, longest).clamp_min(0).sqrt()
        return torch.where(length > TRACTABLE, rooted, torch.zeros_like(rooted))
    return math.sqrt(_squared(length, longest)) if length > TRACTABLE else 0.0


def _squared(length: Number, longest: float) -> Number:
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)


def radam_step(
    weight: Tensor,
    grad: Tensor,
    state: AdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    r"""One step of RAdam.

    .. math:: w_{t+1} = w_t - \gamma\, r_{t+1}\, \hat m_{t+1}\, \frac{\sqrt{1-\beta_2^{t+1}}}{\sqrt{v_{t+1}} + \epsilon}
        \quad\text{if } \rho_{t+1} > 5, \text{ else } w_t - \gamma\, \hat m_{t+1}

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, same shape.
        state: The moments before the step. Not modified.
        lr: Learning rate :math:`\gamma`.
        betas: Decay of the first and of the second moment.
        eps: Term added to the root of the raw v.
        weight_decay: Coefficient of the decay.
        decoupled: The decay goes to the weight, not into the gradient.
        maximize: Follow the gradient upwards.

    Returns:
        The new weight and the new state.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> radam_step(weight, torch.tensor([0.5]), AdamState.zeros(weight), lr=0.1)[0]  # undivided, see Note [Rectified]
        tensor([0.9500])

    References:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
        <https://arxiv.org/abs/1908.03265>`_, ICLR 2020.
    """
    weight, grad = decayed(weight, grad, lr, weight_decay, decoupled, maximize)
    m = betas[0] * state.m + (1 - betas[0]) * grad
    v = betas[1] * state.v + (1 - betas[1]) * grad.square()
    t = state.t + 1
    m_hat, rate = m / (1 - betas[0] ** t), rectification(float(t), betas[1])
    adaptive = rate * math.sqrt(1 - betas[1] ** t) / (v.sqrt() + eps) if rate else torch.ones_like(v)
    return weight - lr * m_hat * adaptive, AdamState(m, v, torch.maximum(state.v_max, v), t)


def preconditioned_radam_step(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    denominator: Tensor,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    max_step: float = math.inf,
) -> tuple[Tensor, Tensor]:
    r"""One step of phase II: RAdam with its denominator frozen, see Note [Rectified].

    .. math:: w_{t+1} = w_t - \gamma\, r_{t+1}\, \hat m_{t+1} / D

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, taken at the masked weight, same shape.
        m: First moment :math:`m_t`, carried over from phase I. Not modified.
        denominator: :math:`D` from `preconditioner`, same shape. RAdam adds eps to the root of the raw v, so D is made with
            :math:`\epsilon/\sqrt{1-\beta_2^{t_0}}` in its place. Not modified.
        t: Optimizer steps taken before this one (the counter goes on from phase I).
        lr: Learning rate :math:`\gamma`.
        betas: Decay of the first moment, and of the second, which the rectification is made of.
        weight_decay: Coefficient of the decay.
        decoupled: The decay goes to the weight.
        maximize: Follow the gradient upwards.
        max_step: Largest move of one coordinate in rectified learning rates, :math:`\gamma r_{t+1}`. Live RAdam answers a
            first gradient after long silence with `adam_bound` of them.

    Returns:
        The new weight and the new first moment.

    Example:
        >>> one = torch.tensor([1.0])
        >>> preconditioned_radam_step(one, one, 0 * one, one, 20000, lr=0.1)[0]
        tensor([0.9900])

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1, phase II, for RAdam.
    """
    weight, grad = decayed(weight, grad, lr, weight_decay, decoupled, maximize)
    m = betas[0] * m + (1 - betas[0]) * grad
    update = (m / (1 - betas[0] ** (t + 1))) / denominator
    return weight - lr * rectification(float(t + 1), betas[1]) * update.clamp(-max_step, max_step), m
