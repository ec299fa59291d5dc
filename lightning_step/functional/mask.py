r"""N:M masks from scores, and the groups they live in.

Note [Tie-breaking]
    Of equal scores the one with the lower index along the group dimension is kept. A threshold rule would keep too many
    or too few (0.4% of 2:4 groups in bfloat16), so every path here ranks: score ``i`` beats score ``j`` when it is larger,
    or equal and earlier. Ranks are a permutation of ``0 .. m-1``, hence exactly ``n`` are below ``n``, always.

Note [NaN]
    A NaN score counts as plus infinity. It is kept, so it stays visible in the loss instead of being masked away, and
    the count of kept weights stays exactly ``n``.

Which way a mask is computed (see `lightning_step.functional.kernels`) depends on device, dtype, pattern and size; the mask
does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_step.compiling import is_traced
from lightning_step.errors import PatternError
from lightning_step.functional.kernels import Order, as_magnitudes, as_scores, keep_in_groups
from lightning_step.pattern import NMPattern

__all__ = ["apply_mask", "as_groups", "magnitude_mask", "magnitude_masks", "nm_mask"]

SMALL = {"cpu": 2**14, "cuda": 2**22}
"""Up to so many elements the launches of a mask cost more than copying the weight."""

TOGETHER = {"cpu": 2**17, "cuda": 2**24}
"""Elements of small tensors that are handled together at most."""


def as_groups(tensor: Tensor, pattern: NMPattern, dim: int = -1) -> Tensor:
    """View a tensor with its dimension ``dim`` split into groups of ``m``.

    Args:
        tensor: Any tensor, shape ``(..., k*m, ...)``.
        pattern: The n:m pattern; only ``m`` is used.
        dim: The dimension that holds the groups.

    Returns:
        A view of shape ``(..., k, m, ...)``: the group index at ``dim``, the place in the group right behind it.

    Raises:
        PatternError: If ``m`` does not divide ``tensor.shape[dim]``.

    Example:
        >>> as_groups(torch.arange(8.).reshape(1, 8), NMPattern(2, 4)).shape
        torch.Size([1, 2, 4])
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise PatternError(f"Expected `dim` to name a dimension of the tensor, but got dim={dim} for {tensor.dim()}-D.")
    dim = dim % tensor.dim()
    size = tensor.shape[dim]
    if size % pattern.m:
        raise PatternError(
            f"Expected m to divide the group dimension, but got size {size} along dim {dim} of shape "
            f"{tuple(tensor.shape)} for the pattern {pattern}. Exclude the tensor or choose an m that divides {size}."
        )
    split = (*tensor.shape[:dim], size // pattern.m, pattern.m, *tensor.shape[dim + 1 :])
    return tensor.view(split)  # splitting one dimension never needs a copy


def nm_mask(scores: Tensor, pattern: NMPattern, dim: int = -1) -> Tensor:
    r"""Keep the ``n`` largest scores of every ``m`` consecutive ones along ``dim``.

    .. math:: \Pi_i = \mathbb{1}[\,\mathrm{rank}(s_i) < n\,] \quad\text{within each group}

    Equal scores are kept in index order, see Note [Tie-breaking]; NaN counts as plus infinity, see Note [NaN].

    Args:
        scores: Importance of each weight, any real dtype, shape ``(..., k*m, ...)``. Not modified.
        pattern: How many to keep of how many.
        dim: The dimension that holds the groups.

    Returns:
        Boolean mask of the shape of ``scores``; exactly ``n`` True in every group.

    Raises:
        PatternError: If ``m`` does not divide ``scores.shape[dim]``.

    Example:
        >>> nm_mask(torch.tensor([[3., -1., 2., 0.]]), NMPattern(2, 4))
        tensor([[ True, False,  True, False]])

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, section 2.
    """
    return _mask(scores.detach(), pattern, dim, as_scores)


def magnitude_mask(weight: Tensor, pattern: NMPattern, dim: int = -1) -> Tensor:
    r"""Keep the ``n`` largest magnitudes of every group: :math:`\Pi(w)`, the mask of the paper.

    Args:
        weight: Any float dtype, shape ``(..., k*m, ...)``. Not modified.
        pattern: How many to keep of how many.
        dim: The dimension that holds the groups.

    Returns:
        Boolean mask of the shape of ``weight``; exactly ``n`` True in every group.

    Raises:
        PatternError: If ``m`` does not divide ``weight.shape[dim]``.

    Example:
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 0.2, 0.2]), NMPattern(2, 4))
        tensor([False,  True,  True, False])
    """
    return _mask(weight.detach(), pattern, dim, as_magnitudes)


def magnitude_masks(weights: Sequence[Tensor], pattern: NMPattern, dims: Sequence[int]) -> list[Tensor]:
    r"""`magnitude_mask` of many weights; small ones of one shape are stacked, for a few launches in all.

    Args:
        weights: Any float dtypes, shapes and devices. Not modified.
        pattern: How many to keep of how many.
        dims: Of each, the dimension that holds the groups.

    Returns:
        Boolean masks of their shapes, each the same as by itself. Those made together share memory: all of it stays until
        the last of them goes.

    Raises:
        PatternError: If ``m`` does not divide the group dimension of one.

    Example:
        >>> magnitude_masks([torch.tensor([1., 2.]), torch.tensor([[4.], [-3.]])], NMPattern(1, 2), [0, 0])
        [tensor([False,  True]), tensor([[ True],
                [False]])]
    """
    masks: dict[int, Tensor] = {}
    alike: dict[tuple[torch.Size, int, torch.dtype, torch.device], list[int]] = {}
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        if not _is_stacked(weight, pattern.m, dim):
            masks[i] = magnitude_mask(weight, pattern, dim)
        else:
            alike.setdefault((weight.shape, dim % weight.dim(), weight.dtype, weight.device), []).append(i)
    for (shape, dim, *_), places in alike.items():
        several = max(1, TOGETHER[weights[places[0]].device.type] // max(1, shape.numel()))
        for at in range(0, len(places), several):
            some = places[at : at + several]
            found = magnitude_mask(torch.stack([weights[i].detach() for i in some]), pattern, dim + 1)
            masks |= zip(some, found.unbind(), strict=True)
    return [masks[i] for i in range(len(weights))]


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    r"""Set what the mask drops to plus zero: :math:`\Pi \odot w`.

    Selecting, not multiplying: a product would leave ``-0.0`` where the weight was negative, and NaN where it was infinite.

    Args:
        weight: Any dtype, any shape. Not modified.
        mask: Boolean, the shape of ``weight``.

    Returns:
        A new tensor of the shape and dtype of ``weight``. Its gradient is masked too.

    Example:
        >>> apply_mask(torch.tensor([-1., float("inf")]), torch.tensor([True, False]))
        tensor([-1.,  0.])
    """
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _mask(tensor: Tensor, pattern: NMPattern, dim: int, order: Order) -> Tensor:
    groups = as_groups(tensor, pattern, dim)  # (..., k, m, ...)
    if pattern.n == pattern.m:
        return torch.ones_like(tensor, dtype=torch.bool)
    place = dim % tensor.dim() + 1
    return keep_in_groups(groups, place, pattern.n, order).flatten(place - 1, place)


def _is_stacked(weight: Tensor, m: int, dim: int) -> bool:
    if not -weight.dim() <= dim < weight.dim() or weight.shape[dim] % m:
        return False  # to be refused by itself
    return is_small(weight) and weight.is_contiguous() and not is_traced()


def is_small(weight: Tensor) -> bool:
    """Whether the launches of its mask cost more than copying it.

    Args:
        weight: Any tensor.

    Returns:
        True if so.

    Example:
        >>> is_small(torch.zeros(8, 8)), is_small(torch.zeros(1024, 1024))
        (True, False)
    """
    return weight.numel() <= SMALL.get(weight.device.type, 0)
