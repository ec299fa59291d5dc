"""The n:m pattern itself: two integers and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_step.errors import ArgumentTypeError, PatternError

__all__ = ["NMPattern"]


@dataclass(frozen=True, order=True)
class NMPattern:
    r"""Keep ``n`` of every ``m`` consecutive weights along the input (reduction) dimension.

    ``n`` counts the weights that are **kept**, as in the paper; some tools count zeros. ``n == m`` keeps everything.

    Args:
        n: Weights kept in every group, ``1 <= n <= m``.
        m: Weights in a group, at least 2.

    Raises:
        ArgumentTypeError: If ``n`` or ``m`` is not an integer.
        PatternError: If ``m < 2``, ``n < 1`` or ``n > m``.

    Example:
        >>> pattern = NMPattern(2, 4)
        >>> str(pattern), pattern.density, pattern.choices, pattern.index_bits
        ('2:4', 0.5, 6, 3)

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, section 2.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(
                    f"Expected `{name}` to be an integer, but got {value!r} of type {type(value).__name__}. "
                    "Write the pattern 2:4 as two integers, n=2 and m=4."
                )
        if self.m < 2:
            raise PatternError(
                f"Expected `m` >= 2, but got m={self.m}. A group of fewer than two weights has nothing to choose from."
            )
        if not 1 <= self.n <= self.m:
            raise PatternError(
                f"Expected 1 <= n <= m, but got n={self.n} and m={self.m}. "
                "n is the number of weights KEPT in every group of m."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of weights kept, ``n / m``.

        Example:
            >>> NMPattern(1, 8).density
            0.125
        """
        return self.n / self.m

    @property
    def choices(self) -> int:
        r"""Number of different masks of one group, :math:`\binom{m}{n}`.

        Example:
            >>> NMPattern(3, 8).choices
            56
        """
        return math.comb(self.m, self.n)

    @property
    def index_bits(self) -> int:
        r"""Bits that name one mask of a group, :math:`\lceil \log_2 \binom{m}{n} \rceil`.

        Example:
            >>> [NMPattern(n, m).index_bits for n, m in ((2, 4), (1, 16), (4, 4))]
            [3, 4, 0]
        """
        return (self.choices - 1).bit_length()
