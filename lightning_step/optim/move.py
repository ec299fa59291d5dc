"""A preconditioned step of a portion, eagerly: the same kernels in the same order, however the tensors are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_step.optim.pieces import Batch, Number, Numbers

__all__ = ["Rule", "move"]

_NARROW = (torch.float16, torch.bfloat16)


class Rule(NamedTuple):
    """What the step of a whole bucket takes.

    Example:
        >>> Rule.of({"lr": 0.1, "weight_decay": 0.5}, complement=0.25, rate=0.2).keep
    """

    complement: float  # 1 - beta1
    rate: Number  # learning rate
    maximize: bool
    coupled: float  # weight decay that goes into the gradient; 0: none
    keep: Number | None  # what decoupled weight decay leaves of the weight; None: all

    @classmethod
    def of(cls, group: Mapping[str, Any], *, complement: float, rate: Number) -> Rule:
        """The rule of a parameter group.

        Args:
            group: One entry of ``optimizer.param_groups``.
            complement: 1 - beta1.
            rate: The learning rate, corrected.

        Returns:
            The rule.

        Example:
            >>> Rule.of({"lr": 0.1, "weight_decay": 0.5}, complement=0.25, rate=0.2).coupled
            0.5
        """
        decay, decoupled = group["weight_decay"], bool(group.get("decoupled_weight_decay", False))
        return cls(
            complement,
            rate,
            maximize=bool(group.get("maximize")),
            coupled=0.0 if decoupled else decay,
            keep=1 - group["lr"] * decay if decoupled and decay else None,
        )


def move(batch: Batch, rule: Rule) -> None:
    """Update first moments and weights, in place.

    Args:
        batch: Tensors of one device and dtype.
        rule: How they move.

    Example:
        >>> weight, first = torch.ones(1), torch.zeros(1)
        >>> batch = Batch([weight], [torch.tensor([4.0])], [first], [torch.tensor([2.0])], [Numbers(bound=3.0)])
        >>> move(batch, Rule(complement=0.5, rate=0.1, maximize=False, coupled=0.0, keep=None))
        >>> first, weight
        (tensor([2.]), tensor([0.9000]))
    """
    grads = _effective(batch, rule)
    torch._foreach_lerp_(batch.firsts, grads, rule.complement)
    updates = _updates(batch, grads)
    if rule.keep is not None:
        _shrink(batch.weights, rule.keep)  # last of all, so that they are fetched from memory once
    if isinstance(rule.rate, Tensor):  # it may live on the device: stay there
        torch._foreach_mul_(updates, [rule.rate.to(update) for update in updates])
        torch._foreach_sub_(batch.weights, updates)
    else:
        torch._foreach_add_(batch.weights, updates, alpha=-rule.rate)


def _effective(batch: Batch, rule: Rule) -> list[Tensor]:
    """Gradients with sign and coupled weight decay, as the stock optimizer applies them."""
    grads = list(torch._foreach_neg(batch.grads)) if rule.maximize else batch.grads
    return list(torch._foreach_add(grads, batch.weights, alpha=rule.coupled)) if rule.coupled else grads


def _shrink(weights: list[Tensor], keep: Number) -> None:
    """Decoupled weight decay."""
    if isinstance(keep, Tensor) and weights[0].device.type != "cpu":
        torch._foreach_mul_(weights, [keep.to(weight) for weight in weights])
    elif isinstance(keep, Tensor) or (weights[0].device.type == "cpu" and weights[0].dtype in _NARROW):
        # On a CPU the foreach kernel rounds the factor to the weights' dtype: 0.998 to 0.996.
        for weight in weights:
            weight.mul_(keep)
    else:
        torch._foreach_mul_(weights, keep)


def _updates(batch: Batch, grads: list[Tensor]) -> list[Tensor]:
    """Fresh tensors: what to take off the weights, in learning rates."""
    any_of = batch.numbers[0]
    if any_of.mix is None:
        updates = list(torch._foreach_div(batch.firsts, batch.roots))
    else:
        updates = _mixed(batch.firsts, [n.mix[0] for n in batch.numbers if n.mix])
        torch._foreach_add_(updates, _mixed(grads, [n.mix[1] for n in batch.numbers if n.mix]))
        torch._foreach_div_(updates, batch.roots)
    if any_of.divisor is not None:
        torch._foreach_div_(updates, _as(updates, [n.divisor for n in batch.numbers]))
    updates = _bounded(updates, batch.numbers)
    if any_of.factor is not None:
        torch._foreach_mul_(updates, _as(updates, [n.factor for n in batch.numbers]))
    return updates


def _mixed(tensors: list[Tensor], by: list[Number]) -> list[Tensor]:
    numbers = [factor for factor in by if not isinstance(factor, Tensor)]
    if numbers:
        return list(torch._foreach_mul(tensors, numbers))
    return [tensor * factor for tensor, factor in zip(tensors, by, strict=True)]


def _as(updates: list[Tensor], numbers: list[Tensor | None]) -> list[Tensor]:
    return [number.to(update) for number, update in zip(numbers, updates, strict=True) if number is not None]


def _bounded(updates: list[Tensor], numbers: list[Numbers]) -> list[Tensor]:
    bound = numbers[0].bound
    if isinstance(bound, Tensor):
        bounds = _as(updates, [torch.as_tensor(of_one.bound) for of_one in numbers])
        return [torch.clamp(update, -limit, limit) for update, limit in zip(updates, bounds, strict=True)]
    if bound == torch.inf:
        return updates
    if len(updates) == 1:
        updates[0].clamp_(-bound, bound)
    else:
        torch._foreach_clamp_max_(updates, bound)
        torch._foreach_clamp_min_(updates, -bound)
    return updates
