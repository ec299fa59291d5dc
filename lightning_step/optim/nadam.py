"""torch.optim.NAdam: Adam's adapter with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_step.functional import nadam_bound, nadam_momentum
from lightning_step.optim.adam import AdamAdapter, State, clamp, on_host

__all__ = ["NAdamAdapter"]

Number = TypeVar("Number", float, Tensor)


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
    def _moves(
        self, group: Mapping[str, Any], states: list[State], grads: list[Tensor], max_step: float | None
    ) -> tuple[list[Tensor], float]:
        first, root = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        if not on_host(states):
            moves = zip(states, grads, first, root, strict=True)
            return [self._move(group, *of_one, max_step) for of_one in moves], 1.0
        t = float(states[0]["step"])
        mu, mu_next = self._momentum(group, t), self._momentum(group, t + 1)
        products = [s["mu_product"] for s in states]
        for product in products:
            product.mul_(mu)
        # A tensor's product is its own: it depends on the betas at each of its steps.
        updates = list(torch._foreach_mul(first, [mu_next / (1 - float(p) * mu_next) for p in products]))
        torch._foreach_add_(updates, torch._foreach_mul(grads, [(1 - mu) / (1 - float(p)) for p in products]))
        torch._foreach_div_(updates, root)
        clamp(updates, self._bound(group, mu, mu_next) if max_step is None else max_step)
        return updates, 1.0

    def _move(
        self, group: Mapping[str, Any], state: State, grad: Tensor, first: Tensor, root: Tensor, max_step: float | None
    ) -> Tensor:
        """The same for one tensor whose step count lies on the device; nothing is read from there."""
        t: Tensor = state["step"]
        mu, mu_next = self._momentum(group, t), self._momentum(group, t + 1)
        product: Tensor = state["mu_product"].mul_(mu)
        along = first * (mu_next / (1 - product * mu_next)) + grad * ((1 - mu) / (1 - product))
        moments = self.moments(group)
        if max_step is None:
            # nadam_bound in tensors
            bound: Tensor = (
                ((mu_next * (1 - moments.beta1) + 1 - mu) / math.sqrt(1 - moments.beta2)).clamp_min(1.0).to(along)
            )
            return torch.clamp(along / root, -bound, bound)
        clamp([update := along / root], max_step)
        return update

    def _momentum(self, group: Mapping[str, Any], t: Number) -> Number:
        return nadam_momentum(t, self.moments(group).beta1, float(group["momentum_decay"]))

    def _bound(self, group: Mapping[str, Any], mu: float, mu_next: float) -> float:
        moments = self.moments(group)
        return nadam_bound((moments.beta1, moments.beta2), mu, mu_next)
