"""Tensors of which every process holds a part, and what all processes have to agree on.

Note [Shards]
    FSDP2 leaves a module the same ``Parameter`` names with a ``DTensor`` behind each: a shape for the whole and a local
    part. Forward passes see the whole weight, gathered for the moment, so masks are made there as ever. The optimizer sees
    parts: a mask is made of each part alone, which is the part of the mask as long as no group is cut, and that is made
    sure of before the first step. What is one number for the whole tensor or the whole model is added up over processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_step.errors import ConfigurationError

__all__ = [
    "Reduce",
    "all_reduce",
    "any_sharded",
    "check_groups",
    "first_row",
    "gathers",
    "is_first",
    "like",
    "local",
    "on_one",
    "reshard",
    "shards",
    "whole",
    "whole_count",
    "whole_mean",
    "world_size",
]

T = TypeVar("T")
Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes; every one of them calls it."""

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    _SHARDED: tuple[type, ...] = (DTensor,)
    _RESHARDS: tuple[type, ...] = (FSDPModule,)
else:  # a torch built without it: then nothing is ever sharded
    _SHARDED = _RESHARDS = ()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds.

    Args:
        tensor: Any tensor.

    Returns:
        The local part, sharing its memory; the tensor itself if it is whole.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if isinstance(tensor, _SHARDED) else tensor  # type: ignore[attr-defined]


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that is spread as another one.

    Args:
        part: What this process holds of it.
        tensor: The other one.

    Returns:
        ``part`` itself if the other one is whole.

    Example:
        >>> like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not isinstance(tensor, _SHARDED):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process has to call this, for the same tensors in the same order.

    Args:
        tensor: Any tensor.

    Returns:
        The gathered tensor; the tensor itself if it is whole.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, _SHARDED) else tensor  # type: ignore[attr-defined]


def shards(tensor: Tensor) -> int:
    """Over how many processes the elements of a tensor are spread: 1 if each has them all.

    Args:
        tensor: Any tensor.

    Returns:
        The number.

    Example:
        >>> shards(torch.ones(2))
        1
    """
    if not isinstance(tensor, _SHARDED):
        return 1
    count = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):  # type: ignore[attr-defined]
        count *= size if placement.is_shard() else 1
    return count


def whole_count(tensor: Tensor, condition: Tensor) -> int:
    """How many elements of a whole tensor fulfil a condition. Every process that holds a part has to call this.

    Args:
        tensor: Any tensor.
        condition: Boolean, the shape of its local part.

    Returns:
        The number, the same on every process.

    Example:
        >>> whole_count(weight := torch.ones(2), weight > 0)
        2
    """
    return int(_sum_over_parts(tensor, condition.sum()))


def whole_mean(tensor: Tensor) -> Tensor | None:
    """The mean of a whole tensor, where this process holds a part. Every process that holds a part has to call this.

    Args:
        tensor: Any tensor.

    Returns:
        Shape ``()``, float32 or wider; None for a tensor that is not cut: its mean is no secret.

    Example:
        >>> whole_mean(torch.ones(2)) is None
        True
    """
    if shards(tensor) == 1:
        return None
    part = local(tensor)
    total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return _sum_over_parts(tensor, total) / tensor.numel()


def _sum_over_parts(tensor: Tensor, value: Tensor) -> Tensor:
    # By hand and at once: DTensor's own reductions leave collectives in flight behind them.
    if isinstance(tensor, _SHARDED):
        value = value.clone()
        for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=tensor.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return value


def first_row(tensor: Tensor) -> int | None:
    """Where the local part of a tensor begins, if it is a run of whole rows.

    Args:
        tensor: Any tensor.

    Returns:
        Its place along dim 0; None if the tensor is cut in another way.

    Example:
        >>> first_row(torch.ones(2))
        0
    """
    if not isinstance(tensor, _SHARDED):
        return 0
    begin, size = 0, tensor.shape[0]
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if type(placement) is Shard and placement.dim == 0:
            part = -(-size // mesh.size(axis))
            skipped = min(mesh.get_local_rank(axis) * part, size)
            begin, size = begin + skipped, min(part, size - skipped)
        elif not placement.is_replicate():
            return None
    return begin


def check_groups(name: str, tensor: Tensor, dim: int, m: int) -> None:
    """Refuse a tensor that is cut inside of a group.

    Args:
        name: Its name.
        tensor: The tensor.
        dim: The dimension that holds the groups.
        m: Their length.

    Raises:
        ConfigurationError: If some process would hold a part of a group; on every process alike.

    Example:
        >>> check_groups("weight", torch.ones(4, 6), 1, 4)  # whole
    """
    if not isinstance(tensor, _SHARDED):
        return
    part = tensor.shape[dim]
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):  # type: ignore[attr-defined]
        if placement.is_shard(dim) and size > 1:
            part = -(-part // size)
    if part % m and part != tensor.shape[dim]:
        raise ConfigurationError(
            f"Expected shards of {name!r} to hold whole groups of {m} along dim {dim}, but got parts of {part} of its "
            f"{tensor.shape[dim]}: a group would be cut in two. Shard it along another dimension with the "
            f"`shard_placement_fn` of fully_shard, choose another number of processes, or leave it dense with `exclude`."
        )


def reshard(model: nn.Module) -> None:
    """Make the registered parameters those that the optimizer knows, also right after a forward pass.

    FSDP2 leaves the root module's weights gathered until the backward pass: what is written into those is lost.

    Args:
        model: Any module.

    Example:
        >>> reshard(nn.Linear(1, 1))
    """
    for module in model.modules():
        if isinstance(module, _RESHARDS):
            module.reshard()  # type: ignore[operator]


def gathers(model: nn.Module) -> bool:
    """Whether a model's weights are put together for each forward pass, by FSDP2.

    Args:
        model: Any module.

    Returns:
        True if so for at least one of its modules.

    Example:
        >>> gathers(nn.Linear(1, 1))
        False
    """
    return any(isinstance(module, _RESHARDS) for module in model.modules())


def world_size() -> int:
    """How many processes train together.

    Returns:
        1 without ``torch.distributed``.

    Example:
        >>> world_size()
        1
    """
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def is_first() -> bool:
    """Whether this process is the one that writes files.

    Returns:
        True for rank 0, and without ``torch.distributed``.

    Example:
        >>> is_first()
        True
    """
    return world_size() == 1 or torch.distributed.get_rank() == 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes. Every one has to call this.

    Args:
        tensor: Any tensor. Not modified.

    Returns:
        The sum, bit for bit the same on every process.

    Example:
        >>> all_reduce(torch.ones(2))
        tensor([1., 1.])
    """
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def on_one(work: Callable[[], T]) -> T:
    """Have the first process do something while the others wait for how it went. Every one has to call this.

    Args:
        work: What to do. Must not need the other processes.

    Returns:
        What it returned, on every process.

    Raises:
        Exception: What it raised, on every process, so that none goes on alone and waits forever.

    Example:
        >>> on_one(lambda: 1 + 1)
        2
    """
    if world_size() == 1:
        return work()
    outcome: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if is_first():
        try:
            outcome = [(work(), None)]
        except BaseException as error:
            torch.distributed.broadcast_object_list([(None, _portable(error))])
            raise
    torch.distributed.broadcast_object_list(outcome)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _portable(error: BaseException) -> BaseException:
    """The error if it can be sent to another process, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"The first process failed with {type(error).__name__}: {error}")
    return error


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether at least one of some tensors is spread over processes.

    Args:
        tensors: The tensors.

    Returns:
        True if so.

    Example:
        >>> any_sharded([torch.ones(1)])
        False
    """
    return any(isinstance(tensor, _SHARDED) for tensor in tensors)
