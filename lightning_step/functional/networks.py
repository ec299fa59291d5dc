"""Which of m scores are kept, decided by comparing them element-wise: no group is ever sorted.

The m scores of a group lie in m tensors, one per place, so that every comparison runs over all groups at once. Scores must
be comparable (no NaN); of equal ones the earlier is kept, see Note [Tie-breaking].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["keep_largest"]


def keep_largest(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """Keep the ``n`` largest of every group.

    Args:
        parts: The scores at each place of the groups, alike in shape and dtype. At least two.
        n: How many to keep; fewer than there are places.

    Returns:
        What is kept at each place, boolean.

    Example:
        >>> [kept.tolist() for kept in keep_largest([torch.tensor([1, 5]), torch.tensor([2, 5])], 1)]
        [[False, True], [True, False]]
    """
    if n == 1:
        return _largest(parts)
    if (n, len(parts)) == (2, 4):
        return _two_of_four(parts)
    return _pairwise(parts, n)


def _largest(parts: Sequence[Tensor]) -> list[Tensor]:
    """A running maximum: what is larger than all before it is kept if nothing after it is larger still."""
    best, larger = parts[0], []
    for part in parts[1:]:
        larger.append(part > best)
        best = torch.maximum(best, part)
    later = larger.pop()
    kept = [later]
    for rises in reversed(larger):
        kept.append(rises > later)  # of booleans: this one and not that one
        later = later | rises
    return [~later, *reversed(kept)]


def _two_of_four(parts: Sequence[Tensor]) -> list[Tensor]:
    """A tournament: both of one pair are kept if its loser beats the winner of the other, else both winners."""
    a, b, c, d = parts
    first, third = a >= b, c >= d
    front = torch.minimum(a, b) >= torch.maximum(c, d)
    back = torch.minimum(c, d) > torch.maximum(a, b)
    # x > y of booleans is x and not y, x >= y is x or not y
    return [(first | front) > back, (front >= first) > back, (third | back) > front, (back >= third) > front]


def _pairwise(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """Every score against every other one; what loses fewer than n times is kept."""
    last = len(parts) - 1
    losses = [torch.full_like(part, last - i, dtype=torch.uint8) for i, part in enumerate(parts)]  # to all behind, at first
    for i, earlier in enumerate(parts):
        for j in range(i + 1, len(parts)):
            earlier_wins = earlier >= parts[j]
            losses[j] += earlier_wins
            losses[i] -= _numbers(earlier_wins)
    return [lost < n for lost in losses]


def _numbers(flags: Tensor) -> Tensor:
    """Ones and zeros. A view costs nothing, but Inductor of torch 2.11 has none of booleans, and fuses a copy anyway."""
    return flags.to(torch.uint8) if torch.compiler.is_compiling() else flags.view(torch.uint8)
