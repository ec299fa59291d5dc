r"""NAdam: one reference step, and one with its second moment frozen.

Nesterov's momentum moves along a mix of the first moment and the newest gradient. Only the denominator freezes: the momentum
schedule :math:`\mu_t` and its product go on with the step counter, so the step right after the switch is NAdam's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_step.functional.adam import decayed

__all__ = ["NAdamState", "nadam_bound", "nadam_momentum", "nadam_step", "preconditioned_nadam_step"]

Number = TypeVar("Number", float, Tensor)  # a step count on the host, or one that stays on the device


class NAdamState(NamedTuple):
    """What one tensor's NAdam carries from step to step.

    Example:
        >>> NAdamState.zeros(torch.ones(2)).mu_product
        1.0
    """

    m: Tensor  # first moment, shape and dtype of the weight
    v: Tensor  # second moment, shape and dtype of the weight
    mu_product: float  # product of all momenta so far
    t: int  # optimizer steps taken

    @classmethod
    def zeros(cls, weight: Tensor) -> NAdamState:
        """The state before the first step.

        Args:
            weight: The tensor to be optimized.

        Returns:
            Zeros of its shape, at step 0.

        Example:
            >>> NAdamState.zeros(torch.ones(2)).t
            0
        """
        return cls(torch.zeros_like(weight), torch.zeros_like(weight), 1.0, 0)


def nadam_momentum(t: Number, beta1: float, momentum_decay: float) -> Number:
    r"""The momentum of step t, :math:`\mu_t = \beta_1\,(1 - \tfrac12\, 0.96^{t\psi})`.

    Args:
        t: The step, the first is 1: a number, or a tensor that stays on its device.
        beta1: Decay of the first moment.
        momentum_decay: :math:`\psi`.

    Returns:
        :math:`\mu_t`, which grows from half of beta1 to beta1.

    Example:
        >>> nadam_momentum(1.0, 0.9, 0.0)
        0.45

    References:
        Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    momentum: Number = beta1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
    return momentum


def nadam_bound(betas: tuple[float, float], mu: float, mu_next: float) -> float:
    r"""How far a first gradient after long silence moves a coordinate under stock NAdam, in learning rates.

    .. math:: \max\big(1, (\mu_{t+1}(1-\beta_1) + 1 - \mu_t)/\sqrt{1-\beta_2}\big)

    The newest gradient enters with the weight :math:`1-\mu_t` of its own, so this is more than Adam's bound.

    Args:
        betas: Decay of the first and of the second moment.
        mu: Momentum of this step.
        mu_next: Momentum of the step after it.

    Returns:
        The bound that phase II keeps in this step, at least 1.

    Example:
        >>> round(nadam_bound((0.9, 0.999), 0.9, 0.9), 3)
        6.008

    References:
        Dozat, 2016; for Adam, Kingma and Ba, 2015, section 2.1.
    """
    return max(1.0, (mu_next * (1 - betas[0]) + 1 - mu) / math.sqrt(1 - betas[1]))


def nadam_step(
    weight: Tensor,
    grad: Tensor,
    state: NAdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, NAdamState]:
    r"""One step of NAdam.

    .. math:: w_{t+1} = w_t - \frac{\gamma}{\sqrt{\hat v_{t+1}}+\epsilon}
        \Big(\frac{\mu_{t+2}\,m_{t+1}}{1-\prod_{i=1}^{t+2}\mu_i} + \frac{(1-\mu_{t+1})\,g_t}{1-\prod_{i=1}^{t+1}\mu_i}\Big)

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, same shape.
        state: The moments before the step. Not modified.
        lr: Learning rate :math:`\gamma`.
        betas: Decay of the first and of the second moment.
        eps: Term added to the root.
        weight_decay: Coefficient of the decay.
        momentum_decay: :math:`\psi` of `nadam_momentum`.
        decoupled: The decay goes to the weight, not into the gradient.
        maximize: Follow the gradient upwards.

    Returns:
        The new weight and the new state.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> nadam_step(weight, torch.tensor([0.5]), NAdamState.zeros(weight), lr=0.1)[0]
        tensor([0.8944])

    References:
        Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    effective = decayed(weight, grad, lr, weight_decay, decoupled, maximize)[1]
    v = betas[1] * state.v + (1 - betas[1]) * effective.square()
    denominator = (v / (1 - betas[1] ** (state.t + 1))).sqrt() + eps
    weight, m, mu_product = preconditioned_nadam_step(
        weight, grad, state.m, denominator, state.t, state.mu_product, lr=lr, beta1=betas[0], weight_decay=weight_decay,
        momentum_decay=momentum_decay, decoupled=decoupled, maximize=maximize,
    )  # fmt: skip
    return weight, NAdamState(m, v, mu_product, state.t + 1)


def preconditioned_nadam_step(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    denominator: Tensor,
    t: int,
    mu_product: float,
    *,
    lr: float,
    beta1: float = 0.9,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled: bool = False,
    maximize: bool = False,
    max_step: float = math.inf,
) -> tuple[Tensor, Tensor, float]:
    r"""One step of phase II: NAdam with its denominator frozen.

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, taken at the masked weight, same shape.
        m: First moment :math:`m_t`, carried over from phase I. Not modified.
        denominator: :math:`D` from `preconditioner`, same shape. Not modified.
        t: Optimizer steps taken before this one (the counter goes on from phase I).
        mu_product: Product of the momenta of those steps.
        lr: Learning rate :math:`\gamma`.
        beta1: Decay of the first moment.
        weight_decay: Coefficient of the decay.
        momentum_decay: :math:`\psi` of `nadam_momentum`.
        decoupled: The decay goes to the weight.
        maximize: Follow the gradient upwards.
        max_step: Largest move of one coordinate, in learning rates; `nadam_bound` keeps NAdam's own.

    Returns:
        The new weight, the new first moment and the new product of momenta.

    Example:
        >>> one = torch.tensor([1.0])
        >>> preconditioned_nadam_step(one, one, 0 * one, one, 0, 1.0, lr=0.1)[0]
        tensor([0.8944])

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1, phase II, for NAdam.
    """
    weight, grad = decayed(weight, grad, lr, weight_decay, decoupled, maximize)
    mu, mu_next = (nadam_momentum(float(t + i), beta1, momentum_decay) for i in (1, 2))
    mu_product *= mu
    m = beta1 * m + (1 - beta1) * grad
    along = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * grad / (1 - mu_product)
    return weight - lr * (along / denominator).clamp(-max_step, max_step), m, mu_product
