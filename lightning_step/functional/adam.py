r"""One reference step of Adam, and one reference step with its second moment frozen.

Slow and plain on purpose: these are what the fast adapters in ``lightning_step.optim`` are tested against.

Note [Dead coordinates]
    Where no gradient came before the switch, :math:`\hat v` is about 0, and a later gradient divided by ``eps`` would blow
    up. Two guards. A coordinate whose :math:`\sqrt{\hat v}` is not above ``eps`` (the place where Adam's own denominator is
    ``eps`` and says nothing about the gradient) takes the root mean square of its tensor instead. And no coordinate
    moves by more than ``max_step`` learning rates in one step: live Adam answers a first gradient after long silence with
    :math:`\max(1, (1-\beta_1)/\sqrt{1-\beta_2})` of them, however large it is; freezing v loses that, so it is put back.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AdamState",
    "PreconditionForm",
    "adam_bound",
    "adam_step",
    "moment_behind",
    "preconditioned_step",
    "preconditioner",
]

PreconditionForm = Literal["adam", "paper"]
r"""``adam``: :math:`\sqrt{\hat v}+\epsilon` with guarded dead coordinates; ``paper``: :math:`\sqrt{v+\epsilon}`."""


class AdamState(NamedTuple):
    """What one tensor's Adam carries from step to step.

    Example:
        >>> AdamState.zeros(torch.ones(2)).m
        tensor([0., 0.])
    """

    m: Tensor  # first moment, shape and dtype of the weight
    v: Tensor  # second moment, shape and dtype of the weight
    v_max: Tensor  # largest second moment so far (amsgrad), shape and dtype of the weight
    t: int  # optimizer steps taken

    @classmethod
    def zeros(cls, weight: Tensor) -> AdamState:
        """The state before the first step.

        Args:
            weight: The tensor to be optimized.

        Returns:
            Zeros of its shape, at step 0.

        Example:
            >>> AdamState.zeros(torch.ones(2)).t
            0
        """
        return cls(torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight), 0)


def adam_step(
    weight: Tensor,
    grad: Tensor,
    state: AdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    r"""One step of Adam or AdamW.

    .. math:: w_{t+1} = w_t - \gamma\,\hat m_{t+1} / (\sqrt{\hat v_{t+1}} + \epsilon)

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, same shape.
        state: The moments before the step. Not modified.
        lr: Learning rate :math:`\gamma`.
        betas: Decay of the first and of the second moment.
        eps: Term added to the root.
        weight_decay: Coefficient of the decay.
        decoupled: True for AdamW: the decay goes to the weight, not into the gradient.
        amsgrad: Divide by the largest second moment so far.
        maximize: Follow the gradient upwards.

    Returns:
        The new weight and the new state.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> adam_step(weight, torch.tensor([0.5]), AdamState.zeros(weight), lr=0.1)[0]
        tensor([0.9000])

    References:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015; Loshchilov and Hutter,
        `AdamW <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    beta1, beta2 = betas
    weight, grad = decayed(weight, grad, lr, weight_decay, decoupled, maximize)
    m = beta1 * state.m + (1 - beta1) * grad
    v = beta2 * state.v + (1 - beta2) * grad.square()
    v_max = torch.maximum(state.v_max, v)
    t = state.t + 1
    denominator = ((v_max if amsgrad else v) / (1 - beta2**t)).sqrt() + eps
    return weight - lr * (m / (1 - beta1**t)) / denominator, AdamState(m, v, v_max, t)


def preconditioner(
    v: Tensor, t: int, *, beta2: float, eps: float = 1e-8, form: PreconditionForm = "adam", mean: Tensor | None = None
) -> Tensor:
    r"""The constant denominator of phase II, made once from the second moment at the switch.

    .. math:: D = \sqrt{\hat v_{t_0}} + \epsilon, \qquad \hat v_{t_0} = v_{t_0} / (1-\beta_2^{t_0})

    With the bias-corrected :math:`\hat v` the step right after the switch is the one stock Adam would have taken with that
    v; the raw v of the paper's form makes it jump by :math:`(1-\beta_2^{t_0})^{-1/2}`. See Note [Dead coordinates].

    Args:
        v: Second moment :math:`v_{t_0}` (amsgrad: the largest so far), any float dtype, any shape. Not modified.
        t: Optimizer steps that made it, :math:`t_0 \ge 1`.
        beta2: Decay of the second moment.
        eps: Adam's epsilon.
        form: ``"adam"`` as above, ``"paper"`` for :math:`\sqrt{v+\epsilon}` on the raw v, unguarded.
        mean: Mean of the second moment over the whole tensor, where ``v`` is a part of it.

    Returns:
        :math:`D`, same shape and dtype, computed in float32 or wider.

    Example:
        >>> preconditioner(torch.tensor([0.04, 0.0]), 1, beta2=0.99)
        tensor([2.0000, 1.4142])

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1.
    """
    wide = v if v.dtype == torch.float64 else v.float()
    if form == "paper":
        return (wide + eps).sqrt().to(v.dtype)
    v_hat = wide / (1 - beta2**t)
    root = v_hat.sqrt()
    typical = (v_hat.mean() if mean is None else mean / (1 - beta2**t)).to(root.dtype).sqrt()
    guarded = torch.where(root > eps, root, torch.maximum(root, typical))
    # Adding eps in float16 would round it away and leave an exact zero to divide by.
    return (guarded + eps).to(v.dtype).clamp_min(torch.finfo(v.dtype).tiny)


def moment_behind(
    precondition: Tensor, t: int, *, beta2: float, eps: float = 1e-8, form: PreconditionForm = "adam"
) -> Tensor:
    r"""The second moment that a preconditioner was made of, to look at: `preconditioner` backwards.

    .. math:: v_{t_0} = (D - \epsilon)^2\,(1-\beta_2^{t_0})

    A guarded coordinate gives what it was given, see Note [Dead coordinates]; with ``form="paper"``, a v far below ``eps``
    has left no trace.

    Args:
        precondition: :math:`D`, any float dtype, any shape. Not modified.
        t: Optimizer steps that made the second moment, :math:`t_0 \ge 1`.
        beta2: Decay of the second moment.
        eps: Adam's epsilon.
        form: How D was made.

    Returns:
        :math:`v_{t_0}`, same shape, float32 or wider.

    Example:
        >>> moment_behind(preconditioner(torch.tensor([0.04]), 1, beta2=0.99), 1, beta2=0.99)
        tensor([0.0400])
    """
    wide = precondition if precondition.dtype == torch.float64 else precondition.float()
    if form == "paper":
        return (wide.square() - eps).clamp_min(0)
    return (wide - eps).square() * (1 - beta2**t)


def adam_bound(betas: tuple[float, float]) -> float:
    r"""How far a first gradient after long silence moves a coordinate under stock Adam, in learning rates.

    .. math:: \max\big(1, (1-\beta_1)/\sqrt{1-\beta_2}\big)

    The usual reading of it as Adam's largest step is nearly right: only gradients that grow from step to step go beyond.

    Args:
        betas: Decay of the first and of the second moment.

    Returns:
        The bound that phase II keeps, at least 1.

    Example:
        >>> round(adam_bound((0.9, 0.999)), 3)
        3.162

    References:
        Kingma and Ba, 2015, section 2.1.
    """
    return max(1.0, (1 - betas[0]) / math.sqrt(1 - betas[1]))


def preconditioned_step(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    denominator: Tensor,
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    max_step: float = math.inf,
) -> tuple[Tensor, Tensor]:
    r"""One step of phase II: Adam with its denominator frozen.

    .. math:: m_{t+1} = \beta_1 m_t + (1-\beta_1) g_t, \qquad w_{t+1} = w_t - \gamma\,\frac{m_{t+1}}{1-\beta_1^{t+1}} \Big/ D

    Args:
        weight: :math:`w_t`, any float dtype, any shape. Not modified.
        grad: :math:`g_t`, taken at the masked weight, same shape.
        m: First moment :math:`m_t`, carried over from phase I. Not modified.
        denominator: :math:`D` from `preconditioner`, same shape. Not modified.
        t: Optimizer steps taken before this one (the counter goes on from phase I).
        lr: Learning rate :math:`\gamma`.
        beta1: Decay of the first moment.
        weight_decay: Coefficient of the decay.
        decoupled: True for AdamW.
        maximize: Follow the gradient upwards.
        max_step: Largest move of one coordinate, in learning rates. See Note [Dead coordinates].

    Returns:
        The new weight and the new first moment.

    Example:
        >>> one = torch.tensor([1.0])
        >>> preconditioned_step(one, 0.5 * one, 0 * one, 2 * one, 0, lr=0.1)[0]
        tensor([0.9750])

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1, phase II.
    """
    weight, grad = decayed(weight, grad, lr, weight_decay, decoupled, maximize)
    m = beta1 * m + (1 - beta1) * grad
    update = (m / (1 - beta1 ** (t + 1))) / denominator
    return weight - lr * update.clamp(-max_step, max_step), m


def decayed(
    weight: Tensor, grad: Tensor, lr: float, weight_decay: float, decoupled: bool, maximize: bool
) -> tuple[Tensor, Tensor]:
    grad = -grad if maximize else grad
    if decoupled:
        return weight * (1 - lr * weight_decay), grad
    return weight, grad + weight_decay * weight
