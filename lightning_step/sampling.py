"""Samples of how much the second moment moves, taken without a copy of it and read back only now and then.

Note [One sum for all processes]
    Under FSDP2 a process holds shards of v, and one of them may hold none of some tensor. Every observed step leaves one
    (sum, count) pair (for a sketch: a few sums more) on every process, zeros if there is nothing to add, and that is added
    up over processes at once: as many collectives everywhere, whatever the gradients are, and none when samples are read
    or saved, which one process may do alone. Replicas (DDP) would agree without; they are added up too, because under local
    SGD or on unlike devices they drift apart, and a run whose processes switch at different steps would be lost without a
    word. A shard counts as often as a replica does, and the coordinates read are those that a single process would read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_step.functional import (
    Sketch,
    Statistic,
    drift_update,
    make_sketch,
    second_moment_change,
    statistic_compute,
    statistic_size,
    statistic_update,
)
from lightning_step.optim import SecondMomentAdapter
from lightning_step.sharding import Reduce, all_reduce, first_row, local, shards

__all__ = ["Sample", "SecondMomentSampler"]

Sample = float | tuple[float, ...]
"""The value of a statistic at one step."""


class SecondMomentSampler:
    r"""Takes one sample of a statistic per optimizer step.

    ``observe`` runs right before the optimizer's own arithmetic, when gradient, weight and :math:`v_{t-1}` are all at hand,
    and leaves a (sum, count) pair on the device. ``read`` brings all of them to the host at once.

    Args:
        optimizer: The optimizer whose second moment is sampled.
        adapter: Its adapter.
        parameters: The tensors in scope.
        statistic: Which statistic.
        max_coordinates: Read at most about this many coordinates, a fixed strided subset of each tensor.
        reduce: Adds a pair up over all processes.

    Example:
        >>> from lightning_step.optim import adapter_for
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.Adam([weight], betas=(0.9, 0.99))
        >>> sampler = SecondMomentSampler(optimizer, adapter_for(optimizer), [weight], "arithmetic")
        >>> weight.grad = torch.full_like(weight, 2.0)
        >>> sampler.observe()
        >>> [round(z, 4) for z in sampler.read()]
        [0.04]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        adapter: SecondMomentAdapter,
        parameters: Sequence[Tensor],
        statistic: Statistic,
        *,
        max_coordinates: int = 65_536,
        reduce: Reduce = all_reduce,
    ) -> None:
        self.non_finite = 0  # samples dropped because a gradient was not finite
        self._optimizer = optimizer
        self._adapter = adapter
        self._device = local(parameters[0]).device
        self._statistic: Statistic = statistic
        self._stride = _stride(sum(parameter.numel() for parameter in parameters), max_coordinates)
        # Each tensor, and how many coordinates are read before it.
        sizes = [-(-parameter.numel() // self._stride) for parameter in parameters]
        self._scope = {p: sum(sizes[:i]) for i, p in enumerate(parameters)}
        self._reduce = reduce
        self._pending: list[Tensor] = []  # one per step, on the device, added up over all processes
        self._sketches: dict[tuple[int, ...], Sketch] = {}

    @torch.no_grad()
    def observe(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Take one sample from the gradients that the optimizer is about to use.

        Args:
            found_inf: Non-zero where a loss scaler is about to skip the step (fused optimizers): no sample then.
            grad_scale: Factor that is still in the gradients (fused optimizers).
        """
        sums = torch.zeros(statistic_size(self._statistic), device=self._device)
        for group in self._optimizer.param_groups:
            for part in self._parts(group, grad_scale):
                sums += part.to(sums.device)
        if self._statistic == "drift":  # replicas add up to more than one process alone would have
            sums = torch.cat([sums, sums.new_ones(1)])
        if found_inf is not None:
            sums = torch.where(found_inf.to(sums.device) > 0, torch.zeros_like(sums), sums)
        self._pending.append(self._reduce(sums))

    def read(self) -> list[Sample]:
        """Bring the samples since the last call to the host: the only wait for the device.

        Returns:
            One value per step, oldest first; a tuple for the statistic ``"drift"``. Steps with a non-finite gradient,
            skipped steps and steps in which no coordinate changed give none.
        """
        if not self._pending:
            return []
        stacked = torch.stack(self._pending).double()
        self._pending.clear()
        values = [self._value(row) for row in stacked.tolist() if row[1]]
        finite = [value for value in values if all(map(math.isfinite, value if isinstance(value, tuple) else (value,)))]
        self.non_finite += len(values) - len(finite)
        return finite

    def _value(self, row: list[float]) -> Sample:
        if self._statistic != "drift":
            return statistic_compute(row[0], row[1], self._statistic)
        fourth, _, *others, processes = row
        return tuple(total / processes for total in (fourth, *others))

    def _parts(self, group: dict[str, object], grad_scale: Tensor | None) -> Iterator[Tensor]:
        alike: dict[tuple[torch.device, int], list[Tensor]] = {}
        for parameter in group["params"]:  # type: ignore[attr-defined]
            if parameter in self._scope and parameter.grad is not None:
                alike.setdefault((parameter.device, shards(parameter)), []).append(parameter)
        for (_, weight), parameters in alike.items():
            grads, second = zip(*(self._slices(group, p, grad_scale) for p in parameters), strict=True)
            grad, v, beta2 = torch.cat(grads), torch.cat(second), self._adapter.moments(group).beta2
            change = second_moment_change(grad, v, beta2)
            if self._statistic == "drift":
                yield drift_update(grad, v + change, self._sketch(parameters)) * weight
            else:
                yield statistic_update(change, v + change, self._statistic) * weight

    def _slices(self, group: dict[str, object], parameter: Tensor, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert parameter.grad is not None  # _parts only passes parameters with a gradient
        grad = self._subset(parameter.grad)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad.device)
        grad = self._adapter.effective_gradient(group, self._subset(parameter), grad)
        second = self._adapter.second_moment(self._optimizer, parameter)
        return grad, torch.zeros_like(grad) if second is None else self._subset(second)

    def _sketch(self, parameters: Sequence[Tensor]) -> Sketch:
        """How to make a sketch of these tensors' coordinates, which are numbered as one process alone would do."""
        key = tuple(map(id, parameters))
        if key not in self._sketches:
            numbers = []
            for parameter in parameters:
                first = -(-_skipped(parameter) // self._stride) + self._scope[parameter]
                if first_row(parameter) is None:  # cut across rows: numbers of its own for every process, or they would meet
                    first += (1 + torch.distributed.get_rank()) << 26
                numbers.append(torch.arange(first, first + self._subset(parameter).numel(), device=parameter.device))
            self._sketches[key] = make_sketch(torch.cat(numbers))
        return self._sketches[key]

    def _subset(self, tensor: Tensor) -> Tensor:
        return local(tensor).detach().reshape(-1)[-_skipped(tensor) % self._stride :: self._stride].float()


def _skipped(tensor: Tensor) -> int:
    """How many elements of a tensor other processes hold before the part of this one."""
    return (first_row(tensor) or 0) * math.prod(tensor.shape[1:])


def _stride(total: int, max_coordinates: int) -> int:
    stride = max(1, -(-total // max_coordinates))
    # An even stride would meet only some places of every group, or only some columns of a matrix.
    return stride if stride % 2 else stride + 1
