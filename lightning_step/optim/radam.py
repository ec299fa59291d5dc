"""torch.optim.RAdam: Adam's adapter with the rectified rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_step.errors import OptimizerError
from lightning_step.functional import rectification
from lightning_step.optim.adam import AdamAdapter, on_host
from lightning_step.optim.base import Moments
from lightning_step.optim.pieces import Number, Numbers, State

__all__ = ["RAdamAdapter"]


class RAdamAdapter(AdamAdapter):
    r"""Adapter of ``torch.optim.RAdam``: for-loop, foreach, capturable, maximize, coupled and decoupled decay, tensor lr.

    Nothing freezes while :math:`\rho_t \le 5` (5 steps at the default betas), where RAdam does not look at v; a switch that
    comes earlier waits. After it the rectification goes on with the step, as a schedule of the rate, and ``max_step``
    counts rectified rates.

    Example:
        >>> RAdamAdapter().moments({"betas": (0.9, 0.99), "eps": 1e-8}).beta2
        0.99

    References:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
        <https://arxiv.org/abs/1908.03265>`_, ICLR 2020.
    """

    @override
    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        for group in optimizer.param_groups:
            beta2 = self.moments(group).beta2
            if rectification(1e9, beta2) == 0:
                raise OptimizerError(
                    f"Expected RAdam with beta2 > 2/3, but got beta2={beta2}: with so short a memory it never divides by "
                    "its second moment, so there is nothing to freeze. Raise beta2, or use a recipe without a switch, "
                    "such as SRSTE."
                )

    @override
    def _trusts(self, t: int, moments: Moments) -> bool:
        return rectification(float(t), moments.beta2) > 0

    @override
    def _eps(self, t: int, moments: Moments) -> float:
        # RAdam adds eps to the root of the raw v
        return float(moments.eps / (1 - moments.beta2**t) ** 0.5)

    @override
    def _numbers(
        self, group: Mapping[str, Any], states: list[State], max_step: float | None
    ) -> tuple[list[Numbers], Number]:
        numbers, rate = super()._numbers(group, states, max_step)
        beta2 = self.moments(group).beta2
        if on_host(states):
            t = float(states[0]["step"])
            # The divisors first: the same bits as ever
            return numbers, group["lr"] / ((1 - self.moments(group).beta1 ** t) / rectification(t, beta2))
        factors = [rectification(state["step"], beta2) for state in states]
        return [of_one._replace(factor=factor) for of_one, factor in zip(numbers, factors, strict=True)], rate
