"""The recipes STEP is compared with: dense, ASP, STE, SR-STE. Each works with any torch optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from lightning_step.pattern import NMPattern
from lightning_step.recipes.base import Freeze, GradientRule, Recipe, check_lam
from lightning_step.recipes.switches import AtStep, Switch

__all__ = ["ASP", "SRSTE", "STE", "Dense"]


@dataclass(frozen=True)
class Dense(Recipe):
    """No mask, ever: the control.

    Example:
        >>> Dense().masks() is None
        True
    """

    @override
    def pattern(self, name: str, pattern: NMPattern, t: int) -> NMPattern:
        return pattern

    @override
    def gradient(self) -> GradientRule:
        return GradientRule("straight_through")

    @override
    def masks(self) -> Switch | None:
        return None

    @override
    def freeze(self) -> Freeze | None:
        return None


@dataclass(frozen=True)
class ASP(Recipe):
    """Train dense, prune once by magnitude, train on with that mask.

    Args:
        at: When to prune. The published recipe prunes a finished network and trains as long again: half of all steps.

    Example:
        >>> ASP().gradient().fixed
        True

    References:
        Mishra et al., `Accelerating Sparse Deep Neural Networks <https://arxiv.org/abs/2104.08378>`_, 2021, section 3.
    """

    at: Switch = field(default_factory=lambda: AtStep(0.5))

    @override
    def pattern(self, name: str, pattern: NMPattern, t: int) -> NMPattern:
        return pattern

    @override
    def gradient(self) -> GradientRule:
        return GradientRule("masked", fixed=True)

    @override
    def masks(self) -> Switch | None:
        return self.at

    @override
    def freeze(self) -> Freeze | None:
        return None


@dataclass(frozen=True)
class STE(Recipe):
    """Masks from the first step on, the gradient passed straight through.

    Example:
        >>> STE().gradient().lam
        0.0

    References:
        Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
        <https://arxiv.org/abs/1308.3432>`_, 2013.
    """

    @override
    def pattern(self, name: str, pattern: NMPattern, t: int) -> NMPattern:
        return pattern

    @override
    def gradient(self) -> GradientRule:
        return GradientRule("straight_through")

    @override
    def masks(self) -> Switch | None:
        return AtStep(0)

    @override
    def freeze(self) -> Freeze | None:
        return None


@dataclass(frozen=True)
class SRSTE(Recipe):
    r"""STE with a pull on the pruned weights, :math:`g + \lambda\,(1-\Pi)\odot w`.

    Args:
        lam: :math:`\lambda`. 2e-4 is the published value, found for momentum SGD; under Adam larger ones often do better.

    Raises:
        ConfigurationError: If ``lam`` is negative.

    Example:
        >>> SRSTE().lam
        0.0002

    References:
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
        <https://arxiv.org/abs/2102.04010>`_, ICLR 2021, equation 9.
    """

    lam: float = 2e-4

    def __post_init__(self) -> None:
        check_lam(self.lam)

    @override
    def pattern(self, name: str, pattern: NMPattern, t: int) -> NMPattern:
        return pattern

    @override
    def gradient(self) -> GradientRule:
        return GradientRule("straight_through", self.lam)

    @override
    def masks(self) -> Switch | None:
        return AtStep(0)

    @override
    def freeze(self) -> Freeze | None:
        return None
