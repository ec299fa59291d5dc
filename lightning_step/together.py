"""What is done for many small masked tensors at once, because the calls would cost more than the work.

A launch or a call takes microseconds whatever the size of a tensor, so a model of a thousand small layers would spend more
time in them than in its own. Everything here gives the same bits as one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_step.freshness import State
from lightning_step.functional import magnitude_masks, pruned_part
from lightning_step.functional.mask import TOGETHER, is_small
from lightning_step.parametrization import NMMask
from lightning_step.pattern import NMPattern
from lightning_step.sharding import local

__all__ = ["add_pruned_parts", "prepare_masks"]

Pair = tuple[Tensor, NMMask]
"""A latent weight and its mask."""


def prepare_masks(pairs: Sequence[Pair]) -> None:
    """Compute and keep the masks of all small weights whose mask is not there. See `Kept.train`.

    Args:
        pairs: The weights.

    Example:
        >>> weight, mask = torch.nn.Parameter(torch.tensor([1.0, 2.0])), NMMask(NMPattern(1, 2))
        >>> mask.kept.train(True)
        >>> prepare_masks([(weight, mask)])
        >>> mask.kept.lacking(weight, mask.rule) is None
        True
    """
    waiting: dict[NMPattern, list[tuple[Tensor, NMMask, State]]] = {}
    for weight, mask in pairs:
        if mask.enabled and _is_small(weight) and (state := mask.kept.lacking(weight, mask.rule)) is not None:
            waiting.setdefault(mask.pattern, []).append((weight, mask, state))
    for pattern, alike in waiting.items():
        found = magnitude_masks([weight for weight, _, _ in alike], pattern, [mask.dim for _, mask, _ in alike])
        for (weight, mask, state), value in zip(alike, found, strict=True):
            mask.kept.put(weight, state, value)


def add_pruned_parts(pairs: Sequence[Pair], lam: float, grad_scale: Tensor | None = None) -> None:
    r"""Add :math:`\lambda\,(1-\Pi)\odot w` to every gradient, in place.

    Args:
        pairs: Weights that have a gradient.
        lam: :math:`\lambda`.
        grad_scale: Factor that is still in the gradients; the term is given the same.

    Example:
        >>> weight, mask = torch.nn.Parameter(torch.tensor([1.0, 2.0])), NMMask(NMPattern(1, 2))
        >>> weight.grad = torch.zeros(2)
        >>> add_pruned_parts([(weight, mask)], 0.5)
        >>> weight.grad
        tensor([0.5000, 0.0000])
    """
    for alike in _alike(pairs):
        if len(alike) == 1:
            _add_pruned_part(*alike[0], lam, grad_scale)
            continue
        weights = [weight.detach() for weight, _ in alike]
        zero = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
        terms = [torch.where(mask.kept_mask(of), zero, weight) for weight, (of, mask) in zip(weights, alike, strict=True)]
        if grad_scale is not None:
            torch._foreach_mul_(terms, grad_scale.to(zero))
        torch._foreach_add_([weight.grad for weight, _ in alike], terms, alpha=lam)  # type: ignore[misc]


def _alike(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Small tensors of one device and dtype, not so many that their terms would take notable memory; others one by one."""
    waiting: dict[tuple[torch.device, torch.dtype], list[Pair]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for weight, mask in pairs:
        if not _is_small(weight) or weight.grad is None or weight.grad.dtype != weight.dtype:
            yield [(weight, mask)]
            continue
        key = (weight.device, weight.dtype)
        waiting.setdefault(key, []).append((weight, mask))
        sizes[key] = sizes.get(key, 0) + weight.numel()
        if sizes[key] > TOGETHER[weight.device.type]:
            yield waiting.pop(key)
            del sizes[key]
    yield from waiting.values()


def _add_pruned_part(weight: Tensor, mask: NMMask, lam: float, grad_scale: Tensor | None) -> None:
    assert weight.grad is not None
    part = local(weight)
    term = pruned_part(part, mask.kept_mask(part))
    if grad_scale is not None:
        term *= grad_scale.to(term)
    local(weight.grad).add_(term, alpha=lam)


def _is_small(weight: Tensor) -> bool:
    return is_small(weight) and type(weight) is nn.Parameter
