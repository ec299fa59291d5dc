"""torch.optim.NAdam: Adam's adapter with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_step.functional import nadam_bound, nadam_momentum
from lightning_step.optim.adam import AdamAdapter, on_host
from lightning_step.optim.pieces import Number, Numbers, State

__all__ = ["NAdamAdapter"]

Count = TypeVar("Count", float, Tensor)


class NAdamAdapter(AdamAdapter):
    """Adapter of ``torch.optim.NAdam``: for-loop, foreach, capturable, maximize, coupled and decoupled decay, tensor lr.

    The momentum schedule and its product ``mu_product`` go on; only the denominator is frozen.

    Example:
        >>> NAdamAdapter().moments({"betas": (0.9, 0.99), "eps": 1e-8}).beta2
        0.99

    References:
        Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """

    @override
    def _advance(self, group: Mapping[str, Any], states: list[State]) -> None:
        super()._advance(group, states)
        if on_host(states):
            torch._foreach_mul_([s["mu_product"] for s in states], self._momentum(group, float(states[0]["step"])))
            return
        for state in states:
            state["mu_product"].mul_(self._momentum(group, state["step"]))

    @override
    def _numbers(
        self, group: Mapping[str, Any], states: list[State], max_step: float | None
    ) -> tuple[list[Numbers], Number]:
        if not on_host(states):
            return [self._numbers_there(group, state, max_step) for state in states], group["lr"]
        t = float(states[0]["step"])
        mu, mu_next = self._momentum(group, t), self._momentum(group, t + 1)
        bound = self._bound(group, mu, mu_next) if max_step is None else max_step
        # A tensor's product is its own: it depends on the betas at each of its steps.
        products = [float(state["mu_product"]) for state in states]
        return [Numbers(bound, (mu_next / (1 - p * mu_next), (1 - mu) / (1 - p))) for p in products], group["lr"]

    def _numbers_there(self, group: Mapping[str, Any], state: State, max_step: float | None) -> Numbers:
        """The same for one tensor whose step count lies on the device; nothing is read from there."""
        t: Tensor = state["step"]
        mu, mu_next = self._momentum(group, t), self._momentum(group, t + 1)
        product: Tensor = state["mu_product"]
        mix = mu_next / (1 - product * mu_next), (1 - mu) / (1 - product)
        if max_step is not None:
            return Numbers(max_step, mix)
        moments = self.moments(group)
        # nadam_bound in tensors
        bound: Tensor = ((mu_next * (1 - moments.beta1) + 1 - mu) / math.sqrt(1 - moments.beta2)).clamp_min(1.0)
        return Numbers(bound, mix)

    def _momentum(self, group: Mapping[str, Any], t: Count) -> Count:
        return nadam_momentum(t, self.moments(group).beta1, float(group["momentum_decay"]))

    def _bound(self, group: Mapping[str, Any], mu: float, mu_next: float) -> float:
        moments = self.moments(group)
        return nadam_bound((moments.beta1, moments.beta2), mu, mu_next)
