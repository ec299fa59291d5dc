"""Samples of how much the second moment moves, taken without a copy of it and read back only now and then.

Note [One sum for all processes]
    Under FSDP2 a process holds shards of v, and one of them may hold none of some tensor. Every observed step leaves one
    (sum, count) pair on every process, zeros if there is nothing to add, and that pair is added up over processes at once:
    as many collectives everywhere, whatever the gradients are, and none when samples are read or saved, which one process
    may do alone. Replicas (DDP) would agree without; they are added up too, because under local SGD or on unlike devices
    they drift apart, and a run whose processes switch at different steps would be lost without a word. A shard counts as
    often as a replica does, and the coordinates read are those that a single process would read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_step.functional import Statistic, second_moment_change, statistic_compute, statistic_update
from lightning_step.optim import SecondMomentAdapter
from lightning_step.sharding import Reduce, all_reduce, first_row, local, shards

__all__ = ["SecondMomentSampler"]


class SecondMomentSampler:
    r"""Takes one sample of a statistic per optimizer step.

    ``observe`` runs right before the optimizer's own arithmetic, when gradient, weight and :math:`v_{t-1}` are all at hand,
    and leaves a (sum, count) pair on the device. ``read`` brings all pairs to the host at once.

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
        self._scope = set(parameters)
        self._device = local(parameters[0]).device
        self._statistic: Statistic = statistic
        self._stride = _stride(sum(parameter.numel() for parameter in parameters), max_coordinates)
        self._reduce = reduce
        self._pending: list[Tensor] = []  # each (2,), on the device, added up over all processes

    @torch.no_grad()
    def observe(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Take one sample from the gradients that the optimizer is about to use.

        Args:
            found_inf: Non-zero where a loss scaler is about to skip the step (fused optimizers): no sample then.
            grad_scale: Factor that is still in the gradients (fused optimizers).
        """
        pair = torch.zeros(2, device=self._device)
        for group in self._optimizer.param_groups:
            for part in self._pairs(group, grad_scale):
                pair += part.to(pair.device)
        if found_inf is not None:
            pair = torch.where(found_inf.to(pair.device) > 0, torch.zeros_like(pair), pair)
        self._pending.append(self._reduce(pair))

    def read(self) -> list[float]:
        """Bring the samples since the last call to the host: the only wait for the device.

        Returns:
            One value per step, oldest first. Steps with a non-finite gradient, skipped steps and steps in which no
            coordinate changed give none.
        """
        if not self._pending:
            return []
        stacked = torch.stack(self._pending).double()
        self._pending.clear()
        values = [statistic_compute(total, count, self._statistic) for total, count in stacked.tolist() if count]
        finite = [value for value in values if math.isfinite(value)]
        self.non_finite += len(values) - len(finite)
        return finite

    def _pairs(self, group: dict[str, object], grad_scale: Tensor | None) -> Iterator[Tensor]:
        alike: dict[tuple[torch.device, int], list[Tensor]] = {}
        for parameter in group["params"]:  # type: ignore[attr-defined]
            if parameter in self._scope and parameter.grad is not None:
                alike.setdefault((parameter.device, shards(parameter)), []).append(parameter)
        for (_, weight), parameters in alike.items():
            grads, second = zip(*(self._slices(group, p, grad_scale) for p in parameters), strict=True)
            v = torch.cat(second)
            change = second_moment_change(torch.cat(grads), v, self._adapter.moments(group).beta2)
            yield statistic_update(change, v + change, self._statistic) * weight

    def _slices(self, group: dict[str, object], parameter: Tensor, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert parameter.grad is not None  # _pairs only passes parameters with a gradient
        grad = self._subset(parameter.grad)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad.device)
        grad = self._adapter.effective_gradient(group, self._subset(parameter), grad)
        second = self._adapter.second_moment(self._optimizer, parameter)
        return grad, torch.zeros_like(grad) if second is None else self._subset(second)

    def _subset(self, tensor: Tensor) -> Tensor:
        part, first = local(tensor).detach(), first_row(tensor) or 0
        skipped = first * math.prod(tensor.shape[1:])  # what other processes hold of the tensor before this part
        return part.reshape(-1)[-skipped % self._stride :: self._stride].float()


def _stride(total: int, max_coordinates: int) -> int:
    stride = max(1, -(-total // max_coordinates))
    # An even stride would meet only some places of every group, or only some columns of a matrix.
    return stride if stride % 2 else stride + 1
