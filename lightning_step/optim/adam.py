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
from lightning_step.functional import PreconditionForm, adam_bound, moment_behind, preconditioner
from lightning_step.optim.base import Moments, SecondMomentAdapter
from lightning_step.optim.kernel import move_compiled, worth_compiling
from lightning_step.optim.move import Rule, move
from lightning_step.optim.pieces import Number, Numbers, State, batches, parts
from lightning_step.sharding import local, whole_count, whole_mean

__all__ = ["AdamAdapter", "on_host"]


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
            if not state or parameter.is_complex() or not whole_count(v := state["exp_avg_sq"], local(v) != 0):
                continue
            t, moments = int(state["step"]), self.moments(groups[parameter])
            if not self._trusts(t, moments):
                continue
            v = state.pop("max_exp_avg_sq", state["exp_avg_sq"])
            eps = self._eps(t, moments)
            part, mean = local(v), whole_mean(v)
            made = preconditioner(part, t, beta2=moments.beta2, eps=eps, form=form, mean=mean)
            local(state["exp_avg_sq"]).copy_(made)
            frozen.append(parameter)
        return frozen

    @override
    def moment_behind(self, group: Mapping[str, Any], precondition: Tensor, t: int, form: PreconditionForm) -> Tensor:
        moments = self.moments(group)
        return moment_behind(precondition, t, beta2=moments.beta2, eps=self._eps(t, moments), form=form)

    @override
    @torch.no_grad()
    def step(self, optimizer: Optimizer, grads: Mapping[Tensor, Tensor], max_step: float | None) -> None:
        for group in optimizer.param_groups:
            for bucket in _buckets(optimizer, [p for p in group["params"] if p in grads]):
                self._step_bucket(optimizer, group, bucket, grads, max_step)

    def _trusts(self, t: int, moments: Moments) -> bool:
        """Whether the stock optimizer divides by v after so many steps; if not, there is nothing to freeze yet."""
        return True

    def _eps(self, t: int, moments: Moments) -> float:
        """What the stock optimizer adds to the root of the corrected v after so many steps."""
        return moments.eps

    def _advance(self, group: Mapping[str, Any], states: list[State]) -> None:
        """Count the step that is about to be taken."""
        torch._foreach_add_([state["step"] for state in states], 1)

    def _numbers(
        self, group: Mapping[str, Any], states: list[State], max_step: float | None
    ) -> tuple[list[Numbers], Number]:
        """What the move of each tensor of a bucket takes, whose step counts are those of after the step.

        Args:
            group: Their parameter group.
            states: Their states.
            max_step: See `step`.

        Returns:
            Numbers of each tensor, and the learning rate of all.
        """
        moments = self.moments(group)
        bound = adam_bound((moments.beta1, moments.beta2)) if max_step is None else max_step
        if on_host(states):
            correction = 1 - moments.beta1 ** float(states[0]["step"])
            return [Numbers(bound * correction)] * len(states), group["lr"] / correction
        corrections = torch._foreach_pow(moments.beta1, [state["step"] for state in states])
        torch._foreach_neg_(corrections)
        torch._foreach_add_(corrections, 1)
        return [Numbers(bound, divisor=correction) for correction in corrections], group["lr"]

    def _step_bucket(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        grads: Mapping[Tensor, Tensor],
        max_step: float | None,
    ) -> None:
        compiles = worth_compiling(group, parameters)
        if compiles:
            parameters = sorted(parameters, key=Tensor.numel)
        states = [optimizer.state[parameter] for parameter in parameters]
        self._advance(group, states)
        numbers, rate = self._numbers(group, states, max_step)
        rule = Rule.of(group, complement=1 - self.moments(group).beta1, rate=rate)
        given = parts(parameters, grads, states, numbers)
        for batch in batches(move_compiled(given, rule) if compiles else given):
            move(batch, rule)


def on_host(states: list[State]) -> bool:
    """Whether step counts can be read without waiting for a device; then they are equal within a bucket.

    Args:
        states: The states of a bucket.

    Returns:
        True if they lie on the CPU.

    Example:
        >>> on_host([{"step": torch.tensor(3.0)}])
        True
    """
    return bool(states[0]["step"].device.type == "cpu")


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _buckets(optimizer: Optimizer, parameters: list[Tensor]) -> list[list[Tensor]]:
    """Lists for the foreach kernels: one device, dtype and, where it can be read without a GPU sync, step count."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        step = optimizer.state[parameter]["step"]
        count = float(step) if step.device.type == "cpu" else None
        mesh = getattr(parameter, "device_mesh", None)  # one list cannot hold sharded and whole tensors
        buckets.setdefault((parameter.device, parameter.dtype, count, mesh), []).append(parameter)
    return list(buckets.values())
