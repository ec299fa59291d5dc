r"""How fast masks tighten: from wide patterns to narrow ones, or from faint masks to full strength.

Both are functions of the steps gone by and the steps there are, in whole numbers, so that a frame begins at the same step
on every machine and after every resume.
"""

from __future__ import annotations

import math
from typing import Literal

from lightning_step.pattern import NMPattern

__all__ = ["Fading", "decay_frames", "mask_decay", "structure_decay"]

Fading = Literal["linear", "exponential"]
"""How the factor of pruned weights falls from 1 to 0."""


def decay_frames(pattern: NMPattern) -> tuple[NMPattern, ...]:
    r"""The patterns a tensor goes through on its way to n:m.

    .. math:: (m{-}1){:}m,\; \lfloor m/2 \rfloor{:}m,\; \lfloor m/4 \rfloor{:}m,\; \dots,\; n{:}m

    Args:
        pattern: The n:m at the end.

    Returns:
        Patterns of one m, each narrower than the one before; n:m is the last, and the only one where nothing is between.

    Example:
        >>> [str(frame) for frame in decay_frames(NMPattern(1, 8))]
        ['7:8', '4:8', '2:8', '1:8']

    References:
        Kao et al., `Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask
        <https://arxiv.org/abs/2209.07617>`_, 2022, structure decay.
    """
    n, m = pattern.n, pattern.m
    halves = [m >> i for i in range(1, m.bit_length())]  # m/2, m/4, ... down to 1
    kept = sorted({m - 1, *halves}, reverse=True)
    return (*(NMPattern(k, m) for k in kept if k > n), pattern)


def structure_decay(pattern: NMPattern, elapsed: int, length: int) -> NMPattern:
    r"""The pattern of a step, when all frames but the last are of one length.

    .. math:: \mathrm{frame}\Big(\Big\lfloor (F-1)\,\frac{\mathrm{elapsed}}{\mathrm{length}} \Big\rfloor\Big), \qquad
        n{:}m \text{ once } \mathrm{elapsed} \ge \mathrm{length}

    Args:
        pattern: The n:m at the end, the last of :math:`F` frames.
        elapsed: Steps since the first frame began.
        length: Steps from the first frame to n:m. 0 or less: n:m at once.

    Returns:
        The pattern now.

    Example:
        >>> [str(structure_decay(NMPattern(1, 4), t, 4)) for t in range(0, 6)]
        ['3:4', '3:4', '2:4', '2:4', '1:4', '1:4']
    """
    if elapsed >= length:
        return pattern
    frames = decay_frames(pattern)
    return frames[(len(frames) - 1) * max(0, elapsed) // length]


def mask_decay(elapsed: int, length: int, fading: Fading = "linear", last: float = 1e-3) -> float:
    r"""What pruned weights are multiplied with: 1 at the start, 0 at the end and ever after.

    .. math:: \beta = 1 - \tfrac{\mathrm{elapsed}}{\mathrm{length}} \;\text{(linear)}, \qquad
        \beta = \mathrm{last}^{\,\mathrm{elapsed}/\mathrm{length}} \;\text{(exponential)}

    Args:
        elapsed: Steps since the decay began.
        length: Steps until it ends. 0 or less: 0 at once.
        fading: Which of the two.
        last: Where the exponential form, which never reaches 0 by itself, is cut off.

    Returns:
        The factor, from 0 to 1.

    Example:
        >>> mask_decay(1, 4), round(mask_decay(2, 4, "exponential", last=0.01), 6), mask_decay(4, 4, "exponential")
        (0.75, 0.1, 0.0)

    References:
        Kao et al., 2022, mask decay.
    """
    if elapsed >= length:
        return 0.0
    share = max(0, elapsed) / length
    return 1 - share if fading == "linear" else math.exp(share * math.log(last))
