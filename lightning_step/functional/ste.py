"""How the gradient passes through a mask.

Note [A copy with holes]
    The identity of the gradient comes from ``clone``, whose backward hands the gradient through as it is; the zeros are
    written into the copy behind autograd's back. Bit for bit this is selection forward and the identity backward, also for
    minus zero, infinity and NaN, where the textbook ``w + (masked - w).detach()`` rounds, or gives NaN. A
    ``torch.autograd.Function`` would do too, but torch.compile warns wherever it traces one, it costs four times the time
    of the whole on a small weight, and forward-mode differentiation needs a rule of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_step.functional.bits import keep_, kept_part

__all__ = ["pruned_part", "straight_through"]


def straight_through(weight: Tensor, mask: Tensor, leak: float = 0.0) -> Tensor:
    r"""Mask the weight, and pass the gradient unchanged to every weight.

    .. math:: \tilde w = (\Pi + \beta\,(1-\Pi)) \odot w, \qquad \frac{\partial \tilde w}{\partial w} := 1

    Pruned weights go on learning and can return, which is what makes mask learning possible. What the mask drops is plus
    zero, whatever it was. Under ``torch.vmap`` a batched mask needs a batched weight.

    Args:
        weight: The latent (dense) weight, any float dtype, any shape.
        mask: Boolean, the shape of ``weight``.
        leak: :math:`\beta`, what the dropped weights are multiplied with.

    Returns:
        The masked weight, same shape and dtype.

    Example:
        >>> import torch
        >>> weight = torch.tensor([2., 1.], requires_grad=True)
        >>> straight_through(weight, torch.tensor([True, False])).sum().backward()
        >>> weight.grad
        tensor([1., 1.])

    References:
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
        <https://arxiv.org/abs/2102.04010>`_, ICLR 2021, equation 3.
    """
    masked = weight.clone()  # see Note [A copy with holes]
    if leak:
        masked.detach().copy_(torch.where(mask, weight.detach(), weight.detach() * leak))
    else:
        keep_(masked, mask)
    return masked


def pruned_part(weight: Tensor, mask: Tensor) -> Tensor:
    r"""What the mask drops: :math:`(1 - \Pi) \odot w`, the direction of the SR-STE term.

    SR-STE adds ``lam`` times this to the gradient, once per optimizer step and not in ``backward``: there it would be
    multiplied by the number of accumulated micro-batches and divided by the loss scale.

    Args:
        weight: The latent (dense) weight, any float dtype, any shape.
        mask: Boolean, the shape of ``weight``.

    Returns:
        A new tensor of the shape and dtype of ``weight``, zero where the mask keeps.

    Example:
        >>> import torch
        >>> pruned_part(torch.tensor([2., 1.]), torch.tensor([True, False]))
        tensor([0., 1.])

    References:
        Zhou et al., 2021, equation 9.
    """
    return kept_part(weight, mask, of=False)
