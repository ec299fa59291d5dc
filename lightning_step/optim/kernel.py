"""A preconditioned step in one compiled pass over weight, gradient, first moment and preconditioner.

Note [When the step is compiled]
    With ``LIGHTNING_STEP_COMPILE=1``, and with ``=0`` never; unset, where the user's optimizer is ``fused=True``: on CUDA
    always, on a CPU from `WORTHWHILE` weights on, for there the compiler takes seconds and saves about a nanosecond for each
    weight and step. Tensors below `LEAST` weights, and those with gaps, take the eager step: a call of a compiled kernel
    costs as much as they do. One graph serves all sizes, rules and Adam's relatives, because all their numbers are data.

Note [Rounding of the compiled step]
    It computes in float32 (in float64 for such weights) from loading to storing, where the eager step rounds to the weights'
    dtype after each of its kernels: equal within a few units in the last place of the weight's dtype, as stock fused and
    foreach steps are among themselves. The same kernel gives the same bits, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_step.compiling import VARIABLE, compiled, is_traced, wants_compile
from lightning_step.optim.move import Rule
from lightning_step.optim.pieces import Number, Part, flat

__all__ = ["LEAST", "WORTHWHILE", "move_compiled", "worth_compiling"]

LEAST = 1 << 15
"""Weights of the smallest tensor that takes the compiled step."""

WORTHWHILE = 1 << 22
"""Weights from which on ``fused=True`` alone has the step compiled on a CPU."""

TOGETHER = 4
"""Tensors of one size that take one call."""

_log = logging.getLogger(__name__)
_told: list[bool] = []


def worth_compiling(group: Mapping[str, Any], parameters: Sequence[Tensor]) -> bool:
    """Whether tensors take the compiled step. See Note [When the step is compiled].

    Args:
        group: Their parameter group.
        parameters: The tensors; one device and dtype.

    Returns:
        True if so, for those of them that are suited.

    Example:
        >>> worth_compiling({"fused": True}, [torch.ones(4, 4)])
        False
    """
    place = parameters[0].device.type
    weights = sum(n for n in (parameter.numel() for parameter in parameters) if n >= LEAST)
    if not weights or place not in ("cpu", "cuda") or is_traced():
        return False
    wish = wants_compile()
    if wish is not None or not group.get("fused"):
        return bool(wish)
    if place == "cpu" and weights >= WORTHWHILE and not _told:
        _told.append(True)
        _log.info(f"compiling the preconditioned step of {weights:,} weights (fused=True; {VARIABLE}=0 keeps it eager)")
    return place == "cuda" or weights >= WORTHWHILE


def move_compiled(given: Iterable[Part], rule: Rule) -> Iterator[Part]:
    """Update first moments and weights, in place.

    Args:
        given: Tensors of one device and dtype; neighbours of one size share a call.
        rule: How they move.

    Yields:
        What is left to the eager step, untouched.

    Example:
        >>> from lightning_step.optim.pieces import Numbers
        >>> one = torch.ones(2)
        >>> rule = Rule(complement=0.5, rate=0.1, maximize=False, coupled=0.0, keep=None)
        >>> len(list(move_compiled([Part(one, one, one, one, Numbers(bound=3.0))], rule)))
        1
    """
    alike: list[Part] = []
    for part in given:
        row = None if part.weight.numel() < LEAST or hasattr(part.weight, "placements") else flat(part)
        if row is None:
            yield part
            continue
        # One graph must not depend on which of its tensors happen to be equally large.
        if alike and row.weight.shape != alike[0].weight.shape:
            _move_alike(alike, rule)
            alike = []
        alike.append(row)
    _move_alike(alike, rule)


def _move_alike(alike: list[Part], rule: Rule) -> None:
    while alike:
        ours = alike[:TOGETHER] if len(alike) >= TOGETHER else alike[:1]
        del alike[: len(ours)]
        # Graphs are guarded on what their inputs are views of, however that is shaped; `data` is a view of nothing.
        weights, grads, firsts, roots = ([part[:4][i].data for part in ours] for i in range(4))
        _kernel(weights, grads, firsts, roots, _table(ours, rule))
        # It does not count as a change, either, and whoever keeps something of a weight looks at the count.
        torch.autograd.graph.increment_version([tensor for part in ours for tensor in (part.weight, part.first)])


def _table(parts: Sequence[Part], rule: Rule) -> Tensor:
    """A column of numbers for each tensor, on its device, without waiting for that: see `_step`."""
    weight, k = parts[0].weight, len(parts)
    numbers = [part.numbers for part in parts]
    rows: list[list[Number]] = [
        [rule.complement] * k,
        [-1.0 if rule.maximize else 1.0] * k,
        [rule.coupled] * k,
        [1.0 if n.mix is None else n.mix[0] for n in numbers],
        [0.0 if n.mix is None else n.mix[1] for n in numbers],
        [1.0 if n.divisor is None else n.divisor for n in numbers],
        [n.bound for n in numbers],
        [1.0 if rule.keep is None else rule.keep] * k,
        [rule.rate] * k,
        [1.0 if n.factor is None else n.factor for n in numbers],
    ]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    there = [isinstance(row[0], Tensor) and row[0].device.type != "cpu" for row in rows]
    known = [[0.0] * k if away else [float(n) for n in row] for away, row in zip(there, rows, strict=True)]
    table = torch.tensor(known, dtype=wide)
    if weight.device.type != "cpu":
        table = table.pin_memory().to(weight.device, non_blocking=True)
    for away, target, row in zip(there, table, rows, strict=True):
        if away:
            target.copy_(torch.stack([torch.as_tensor(n) for n in row]))
    return table


def _step(weights: list[Tensor], grads: list[Tensor], firsts: list[Tensor], roots: list[Tensor], table: Tensor) -> None:
    """All of it, for some tensors of one size."""
    for i in range(len(weights)):
        complement, sign, coupled, a, b, divisor, bound, keep, rate, factor = table[:, i].unbind()
        weight = weights[i].to(table.dtype)
        grad = grads[i].to(table.dtype) * sign + weight * coupled
        first = firsts[i].to(table.dtype)
        first = first + (grad - first) * complement
        update = (first * a + grad * b) / (roots[i].to(table.dtype) * divisor)
        update = torch.maximum(torch.minimum(update, bound), -bound)
        firsts[i].copy_(first)
        weights[i].copy_(weight * keep - update * (rate * factor))


_kernel = compiled(_step)
