"""How much faster masked weights may be trained than dense ones."""

from __future__ import annotations

from lightning_step.pattern import NMPattern

__all__ = ["rate_factor"]


def rate_factor(pattern: NMPattern, leak: float = 0.0, power: float = 1.0) -> float:
    r"""What the learning rate of a masked tensor is multiplied with.

    .. math:: \Big(\frac{n}{m} + \beta\,\big(1-\frac{n}{m}\big)\Big)^{-p}

    Under Adam a weight moves by about one learning rate per step, and what a neuron computes by that times the number of its
    inputs. A mask leaves :math:`n/m` of them; with :math:`p = 1` a step changes the output as much as it did when the
    layer was dense, so that a learning rate found for dense training stays the right one.

    Args:
        pattern: The n:m pattern in force.
        leak: :math:`\beta`, what pruned weights are multiplied with: 0 for a mask at full strength.
        power: :math:`p`; 0: no change, 0.5: for outputs that add up as if by chance.

    Returns:
        The factor, 1 or more for a power of 0 or more.

    Example:
        >>> [rate_factor(NMPattern(1, m)) for m in (2, 4, 8)], rate_factor(NMPattern(1, 4), power=0.5)
        ([2.0, 4.0, 8.0], 2.0)

    References:
        That the rate goes with the inverse of the fan-in is due to Yang et al., `Tensor Programs V
        <https://arxiv.org/abs/2203.03466>`_, 2022; here the fan-in is that of the kept weights.
    """
    share = pattern.n / pattern.m
    return float((share + leak * (1 - share)) ** -power)
