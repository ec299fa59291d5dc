"""torch.optim.RAdam: Adam's adapter with the rectified rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_step.errors import OptimizerError
from lightning_step.functional import rectification
from lightning_step.optim.adam import AdamAdapter, State, on_host
from lightning_step.optim.base import Moments

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
    def _moves(
        self, group: Mapping[str, Any], states: list[State], grads: list[Tensor], max_step: float | None
    ) -> tuple[list[Tensor], float]:
        updates, divisor = super()._moves(group, states, grads, max_step)
        beta2 = self.moments(group).beta2
        if on_host(states):
            return updates, divisor / rectification(float(states[0]["step"]), beta2)
        torch._foreach_mul_(updates, [rectification(s["step"], beta2).to(u) for s, u in zip(states, updates, strict=True)])
        return updates, divisor
