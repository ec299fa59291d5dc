"""The recipes STEP is compared with: dense, ASP, STE, SR-STE. Each works with any torch optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from lightning_step.recipes.base import Recipe, check_lam, check_switch
from lightning_step.recipes.plan import GradientRule, Plan
from lightning_step.recipes.switches import AtStep, Switch

__all__ = ["ASP", "SRSTE", "STE", "Dense"]


@dataclass(frozen=True)
class Dense(Recipe):
    """No mask, ever: the control.

    Example:
        >>> Dense().plan().masks is None
        True
    """

    @override
    def plan(self) -> Plan:
        return Plan(masks=None)


@dataclass(frozen=True)
class ASP(Recipe):
    """Train dense, prune once by magnitude, train on with that mask.

    Args:
        at: When to prune. The published recipe prunes a finished network and trains as long again: half of all steps.
            ``AtStep(0)`` keeps the zeros of a model that is pruned already.

    Raises:
        ArgumentTypeError: If ``at`` is no switch.

    Example:
        >>> ASP().plan().gradient.fixed
        True

    References:
        Mishra et al., `Accelerating Sparse Deep Neural Networks <https://arxiv.org/abs/2104.08378>`_, 2021, section 3.
    """

    at: Switch = field(default_factory=lambda: AtStep(0.5))

    def __post_init__(self) -> None:
        check_switch("at", self.at)

    @override
    def plan(self) -> Plan:
        return Plan(self.at, GradientRule("masked", fixed=True))


@dataclass(frozen=True)
class STE(Recipe):
    """Masks from the first step on, the gradient passed straight through.

    Example:
        >>> STE().plan().gradient.lam
        0.0

    References:
        Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
        <https://arxiv.org/abs/1308.3432>`_, 2013.
    """

    @override
    def plan(self) -> Plan:
        return Plan(AtStep(0))


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
    def plan(self) -> Plan:
        return Plan(AtStep(0), GradientRule(lam=self.lam))
