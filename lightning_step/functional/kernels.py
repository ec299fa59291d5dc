"""The ways to compute a mask, all with the same result, and the choice between them.

Note [Bits of a magnitude]
    The bits of a floating-point number without its sign, read as an integer, are in the order of the magnitudes; NaN comes
    behind infinity, and is brought down to it (see Note [NaN]). Integers are compared faster, and exactly also where the
    processor is told to take subnormal numbers for zero.

Note [Blocks]
    On a CPU a step over a whole matrix waits for memory, and a network of comparisons takes dozens of steps. So it runs
    over blocks whose intermediate results stay in the cache.

Note [When a mask kernel is compiled]
    On CUDA, where Triton is there, for tensors of 2**20 elements or more; on a CPU only if the environment variable
    ``LIGHTNING_STEP_COMPILE`` is 1 (see `lightning_step.compiling`), because a C++ compiler takes its seconds, and from
    2**18 elements. Scores of integers and float8, and groups that are too long for a network, are never compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from lightning_step.compiling import compiled, is_traced, wants_compile
from lightning_step.functional.bits import INTEGERS, as_laid_out, block_elements
from lightning_step.functional.networks import keep_largest

__all__ = ["Order", "as_magnitudes", "as_scores", "keep_in_groups"]

Order = Callable[[Tensor], Tensor]
"""Makes a tensor comparable: a new one without NaN, in the order of the scores."""

_INFINITY = {  # as what it reads
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
}
_NETWORK_MAX_M = 32  # a longer group is sorted
_TRACED_MAX_M = 8  # in somebody's graph, where every comparison is a node
_SMALL = 512  # up to so many elements one sort costs less than the calls of a network
_COMPILED_ELEMENTS = {"cpu": 2**18, "cuda": 2**20}  # see Note [When a mask kernel is compiled]


def as_scores(scores: Tensor) -> Tensor:
    """Scores without NaN.

    Args:
        scores: Any real dtype.

    Returns:
        A comparable tensor.

    Example:
        >>> as_scores(torch.tensor([1.0, torch.nan]))
        tensor([1., inf])
    """
    if not scores.dtype.is_floating_point:
        return scores
    if scores.dtype.itemsize == 1:  # float8 has no comparison kernels; the cast is exact
        scores = scores.float()
    return torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def as_magnitudes(weight: Tensor) -> Tensor:
    """Magnitudes without NaN; as integers where that can be, see Note [Bits of a magnitude].

    Args:
        weight: Any real dtype.

    Returns:
        A comparable tensor.

    Example:
        >>> as_magnitudes(torch.tensor([-0.0, 1.0, -1.0], dtype=torch.float16)).tolist()
        [0, 15360, 15360]
    """
    return _magnitude_bits(weight) if weight.dtype in INTEGERS else as_scores(weight.abs())


def keep_in_groups(groups: Tensor, place: int, n: int, order: Order) -> Tensor:
    """Keep the ``n`` largest along one dimension.

    Args:
        groups: Shape ``(..., m, ...)``.
        place: The dimension that holds a group.
        n: How many to keep, fewer than m.
        order: What makes ``groups`` comparable.

    Returns:
        Boolean, the shape of ``groups``.

    Example:
        >>> keep_in_groups(torch.tensor([[1., 2.], [3., -3.]]), 1, 1, as_magnitudes)
        tensor([[False,  True],
                [ True, False]])
    """
    m = groups.shape[place]
    if type(groups) is not Tensor or groups.is_meta or is_traced():
        scores = as_scores(groups.abs() if order is as_magnitudes else groups)  # numbers: bits are not for every backend
        return (_network if m <= (_NETWORK_MAX_M if n == 1 else _TRACED_MAX_M) else _sorted)(scores, place, n)
    if m > _NETWORK_MAX_M or groups.numel() <= _SMALL:
        return _sorted(order(groups), place, n)
    laid = as_laid_out(groups)
    axis = laid.index(place)
    dense = groups.permute(laid).contiguous()
    between = dense.shape[axis + 1 :].numel()
    flat = dense.view(-1, m, between) if between > 1 else dense.view(-1, m)  # (groups, m, between two of a group)
    kept = (_compiled if _compiles(flat, order) else _eager)(flat, n, order)
    return kept.view(dense.shape).permute([laid.index(d) for d in range(groups.dim())])


def _network(scores: Tensor, place: int, n: int) -> Tensor:
    return torch.stack(keep_largest(scores.unbind(place), n), dim=place)


def _sorted(scores: Tensor, place: int, n: int) -> Tensor:
    first = scores.argsort(dim=place, descending=True, stable=True).narrow(place, 0, n)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(place, first, True)  # in place is unknown to vmap


def _eager(flat: Tensor, n: int, order: Order) -> Tensor:
    """See Note [Blocks]."""
    kept = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    rows = max(1, block_elements() // flat[0, 0].numel()) if flat.device.type == "cpu" else flat.shape[0]
    for block, to in zip(torch.split(flat, rows), torch.split(kept, rows), strict=True):
        torch.stack(keep_largest([order(part) for part in block.unbind(1)], n), dim=1, out=to)
    return kept


def _compiles(flat: Tensor, order: Order) -> bool:
    """See Note [When a mask kernel is compiled]."""
    fewest = _COMPILED_ELEMENTS.get(flat.device.type)
    if fewest is None or flat.numel() < fewest or order is not as_magnitudes or flat.dtype not in INTEGERS:
        return False
    asked = wants_compile()
    if flat.device.type == "cpu" or asked is not None:
        return asked is True
    return _has_triton() and not torch.cuda.is_current_stream_capturing()


def _compiled(flat: Tensor, n: int, order: Order) -> Tensor:
    kernel = _kernel(n, flat.shape[1:], flat.dtype, flat.device.type)
    if flat.device.type != "cpu":
        with torch.no_grad():
            return kernel(flat)
    # One graph for a size that serves every matrix: only loops of known length are vectorized.
    rows = max(1, _COMPILED_ELEMENTS["cpu"] // flat[0].numel())
    whole = len(flat) // rows * rows
    kept = torch.empty(flat.shape, dtype=torch.bool)
    with torch.no_grad():  # one graph, not another one for every mode
        for block, to in zip(torch.split(flat[:whole], rows), torch.split(kept[:whole], rows), strict=True):
            to.copy_(kernel(block))  # a graph that wrote it there itself would not be vectorized
    if whole < len(flat):
        kept[whole:] = _eager(flat[whole:], n, order)
    return kept


@cache
def _kernel(n: int, shape: torch.Size, dtype: torch.dtype, device: str) -> Callable[[Tensor], Tensor]:
    def kept(flat: Tensor) -> Tensor:
        return torch.stack(keep_largest([_magnitude_bits(part) for part in flat.unbind(1)], n), dim=1)

    # torch.compile counts the graphs of one code object, up to a limit: every kernel has its own
    own = FunctionType(kept.__code__.replace(), kept.__globals__, kept.__name__, None, kept.__closure__)
    return compiled(own, dynamic=device != "cpu")


def _magnitude_bits(weight: Tensor) -> Tensor:
    integer = INTEGERS[weight.dtype]
    return (weight.view(integer) & torch.iinfo(integer).max).clamp_(max=_INFINITY[weight.dtype])


@cache
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()
