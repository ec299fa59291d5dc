r"""Exact packing of n:m tensors: the kept values, and the rank of each group's mask in as few bits as will do.

Note [Mask rank]
    The kept places :math:`c_1 < c_2 < \dots < c_n` of a group are numbered by the combinatorial number system,
    :math:`r = \sum_j \binom{c_j}{j}`, which is a bijection onto :math:`0 \dots \binom{m}{n}-1`. It takes
    :math:`\lceil\log_2\binom{m}{n}\rceil` bits. Where that is more than 62, so that ranks would not fit a signed 64-bit
    integer, the ``m`` bits of the mask itself are stored; 30:66 to 36:66 are the first such patterns.
    Groups follow one another without padding; within a field and within a byte the low bit comes first.
    ``docs/packed-format.md`` states the layout byte by byte.

Note [Tables]
    Which places are kept, and their rank, follow from which weights of a group are not plus zero: ``m`` bits. Up to m = 8,
    and up to 16 for tensors that are worth it, both are looked up in tables of ``2**m`` rows; the arithmetic that other
    patterns take makes them. The smallest groups are not even taken apart, see Note [Words]. Everything runs over a slice of
    the groups at a time, so that it stays in the cache and takes memory for a slice, not for the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_step.errors import PatternError, ViolationError
from lightning_step.functional.mask import as_groups, nm_mask
from lightning_step.functional.ranks import (
    bits_from_bytes,
    bits_to_bytes,
    numbers_from_bytes,
    numbers_to_bytes,
    places_of,
    ranks_of,
)
from lightning_step.functional.stats import find_violation
from lightning_step.functional.words import as_integers, put_kept, suits_words, take_kept, words_ready
from lightning_step.pattern import NMPattern

__all__ = ["Packed", "check_packable", "index_bytes", "index_width", "pack_nm", "unpack_nm"]

_MAX_RANK_BITS = 62
# What bounds time and memory of reading a file from a stranger: it unpacks to at most so many times its size.
_MAX_GROUP, _MAX_GROWTH = 65_536, 1024
_SLICE = 2**20  # weights that are worked on at a time


@dataclass(frozen=True)
class Packed:
    """An n:m tensor without its zeros.

    Example:
        >>> pack_nm(torch.tensor([[0., 5., 0., 7.]]), NMPattern(2, 4)).values
        tensor([[5., 7.]])
    """

    values: Tensor  # (groups, n), dtype of the weight; groups in row-major order with the group dimension moved last
    index: Tensor  # (bytes,), uint8; the mask of every group, see Note [Mask rank]


def index_width(pattern: NMPattern) -> int:
    """Bits that a group's mask takes in a packed tensor.

    Args:
        pattern: The n:m pattern.

    Returns:
        Number of bits, see Note [Mask rank].

    Example:
        >>> index_width(NMPattern(2, 4)), index_width(NMPattern(50, 100))
        (3, 100)
    """
    return pattern.m if _is_wide(pattern) else pattern.index_bits


def index_bytes(pattern: NMPattern, groups: int) -> int:
    """Bytes that the masks of so many groups take.

    Args:
        pattern: The n:m pattern.
        groups: Number of groups.

    Returns:
        Number of bytes, the last one filled up with zero bits.

    Example:
        >>> index_bytes(NMPattern(2, 4), 3)
        2
    """
    return -(-groups * index_width(pattern) // 8)


def check_packable(pattern: NMPattern) -> None:
    """Refuse a pattern that nobody packs.

    Args:
        pattern: The n:m pattern.

    Raises:
        PatternError: If ``m`` is above 65,536 or above ``1024 * n``.

    Example:
        >>> check_packable(NMPattern(1, 1025))
        Traceback (most recent call last):
        lightning_step.errors.PatternError: Expected m <= 65536 and m <= 1024 * n in a packed tensor, but got 1:1025. ...
    """
    if pattern.m > min(_MAX_GROUP, _MAX_GROWTH * pattern.n):
        raise PatternError(
            f"Expected m <= {_MAX_GROUP} and m <= {_MAX_GROWTH} * n in a packed tensor, but got {pattern}. "
            "Store it dense, with its zeros."
        )


def pack_nm(weight: Tensor, pattern: NMPattern, dim: int = -1) -> Packed:
    """Pack a tensor that holds its n:m pattern; nothing is pruned.

    Args:
        weight: Any real dtype, shape ``(..., k*m, ...)``, at most ``n`` non-zeros in every group. Not modified.
        pattern: The n:m pattern.
        dim: The dimension that holds the groups.

    Returns:
        Values and index. A zero that is not among the kept places is stored as plus zero, whatever its sign was.

    Raises:
        PatternError: If ``m`` does not divide ``weight.shape[dim]``, is above 65,536 or above ``1024 * n``.
        ViolationError: If a group has more than ``n`` non-zeros.

    Example:
        >>> packed = pack_nm(torch.tensor([[0., 5., 0., 7.]]), NMPattern(2, 4))
        >>> packed.index.tolist()
        [4]
        >>> unpack_nm(packed, NMPattern(2, 4), (1, 4))
        tensor([[0., 5., 0., 7.]])
    """
    check_packable(pattern)
    weight = weight.detach()
    rows = as_groups(weight.movedim(dim, -1), pattern).reshape(-1, pattern.m)  # (groups, m)
    values = as_integers(rows.new_empty(len(rows), pattern.n))
    index = torch.empty(index_bytes(pattern, len(rows)), dtype=torch.uint8, device=rows.device)
    for groups, places_in_file in _slices(len(rows), pattern):
        fields = _pack(rows[groups], pattern, len(rows), values[groups])
        if fields is None:
            raise ViolationError(_broken(weight, pattern, dim))
        index[places_in_file] = fields
    return Packed(values.view(weight.dtype), index)


def unpack_nm(packed: Packed, pattern: NMPattern, shape: tuple[int, ...], dim: int = -1) -> Tensor:
    """Undo `pack_nm`, bit for bit.

    Args:
        packed: Values and index.
        pattern: The pattern it was packed with.
        shape: Shape of the dense tensor.
        dim: The dimension it was packed along.

    Returns:
        The dense tensor, plus zero where nothing was kept.

    Raises:
        PatternError: If the sizes of values or index do not fit the shape, the index names a mask that does not exist, or
            nobody packs such a pattern. Sizes are compared before anything is allocated.

    Example:
        >>> unpack_nm(Packed(torch.tensor([[1., 2.]]), torch.tensor([5], dtype=torch.uint8)), NMPattern(2, 4), (4,))
        tensor([0., 0., 1., 2.])
    """
    check_packable(pattern)
    groups = math.prod(shape) // pattern.m
    if shape[dim] % pattern.m or packed.values.shape != (groups, pattern.n):
        raise PatternError(
            f"Expected values of shape {(groups, pattern.n)} for a tensor of shape {shape} packed {pattern} along dim "
            f"{dim}, but got {tuple(packed.values.shape)}. The file and its manifest do not belong together."
        )
    if packed.index.numel() != index_bytes(pattern, groups):
        raise PatternError(
            f"Expected {index_bytes(pattern, groups)} bytes of index for {groups} groups of {pattern}, "
            f"but got {packed.index.numel()}. The file and its manifest do not belong together."
        )
    if not groups:
        return packed.values.new_zeros(shape)
    values = as_integers(packed.values)
    rows = values.new_empty(groups, pattern.m)
    for some, places_in_file in _slices(groups, pattern):
        _unpack(values[some], packed.index[places_in_file], pattern, groups, rows[some])
    moved = list(shape)
    moved.append(moved.pop(dim))
    return rows.reshape(moved).movedim(-1, dim).contiguous().view(packed.values.dtype)


def _slices(groups: int, pattern: NMPattern) -> Iterator[tuple[slice, slice]]:
    """Groups to work on at a time, and the bytes of the index that are theirs alone."""
    step = max(_SLICE // pattern.m // 8, 1) * 8  # fields of eight groups end where a byte ends
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield slice(start, stop), slice(index_bytes(pattern, start), index_bytes(pattern, stop))


def _pack(rows: Tensor, pattern: NMPattern, groups: int, values: Tensor) -> Tensor | None:
    """Move the kept weights to ``values``; gives the bytes of their masks, None if a group has more than ``n`` non-zeros."""
    if suits_words(pattern, rows.dtype.itemsize):
        ranks = take_kept(words_ready(as_integers(rows)), pattern, values)
        if ranks is not None:
            return numbers_to_bytes(ranks, index_width(pattern))
    kept = _kept(rows, pattern, groups)
    if kept is None:
        return None
    places, fields = kept
    torch.gather(as_integers(rows), 1, places, out=values)
    return fields


def _unpack(values: Tensor, index: Tensor, pattern: NMPattern, groups: int, rows: Tensor) -> None:
    if suits_words(pattern, rows.dtype.itemsize):
        put_kept(values, _ranks_from(index, pattern, len(rows)), pattern, rows)
    else:
        rows.zero_().scatter_(1, _places_from(index, pattern, len(rows), groups), values)


def _kept(rows: Tensor, pattern: NMPattern, groups: int) -> tuple[Tensor, Tensor] | None:
    """Kept places, (groups, n), and the bytes of their masks; None if a group has more non-zeros than ``n``."""
    if _has_table(pattern, groups):
        table = _table(pattern, rows.device)
        bits = (as_integers(rows) != 0).to(torch.float32) @ table.weights  # exact: sums of 16 different powers of two
        codes = bits.to(torch.int32)
        if not bool(table.full[codes].any()):
            return table.places[codes], numbers_to_bytes(table.ranks[codes], index_width(pattern))
    # More than n are not plus zero: minus zeros without room, which are dropped, or weights, which are not.
    if bool(((rows != 0).sum(1) > pattern.n).any()):
        return None
    places = _kept_places(rows, pattern)
    if _is_wide(pattern):
        return places, bits_to_bytes(places.new_zeros(len(rows), pattern.m, dtype=torch.uint8).scatter_(1, places, 1))
    return places, numbers_to_bytes(ranks_of(places, pattern), index_width(pattern))


def _broken(weight: Tensor, pattern: NMPattern, dim: int) -> str:
    bad = find_violation(weight, pattern, dim)
    found = "more" if bad is None else f"{bad.nonzeros} in group {bad.index} ({bad.groups} groups in all)"
    return (
        f"Expected at most {pattern.n} non-zero weights in every group of {pattern.m} along dim {dim}, but got {found}. "
        "Apply the mask before packing."
    )


class _Table(NamedTuple):
    """By the number whose bit i says that weight i of a group is not plus zero."""

    weights: Tensor  # (m,), powers of two
    full: Tensor  # (2**m,), bool: more than n of them
    places: Tensor  # (2**m, n), int64
    ranks: Tensor  # (2**m,), int64


def _has_table(pattern: NMPattern, groups: int) -> bool:
    return pattern.m <= 8 or (pattern.m <= 16 and groups >= 2**pattern.m)


@lru_cache(maxsize=16)
def _table(pattern: NMPattern, device: torch.device) -> _Table:
    codes = torch.arange(2**pattern.m, device=device)
    bits = (codes[:, None] >> torch.arange(pattern.m, device=device)) & 1
    places = _kept_places(bits, pattern)
    weights = 2.0 ** torch.arange(pattern.m, device=device)
    return _Table(weights, bits.sum(1) > pattern.n, places, ranks_of(places, pattern))


@lru_cache(maxsize=16)
def _places_by_rank(pattern: NMPattern, device: torch.device) -> Tensor:
    return places_of(torch.arange(pattern.choices, device=device), pattern)


def _is_wide(pattern: NMPattern) -> bool:
    """Whether masks are stored themselves, because ranks would not fit."""
    # C(66, 33) has 63 bits; to count the masks of a far larger group would take minutes.
    return min(pattern.n, pattern.m - pattern.n) > 32 or pattern.index_bits > _MAX_RANK_BITS


def _kept_places(rows: Tensor, pattern: NMPattern) -> Tensor:
    # Non-zeros first, then minus zeros, so that a kept weight that happens to be -0.0 comes back with its sign.
    score = 2 * (rows != 0).to(torch.int8)
    if rows.dtype.is_floating_point:
        score += (rows.float() if rows.dtype.itemsize == 1 else rows).signbit()  # float8 has no signbit kernel
    kept = nm_mask(score, pattern)
    return kept.nonzero()[:, 1].reshape(-1, pattern.n)


def _places_from(index: Tensor, pattern: NMPattern, count: int, groups: int) -> Tensor:
    if _is_wide(pattern):
        fields = bits_from_bytes(index, count, pattern.m)
        if bool((fields.sum(1) != pattern.n).any()):
            raise PatternError(f"Expected {pattern.n} set bits in every mask, but got another number. The index is damaged.")
        return fields.nonzero()[:, 1].reshape(-1, pattern.n)
    ranks = _ranks_from(index, pattern, count)
    return _places_by_rank(pattern, index.device)[ranks] if _has_table(pattern, groups) else places_of(ranks, pattern)


def _ranks_from(index: Tensor, pattern: NMPattern, count: int) -> Tensor:
    ranks = numbers_from_bytes(index, count, index_width(pattern))
    if count and int(ranks.max()) >= pattern.choices:
        raise PatternError(
            f"Expected mask ranks below {pattern.choices} for {pattern}, but got {int(ranks.max())}. The index is damaged."
        )
    return ranks
