"""How the gradient passes through a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_step.functional.mask import apply_mask

__all__ = ["pruned_part", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return apply_mask(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    r"""Mask the weight, and pass the gradient unchanged to every weight.

    .. math:: \tilde w = \Pi \odot w, \qquad \frac{\partial \tilde w}{\partial w} := 1

    Pruned weights go on learning and can return, which is what makes mask learning possible.

    Args:
        weight: The latent (dense) weight, any float dtype, any shape.
        mask: Boolean, the shape of ``weight``.

    Returns:
        The masked weight, same shape and dtype.

    Example:
        >>> weight = torch.tensor([2., 1.], requires_grad=True)
        >>> straight_through(weight, torch.tensor([True, False])).sum().backward()
        >>> weight.grad
        tensor([1., 1.])

    References:
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
        <https://arxiv.org/abs/2102.04010>`_, ICLR 2021, equation 3.
    """
    masked: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]
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
        >>> pruned_part(torch.tensor([2., 1.]), torch.tensor([True, False]))
        tensor([0., 1.])

    References:
        Zhou et al., 2021, equation 9.
    """
    return apply_mask(weight.detach(), ~mask)
