"""torch.optim.Adam and AdamW, in every implementation.

Note [In the place of exp_avg_sq]
    The preconditioner D overwrites ``exp_avg_sq``: no memory is added, and every tool that saves, shards or moves optimizer
    state does so with D too. With amsgrad D comes from ``max_exp_avg_sq``, which is dropped. The step counter and
    ``exp_avg`` go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_step.errors import OptimizerError
from lightning_step.functional import PreconditionForm, adam_bound, preconditioner
from lightning_step.optim.base import Moments, SecondMomentAdapter

__all__ = ["AdamAdapter"]


class AdamAdapter(SecondMomentAdapter):
    """Adapter of ``torch.optim.Adam`` and ``AdamW``: for-loop, foreach, fused, capturable, amsgrad, maximize, tensor lr.

    It also serves any optimizer that keeps their state keys (``step``, ``exp_avg``, ``exp_avg_sq``), their group keys, and
    their update; see `register_adapter`.

    Example:
        >>> AdamAdapter().moments({"betas": (0.9, 0.99), "eps": 1e-8}).beta2
        0.99

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1.
    """

    @override
    def check(self, optimizer: Optimizer) -> None:
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise OptimizerError(
                f"Expected {type(optimizer).__name__} with differentiable=False, but got differentiable=True. A frozen "
                "second moment is not part of the graph. Drop the argument, or use a recipe without a switch (SRSTE)."
            )

    @override
    def moments(self, group: Mapping[str, Any]) -> Moments:
        beta1, beta2 = group["betas"]
        return Moments(float(beta1), float(beta2), float(group["eps"]))

    @override
    def second_moment(self, optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
        state = optimizer.state.get(parameter)
        return state["exp_avg_sq"] if state else None

    @override
    def effective_gradient(self, group: Mapping[str, Any], weight: Tensor, grad: Tensor) -> Tensor:
        grad = -grad if group.get("maximize") else grad
        decay = group["weight_decay"]
        return grad if not decay or _is_decoupled(group) else grad.add(weight, alpha=decay)

    @override
    @torch.no_grad()
    def freeze(self, optimizer: Optimizer, parameters: Iterable[Tensor], form: PreconditionForm) -> list[Tensor]:
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        frozen = []
        for parameter in parameters:
            state = optimizer.state.get(parameter)
            # Without a single gradient there is nothing to freeze: a tensor of zeros says nothing about the next gradient.
            # A complex one has two second moments; it is never masked, so it just stays live.
            if not state or parameter.is_complex() or not bool(state["exp_avg_sq"].any()):
                continue
            moments = self.moments(groups[parameter])
            v = state.pop("max_exp_avg_sq", state["exp_avg_sq"])
            state["exp_avg_sq"].copy_(preconditioner(v, int(state["step"]), beta2=moments.beta2, eps=moments.eps, form=form))
            frozen.append(parameter)
        return frozen

    @override
    @torch.no_grad()
    def step(self, optimizer: Optimizer, grads: Mapping[Tensor, Tensor], max_step: float | None) -> None:
        for group in optimizer.param_groups:
            moments = self.moments(group)
            bound = adam_bound((moments.beta1, moments.beta2)) if max_step is None else max_step
            for bucket in _buckets(optimizer, [p for p in group["params"] if p in grads]):
                _step_bucket(optimizer, group, bucket, [grads[p] for p in bucket], moments.beta1, bound)


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _buckets(optimizer: Optimizer, parameters: list[Tensor]) -> list[list[Tensor]]:
    """Lists for the foreach kernels: one device, dtype and, where it can be read without a GPU sync, step count."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        step = optimizer.state[parameter]["step"]
        count = float(step) if step.device.type == "cpu" else None
        buckets.setdefault((parameter.device, parameter.dtype, count), []).append(parameter)
    return list(buckets.values())


def _step_bucket(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    beta1: float,
    bound: float,
) -> None:
    states = [optimizer.state[parameter] for parameter in parameters]
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    grads = _decay(group, parameters, grads)
    first = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(first, grads, 1 - beta1)
    updates = torch._foreach_div(first, [state["exp_avg_sq"] for state in states])
    if steps[0].device.type == "cpu" and not isinstance(group["lr"], Tensor):
        correction = 1 - beta1 ** float(steps[0])
        _clamp(updates, bound * correction)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] / correction)
    else:  # step counts or the rate live on the device: stay there
        torch._foreach_div_(updates, [(1 - beta1**step).to(u) for step, u in zip(steps, updates, strict=True)])
        _clamp(updates, bound)
        rates = [torch.as_tensor(group["lr"]).to(update) for update in updates]
        torch._foreach_mul_(updates, rates)
        torch._foreach_sub_(parameters, updates)


def _decay(group: Mapping[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Weight decay and sign, as the stock optimizer applies them; returns the gradients to use."""
    if group.get("maximize"):
        grads = list(torch._foreach_neg(grads))
    decay = group["weight_decay"]
    if decay and _is_decoupled(group):
        factor = 1 - group["lr"] * decay
        if isinstance(factor, Tensor):
            torch._foreach_mul_(parameters, [factor.to(parameter) for parameter in parameters])
        else:
            torch._foreach_mul_(parameters, factor)
    elif decay:
        grads = list(torch._foreach_add(grads, parameters, alpha=decay))
    return grads


def _clamp(updates: list[Tensor] | tuple[Tensor, ...], bound: float) -> None:
    if bound != torch.inf:
        torch._foreach_clamp_max_(updates, bound)
        torch._foreach_clamp_min_(updates, -bound)
