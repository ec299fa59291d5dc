"""The tensors of a step in portions of bounded size.

Note [Bounded temporaries]
    Whole tensors in lists would need an update of the size of them all, and every kernel would fetch each tensor from memory
    again. A portion is small: its update takes its memory, whatever the size of the model, and on a CPU it lies in the
    cache from the first kernel to the last. Every kernel here works element by element, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_step.sharding import local

__all__ = ["Batch", "Number", "Numbers", "Part", "batches", "flat", "parts"]

State = MutableMapping[str, Any]
"""What an optimizer keeps for one parameter."""

Number = float | Tensor
"""A number, or a tensor without dimensions that stays on its device."""

BYTES = {"cpu": 1 << 18}
"""Of one tensor's portion: five such tensors fit in the second-level cache of a core."""

BYTES_ELSEWHERE = 1 << 26
"""Enough to keep an accelerator busy for longer than it takes to launch a kernel."""


class Numbers(NamedTuple):
    r"""What one tensor's move takes besides tensors: :math:`\mathrm{clamp}((a\,m + b\,g) / D / c,\ \pm d)\,f`.

    Example:
        >>> Numbers(bound=3.0).divisor is None
        True
    """

    bound: Number  # d; infinity: none
    mix: tuple[Number, Number] | None = None  # a and b; None: the first moment itself
    divisor: Tensor | None = None  # c
    factor: Tensor | None = None  # f


class Part(NamedTuple):
    """One tensor and all that belongs to it, as far as this process holds it. All of one shape.

    Example:
        >>> one = torch.ones(2)
        >>> Part(one, one, one, one, Numbers(bound=3.0)).weight.numel()
        2
    """

    weight: Tensor
    grad: Tensor
    first: Tensor  # first moment
    root: Tensor  # preconditioner
    numbers: Numbers


class Batch(NamedTuple):
    """Lists for the foreach kernels.

    Example:
        >>> Batch([], [], [], [], []).weights
        []
    """

    weights: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    roots: list[Tensor]
    numbers: list[Numbers]

    def add(self, part: Part) -> None:
        """Append one part.

        Args:
            part: The part.
        """
        self.weights.append(part.weight)
        self.grads.append(part.grad)
        self.firsts.append(part.first)
        self.roots.append(part.root)
        self.numbers.append(part.numbers)


def parts(
    parameters: Sequence[Tensor], grads: Mapping[Tensor, Tensor], states: Sequence[State], numbers: Sequence[Numbers]
) -> Iterator[Part]:
    """Everything that belongs together; a gradient is asked for when its turn has come.

    Args:
        parameters: The parameters.
        grads: Gradient of each.
        states: State of each.
        numbers: Numbers of each.

    Yields:
        Local parts, where all tensors are sharded alike; else the tensors themselves.

    Example:
        >>> weight = torch.ones(2)
        >>> state = {"exp_avg": weight, "exp_avg_sq": weight}
        >>> next(parts([weight], {weight: weight}, [state], [Numbers(bound=3.0)])).grad
        tensor([1., 1.])
    """
    for parameter, state, of_one in zip(parameters, states, numbers, strict=True):
        tensors = (parameter, grads[parameter], state["exp_avg"], state["exp_avg_sq"])
        placed = [getattr(tensor, "placements", None) for tensor in tensors]
        if placed[0] is not None and all(placements == placed[0] for placements in placed):
            weight, grad, first, root = map(local, tensors)
            yield Part(weight, grad, first, root, of_one)
        else:
            yield Part(*tensors, of_one)


def batches(given: Iterator[Part] | Sequence[Part]) -> Iterator[Batch]:
    """Portions of bounded size, see Note [Bounded temporaries].

    Args:
        given: What to move; one device and dtype.

    Yields:
        Lists with parts of large tensors, or with several small ones.

    Example:
        >>> one = torch.ones(2)
        >>> [len(batch.weights) for batch in batches([Part(one, one, one, one, Numbers(bound=3.0))] * 3)]
        [3]
    """
    batch, size = Batch([], [], [], [], []), 0
    for part in given:
        weights = part.weight.numel()
        limit = BYTES.get(part.weight.device.type, BYTES_ELSEWHERE) // part.weight.element_size()
        if weights > limit:
            yield from _cut(part, limit)
            continue
        if size + weights > limit:
            yield batch
            batch, size = Batch([], [], [], [], []), 0
        batch.add(part)
        size += weights
    if batch.weights:
        yield batch


def flat(part: Part) -> Part | None:
    """The same memory in one dimension.

    Args:
        part: Tensors of any shape.

    Returns:
        Views; None if the tensors have gaps, or lie in memory in different orders.

    Example:
        >>> square = torch.ones(2, 2)
        >>> flat(Part(square, square, square, square, Numbers(bound=3.0))).weight
        tensor([1., 1., 1., 1.])
        >>> flat(Part(square, square[:, :1].expand(2, 2), square, square, Numbers(bound=3.0))) is None
        True
    """
    tensors = part[:4]
    if not all(tensor.is_contiguous() for tensor in tensors):
        strides = part.weight.stride()
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        tensors = tuple(tensor.permute(order) for tensor in tensors)  # type: ignore[assignment]
        if not all(tensor.is_contiguous() for tensor in tensors):
            return None
    weight, grad, first, root = (tensor.view(-1) for tensor in tensors)
    return Part(weight, grad, first, root, part.numbers)


def _cut(part: Part, limit: int) -> Iterator[Batch]:
    row = None if hasattr(part.weight, "placements") else flat(part)
    if row is None:
        yield Batch(*([of_one] for of_one in part))  # type: ignore[arg-type]
        return
    numbers = [part.numbers]
    for weight, grad, first, root in zip(*(torch.split(tensor, limit) for tensor in row[:4]), strict=True):
        yield Batch([weight], [grad], [first], [root], numbers)
