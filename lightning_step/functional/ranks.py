r"""Masks as numbers, and numbers of a few bits as bytes: the two steps behind packing.

The kept places :math:`c_1 < \dots < c_n` of a group have the rank :math:`\sum_j \binom{c_j}{j}` among all its masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_step.pattern import NMPattern

__all__ = ["bits_from_bytes", "bits_to_bytes", "numbers_from_bytes", "numbers_to_bytes", "places_of", "ranks_of"]

_WORD = 7  # eight numbers of up to so many bits fit a signed 64-bit integer


def ranks_of(places: Tensor, pattern: NMPattern) -> Tensor:
    """The rank of every mask.

    Args:
        places: Kept places, ascending, shape ``(groups, n)``, int64.
        pattern: The n:m pattern.

    Returns:
        Shape ``(groups,)``, int64.

    Example:
        >>> ranks_of(torch.tensor([[0, 1], [2, 3]]), NMPattern(2, 4))
        tensor([0, 5])
    """
    table = _binomials(pattern, places.device)
    ranks = torch.zeros_like(places[:, 0])
    for j in range(pattern.n):
        ranks += table[j][places[:, j] - j]
    return ranks


def places_of(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """Undo `ranks_of`.

    Args:
        ranks: Below ``pattern.choices``, shape ``(groups,)``, int32 or int64.
        pattern: The n:m pattern.

    Returns:
        Kept places, shape ``(groups, n)``, int64.

    Example:
        >>> places_of(torch.tensor([0, 5]), NMPattern(2, 4))
        tensor([[0, 1],
                [2, 3]])
    """
    table = _binomials(pattern, ranks.device)
    ranks = ranks.long()
    places = torch.empty(len(ranks), pattern.n, dtype=torch.long, device=ranks.device)
    for j in reversed(range(pattern.n)):  # the largest c with C(c, j+1) <= r is the place of the j-th kept weight
        above = torch.searchsorted(table[j], ranks, right=True) - 1
        places[:, j] = above + j
        ranks = ranks - table[j][above]
    return places


def _binomials(pattern: NMPattern, device: torch.device) -> Tensor:
    """Row j holds C(j+i, j+1) for i = 0 .. m-n: the j-th kept weight is at one of the places j+i. (n, m-n+1), int64."""
    rows = [[math.comb(j + i, j + 1) for i in range(pattern.m - pattern.n + 1)] for j in range(pattern.n)]
    return torch.tensor(rows, dtype=torch.long, device=device)


def numbers_to_bytes(numbers: Tensor, width: int) -> Tensor:
    """Numbers of ``width`` bits, one behind the other; the lowest bit comes first.

    Args:
        numbers: Shape ``(count,)``, int32 or int64.
        width: Bits of each, up to 62.

    Returns:
        Bytes, the last one filled up with zero bits.

    Example:
        >>> numbers_to_bytes(torch.tensor([5, 3, 4]), 3)
        tensor([29,  1], dtype=torch.uint8)
    """
    if width > _WORD:
        return bits_to_bytes((numbers[:, None] >> torch.arange(width, device=numbers.device)) & 1)
    count = -(-len(numbers) * width // 8)
    words = torch.nn.functional.pad(numbers.to(_word(width)), (0, -len(numbers) % 8)).reshape(-1, 8)
    for step in (1, 2, 4):  # neighbours become one, three times: 8 * width bits
        words = words[:, 0::2] | (words[:, 1::2] << (step * width))
    shifts = 8 * torch.arange(width, dtype=words.dtype, device=words.device)
    return ((words >> shifts) & 255).to(torch.uint8).flatten()[:count]


def numbers_from_bytes(data: Tensor, count: int, width: int) -> Tensor:
    """Undo `numbers_to_bytes`.

    Args:
        data: The bytes.
        count: How many numbers.
        width: Bits of each, up to 62.

    Returns:
        Shape ``(count,)``, int32 up to 3 bits and int64 above.

    Example:
        >>> numbers_from_bytes(torch.tensor([29, 1], dtype=torch.uint8), 3, 3)
        tensor([5, 3, 4], dtype=torch.int32)
    """
    if width > _WORD:
        fields = bits_from_bytes(data, count, width).long()
        shifted: Tensor = fields << torch.arange(width, device=data.device)
        return shifted.sum(1)
    if width == 0:
        return torch.zeros(count, dtype=torch.long, device=data.device)
    padded = torch.nn.functional.pad(data, (0, -len(data) % width)).reshape(-1, width)
    words = padded[:, 0].to(_word(width))
    for k in range(1, width):
        words |= padded[:, k].to(words.dtype) << (8 * k)
    shifts = width * torch.arange(8, dtype=words.dtype, device=data.device)
    numbers: Tensor = (words[:, None] >> shifts) & (2**width - 1)
    return numbers.flatten()[:count]


def _word(width: int) -> torch.dtype:
    """Holds eight numbers of so many bits; half the traffic where they are small."""
    return torch.int32 if 8 * width < 32 else torch.int64


def bits_to_bytes(bits: Tensor) -> Tensor:
    """Rows of bits, one behind the other, eight to a byte.

    Args:
        bits: Zeros and ones, any integer dtype, shape ``(groups, width)``.

    Returns:
        Bytes, the last one filled up with zero bits.

    Example:
        >>> bits_to_bytes(torch.tensor([[1, 0, 1]]))
        tensor([5], dtype=torch.uint8)
    """
    stream = bits.flatten().long()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def bits_from_bytes(data: Tensor, groups: int, width: int) -> Tensor:
    """Undo `bits_to_bytes`.

    Args:
        data: The bytes.
        groups: How many rows.
        width: Bits of each.

    Returns:
        Zeros and ones, uint8, shape ``(groups, width)``.

    Example:
        >>> bits_from_bytes(torch.tensor([5], dtype=torch.uint8), 2, 3)
        tensor([[1, 0, 1],
                [0, 0, 0]], dtype=torch.uint8)
    """
    bits = (data[:, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return bits.flatten()[: groups * width].reshape(groups, width)
