"""What a mask did: density, violations, flip rate, kept magnitude.

Each is an update (tensors to a (sum, count) pair, shape ``(2,)``, float64) that may be added over tensors and processes;
`ratio_compute` turns any such pair into the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_step.functional.mask import apply_mask, as_groups
from lightning_step.pattern import NMPattern

__all__ = [
    "Violation",
    "density_update",
    "find_violation",
    "flip_rate_update",
    "kept_magnitude_update",
    "ratio_compute",
    "violation_update",
]


@dataclass(frozen=True)
class Violation:
    """The first group that does not hold its pattern.

    Example:
        >>> Violation((0, 1), 3, 5)
        Violation(index=(0, 1), nonzeros=3, groups=5)
    """

    index: tuple[int, ...]  # of the group, in the tensor with its group dimension counted in groups
    nonzeros: int  # weights in that group that are not zero
    groups: int  # how many groups of the tensor do not hold the pattern


def ratio_compute(pair: Tensor) -> float:
    """Turn a (sum, count) pair into their ratio.

    Args:
        pair: Sum and count, shape ``(2,)``.

    Returns:
        The ratio; 0 where the count is 0.

    Example:
        >>> ratio_compute(torch.tensor([1.0, 4.0]))
        0.25
    """
    total, count = pair.tolist()
    return float(total / count) if count else 0.0


def density_update(weight: Tensor) -> Tensor:
    r"""Count the weights that are not zero: :math:`(\lVert w\rVert_0,\; d)`.

    Args:
        weight: Any dtype, any shape.

    Returns:
        Number of non-zeros and number of weights, shape ``(2,)``.

    Example:
        >>> ratio_compute(density_update(torch.tensor([1., 0., 0., 2.])))
        0.5
    """
    return _pair((weight != 0).sum(), weight.numel())  # float8 has no count_nonzero kernel


def violation_update(weight: Tensor, pattern: NMPattern, dim: int = -1) -> Tensor:
    """Count the groups with more than ``n`` non-zeros.

    Args:
        weight: Any dtype, shape ``(..., k*m, ...)``.
        pattern: The pattern every group has to hold.
        dim: The dimension that holds the groups.

    Returns:
        Number of violating groups and number of groups, shape ``(2,)``.

    Raises:
        PatternError: If ``m`` does not divide ``weight.shape[dim]``.

    Example:
        >>> violation_update(torch.tensor([[1., 1., 1., 0., 0., 0., 0., 1.]]), NMPattern(2, 4))
        tensor([1., 2.], dtype=torch.float64)
    """
    nonzeros = _nonzeros(weight, pattern, dim)
    return _pair((nonzeros > pattern.n).sum(), nonzeros.numel())


def find_violation(weight: Tensor, pattern: NMPattern, dim: int = -1) -> Violation | None:
    """Find the first group with more than ``n`` non-zeros.

    Args:
        weight: Any dtype, shape ``(..., k*m, ...)``.
        pattern: The pattern every group has to hold.
        dim: The dimension that holds the groups.

    Returns:
        Where it is and how bad it is, or None if every group holds the pattern.

    Raises:
        PatternError: If ``m`` does not divide ``weight.shape[dim]``.

    Example:
        >>> find_violation(torch.tensor([[0., 0., 0., 0., 1., 1., 1., 0.]]), NMPattern(2, 4))
        Violation(index=(0, 1), nonzeros=3, groups=1)
    """
    nonzeros = _nonzeros(weight, pattern, dim)
    bad = nonzeros > pattern.n
    if not bool(bad.any()):
        return None
    first = bad.flatten().to(torch.uint8).argmax()
    index = torch.unravel_index(first, bad.shape)
    return Violation(tuple(int(i) for i in index), int(nonzeros[index]), int(bad.sum()))


def flip_rate_update(before: Tensor, after: Tensor) -> Tensor:
    r"""Count the mask entries that changed in one optimizer step: :math:`(\lVert \Pi_t - \Pi_{t-1}\rVert_1,\; d)`.

    Args:
        before: Boolean mask, any shape.
        after: Boolean mask one optimizer step later, same shape.

    Returns:
        Number of changed entries and number of entries, shape ``(2,)``.

    Example:
        >>> ratio_compute(flip_rate_update(torch.tensor([True, False]), torch.tensor([False, True])))
        1.0

    References:
        Hu et al., `Accelerating Transformer Pre-training with 2:4 Sparsity <https://arxiv.org/abs/2404.01847>`_, ICML 2024.
    """
    return _pair((before != after).sum(), before.numel())


def kept_magnitude_update(weight: Tensor, mask: Tensor) -> Tensor:
    r"""Share of the magnitude that the mask keeps: :math:`(\lVert \Pi \odot w\rVert_1,\; \lVert w\rVert_1)`.

    Args:
        weight: The latent weight, any float dtype, any shape.
        mask: Boolean, same shape.

    Returns:
        Kept magnitude and total magnitude, shape ``(2,)``.

    Example:
        >>> ratio_compute(kept_magnitude_update(torch.tensor([3., -1.]), torch.tensor([True, False])))
        0.75
    """
    magnitude = weight.detach().abs()
    magnitude = magnitude.float() if magnitude.dtype.itemsize == 1 else magnitude  # float8 has no sum
    return torch.stack([apply_mask(magnitude, mask).sum(dtype=torch.float64), magnitude.sum(dtype=torch.float64)])


def _nonzeros(weight: Tensor, pattern: NMPattern, dim: int) -> Tensor:
    nonzero = as_groups((weight.detach() != 0).view(torch.uint8), pattern, dim)
    # Bytes are added up several times as fast as they are widened.
    return nonzero.sum(dim=dim % weight.dim() + 1, dtype=torch.uint8 if pattern.m < 256 else torch.int64)


def _pair(total: Tensor, count: int) -> Tensor:
    return torch.stack([total.double(), torch.full((), count, dtype=torch.float64, device=total.device)])
