"""Setting to zero what a mask drops, by the bits of the numbers.

Note [Bits and a mask]
    A boolean, read as an integer, is one or zero: the bits of a number, read as an integer and multiplied with it, stay as
    they are, or become those of plus zero. On a CPU that takes a tenth of the time of ``torch.where`` or ``masked_fill``,
    which are not vectorized there. It is done in blocks, because the mask is widened to the integers of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_step.compiling import is_traced

__all__ = ["INTEGERS", "as_laid_out", "block_elements", "keep_", "kept_part"]

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
"""The integers that are as wide."""

_SMALL = 2**12  # up to so many elements one call that is not vectorized costs less than several that are
_BLOCK = 2**15  # elements of each thread, in cache; torch gives a thread no fewer


def block_elements() -> int:
    """How many elements a step over a block should have on a CPU.

    Returns:
        As many as all threads work on at once without leaving the cache.

    Example:
        >>> block_elements() >= 2**15
        True
    """
    return _BLOCK * torch.get_num_threads()


def as_laid_out(tensor: Tensor) -> list[int]:
    """The dimensions in the order they have in memory, so that a permuted tensor is read as it lies.

    Args:
        tensor: Any tensor.

    Returns:
        A permutation of its dimensions.

    Example:
        >>> as_laid_out(torch.ones(2, 3).t())
        [1, 0]
    """
    strides: tuple[int, ...] = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d] if tensor.shape[d] > 1 else 0)


def keep_(tensor: Tensor, mask: Tensor) -> None:
    """Set to plus zero what a mask drops, in place and outside of any graph.

    Args:
        tensor: Any dtype. Modified.
        mask: Boolean, the shape of ``tensor``.

    Example:
        >>> keep_(weight := torch.tensor([1.0, -2.0]), torch.tensor([True, False]))
        >>> weight
        tensor([1., 0.])
    """
    tensor = tensor.detach()
    flat = _flat(tensor, mask)
    if flat is None:
        tensor.masked_fill_(~mask, 0)
        return
    for bits, kept in _blocks(*flat):
        bits.mul_(kept)


def kept_part(tensor: Tensor, mask: Tensor, *, of: bool = True) -> Tensor:
    """What a mask keeps, or drops; plus zero elsewhere. Outside of any graph.

    Args:
        tensor: Any dtype. Not modified.
        mask: Boolean, the shape of ``tensor``.
        of: Which value of the mask stands for what stays.

    Returns:
        A new tensor.

    Example:
        >>> kept_part(torch.tensor([1.0, -2.0]), torch.tensor([True, False]), of=False)
        tensor([ 0., -2.])
    """
    tensor = tensor.detach()
    flat = _flat(tensor, mask)
    if flat is None:
        zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        return torch.where(mask, tensor, zero) if of else torch.where(mask, zero, tensor)
    result = torch.empty_like(tensor)
    for bits, kept, to in _blocks(*flat, _in_order(result, tensor).view(INTEGERS[tensor.dtype])):
        torch.mul(bits, kept if of else kept ^ 1, out=to)
    return result


def _blocks(*flat: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Blocks of tensors of one size."""
    size = block_elements()
    if flat[0].numel() <= size:
        return (flat,)
    return zip(*(torch.split(each, size) for each in flat), strict=True)


def _flat(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as integers, in the order of memory; None where another way is faster, or nobody knows the bits."""
    if tensor.device.type != "cpu" or tensor.numel() <= _SMALL or tensor.dtype not in INTEGERS:
        return None
    if type(tensor) is not Tensor or type(mask) is not Tensor or mask.dtype != torch.bool or is_traced():
        return None
    if mask.shape != tensor.shape or mask.stride() != tensor.stride():
        return None
    dense = _in_order(tensor, tensor)
    if not dense.is_contiguous():
        return None
    return dense.view(INTEGERS[tensor.dtype]), _in_order(mask, tensor).view(torch.int8)


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """One dimension, in the order that another one has in memory; all of them, if it has gaps."""
    if not like.is_contiguous():
        tensor = tensor.permute(as_laid_out(like))
    return tensor.view(-1) if tensor.is_contiguous() else tensor
