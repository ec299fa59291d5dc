r"""Kept weights moved by shifts of whole words: the fast way for the small groups that hardware knows.

Note [Words]
    A group of m weights of s bytes is one word of up to eight bytes, or several of eight, with :math:`q` weights each. To
    take out the j-th kept weight is to shift the word that holds it, and to put weight :math:`u_j` back is to add
    :math:`u_j \cdot 2^{8 s (c_j \bmod q)}`. How far is looked up by the number of the mask. This is several times as fast as
    gathering and scattering single weights, as long as a group takes few words; both ways give the same bits.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_step.functional.ranks import places_of, ranks_of
from lightning_step.pattern import NMPattern

__all__ = ["as_integers", "mask_numbers", "put_kept", "suits_words", "take_kept", "words_ready"]

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}  # eight bytes are never widened
_MOVES = 8  # shifts per group, from which on gathering is as fast


def as_integers(tensor: Tensor) -> Tensor:
    """The same bits as integers, which no kernel rewrites.

    Args:
        tensor: Any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        A view; uint8 for one byte, signed integers else.

    Example:
        >>> as_integers(torch.tensor([1.0]))
        tensor([1065353216], dtype=torch.int32)
    """
    # Half-precision scatter goes through float32, which rewrites signalling NaNs; float8 has no gather and no scatter.
    return tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else _SIGNED[tensor.dtype.itemsize])


def suits_words(pattern: NMPattern, itemsize: int) -> bool:
    """Whether groups are moved as words; see Note [Words].

    Args:
        pattern: The n:m pattern.
        itemsize: Bytes of a weight.

    Returns:
        True for n:2, n:4 and n:8 whose groups take few words.

    Example:
        >>> suits_words(NMPattern(2, 4), 2), suits_words(NMPattern(8, 16), 2)
        (True, False)
    """
    few = pattern.n * max(pattern.m * itemsize // 8, 1) <= _MOVES
    return few and pattern.m in (2, 4, 8) and sys.byteorder == "little"


def mask_numbers(nonzero: Tensor) -> Tensor:
    r"""The number :math:`\sum_i b_i 2^i` of every group's mask.

    Args:
        nonzero: Boolean, contiguous, shape ``(groups, m)``, m one of 2, 4 and 8.

    Returns:
        Shape ``(groups,)``, int32 or int64.

    Example:
        >>> mask_numbers(torch.tensor([[True, False, False, True]]))
        tensor([9], dtype=torch.int32)
    """
    m = nonzero.shape[1]
    bytes_ = nonzero.view(_SIGNED[m]).squeeze(1)  # bit i of the mask is bit 8i of this
    wide = bytes_ if m == 8 else bytes_.to(torch.int32)
    # One product brings them together behind bit 8(m-1): the summand for i is 2^(8(m-1) - 7i), and no two others meet.
    gathered = wide * sum(1 << (8 * (m - 1) - 7 * i) for i in range(m))
    return gathered.bitwise_right_shift_(8 * (m - 1)).bitwise_and_((1 << m) - 1)


def words_ready(rows: Tensor) -> Tensor:
    """Rows that can be read as words.

    Args:
        rows: Integers, shape ``(groups, m)``.

    Returns:
        The same rows, copied if they lie apart or begin in the middle of a word.

    Example:
        >>> flat = torch.arange(9, dtype=torch.int16)
        >>> words_ready(flat[1:].view(2, 4)).storage_offset(), words_ready(flat[4:8].view(1, 4)).storage_offset()
        (0, 4)
    """
    rows = rows.contiguous()
    return rows.clone() if rows.storage_offset() % rows.shape[1] else rows


def take_kept(rows: Tensor, pattern: NMPattern, values: Tensor) -> Tensor | None:
    """Move the kept weights of every group out.

    Args:
        rows: From `words_ready`, shape ``(groups, m)``.
        pattern: One that `suits_words`.
        values: Where to, integers of the same size, shape ``(groups, n)``.

    Returns:
        Ranks of the masks, shape ``(groups,)``; None if a group holds more than ``n`` weights that are not plus zero.

    Example:
        >>> rows, values = torch.tensor([[0, 5, 0, 7]]), torch.empty(1, 2, dtype=torch.long)
        >>> take_kept(rows, NMPattern(2, 4), values), values
        (tensor([4], dtype=torch.int32), tensor([[5, 7]]))
    """
    table = _by_mask(pattern, rows.dtype.itemsize, rows.device)
    masks = mask_numbers(rows != 0)
    ranks = table.ranks.index_select(0, masks)
    if len(ranks) and int(ranks.min()) < 0:
        return None
    words = _as_words(rows)
    for j in range(pattern.n):
        parts = (words[:, k] >> table.shifts[j, k].index_select(0, masks) for k in range(words.shape[1]))
        if words.shape[1] == 1:  # what is above the weight is cut off when it is stored
            values[:, j] = next(parts)
        else:
            values[:, j] = sum(part & table.lanes[j, k].index_select(0, masks) for k, part in enumerate(parts))
    return ranks


def put_kept(values: Tensor, ranks: Tensor, pattern: NMPattern, rows: Tensor) -> None:
    """Undo `take_kept`.

    Args:
        values: Integers, shape ``(groups, n)``.
        ranks: Of the masks, all below C(m, n), shape ``(groups,)``.
        pattern: One that `suits_words`.
        rows: Where to, from `words_ready`, shape ``(groups, m)``; every place is written.

    Example:
        >>> rows = torch.empty(1, 4, dtype=torch.long)
        >>> put_kept(torch.tensor([[5, 7]]), torch.tensor([4]), NMPattern(2, 4), rows)
        >>> rows
        tensor([[0, 5, 0, 7]])
    """
    factors = _by_rank(pattern, values.dtype.itemsize, values.device)
    unsigned = values.view(_UNSIGNED[values.dtype.itemsize])
    kept = [unsigned[:, j].to(torch.int64) for j in range(pattern.n)]
    words = _as_words(rows)
    for k in range(words.shape[1]):
        word = kept[0] * factors[0, k].index_select(0, ranks)
        for j in range(1, pattern.n):
            word.addcmul_(kept[j], factors[j, k].index_select(0, ranks))
        words[:, k] = word


def _as_words(rows: Tensor) -> Tensor:
    return rows.view(_SIGNED[min(rows.shape[1] * rows.dtype.itemsize, 8)])  # (groups, words)


class _ByMask(NamedTuple):
    """By the number whose bit i says that weight i of a group is not plus zero."""

    ranks: Tensor  # (2**m,), int32; -1 where more than n are
    shifts: Tensor  # (n, words, 2**m), int64: how far the j-th kept weight lies up in word k
    lanes: Tensor  # (n, words, 2**m), int64: all ones of its width if it lies in word k, else zero


@lru_cache(maxsize=32)
def _by_mask(pattern: NMPattern, itemsize: int, device: torch.device) -> _ByMask:
    numbers = torch.arange(2**pattern.m, device=device)
    bits = (numbers[:, None] >> torch.arange(pattern.m, device=device)) & 1
    # Where fewer than n are set, the first others fill up: a stable sort puts them in that order behind the set ones.
    places = bits.sort(dim=1, descending=True, stable=True).indices[:, : pattern.n].sort(dim=1).values
    ranks = torch.where(bits.sum(1) > pattern.n, -1, ranks_of(places, pattern)).to(torch.int32)
    inside, shifts = _lie(places, pattern, itemsize)
    ones = -1 if itemsize == 8 else (1 << 8 * itemsize) - 1
    return _ByMask(ranks, shifts, inside * ones)


@lru_cache(maxsize=32)
def _by_rank(pattern: NMPattern, itemsize: int, device: torch.device) -> Tensor:
    """(n, words, C(m, n)), int64: what the j-th kept weight is multiplied by in word k."""
    places = places_of(torch.arange(pattern.choices, device=device), pattern)
    inside, shifts = _lie(places, pattern, itemsize)
    return inside << shifts


def _lie(places: Tensor, pattern: NMPattern, itemsize: int) -> tuple[Tensor, Tensor]:
    """Whether the kept weights (masks, n) lie in word k, and how far up; each (n, words, masks), int64, contiguous."""
    each = min(8 // itemsize, pattern.m)  # weights in a word
    word = torch.arange(pattern.m // each, device=places.device)
    inside = (places.T[:, None] // each == word[:, None]).long()
    return inside, (inside * (places.T[:, None] % each) * (8 * itemsize)).contiguous()
