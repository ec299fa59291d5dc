"""Safetensors files that say nothing of patterns: what they hold is looked up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_step.errors import ConfigurationError, FileFormatError, TargetError, ViolationError
from lightning_step.export.manifest import HEADER_KEY
from lightning_step.functional import find_violation
from lightning_step.globs import chosen_names
from lightning_step.pattern import NMPattern
from lightning_step.summary import format_table

__all__ = ["describe_foreign", "is_ours", "verify_foreign"]

_TWO_FOUR = NMPattern(2, 4)
_PACKED_DTYPES = {torch.float4_e2m1fn_x2}  # several numbers in one element, with which torch does not calculate


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file is to be read as one of this package.

    Args:
        path: The file.

    Returns:
        False for a safetensors file without a manifest. What is no such file at all is left to the reader of ours to refuse.

    Example:
        >>> is_ours("/nonexistent")
        True
    """
    try:
        with _opened(Path(path)) as file:
            return HEADER_KEY in (file.metadata() or {})
    except FileFormatError:
        return True


def describe_foreign(path: str | os.PathLike[str]) -> str:
    """Say which tensors of a safetensors file hold 2:4, and along which dimensions.

    Args:
        path: Any safetensors file.

    Returns:
        A table with every tensor of two dimensions or more.

    Raises:
        FileFormatError: If it cannot be read.

    Example:
        >>> describe_foreign("/nonexistent")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a whole safetensors file, but got '/nonexistent' (...
    """
    path = Path(path)
    rows, flat = [["tensor", "shape", "dtype", "density", "holds 2:4 along"]], 0
    for name, tensor in _tensors(path):
        if tensor.dim() < 2:
            flat += 1
            continue
        rows.append([name, str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."), *_looked_into(tensor)])
    head = (
        f"{path.name}: safetensors without a manifest of lightning-step, {len(rows) - 1} tensors of two dimensions or more "
        f"and {flat} others, {path.stat().st_size:,} bytes"
    )
    tail = "Which layers use them is not known. `lightning-step verify FILE --n 2 --m 4` proves what you name."
    return "\n".join([head, "", *format_table(rows, right=[3]), "", tail])


def verify_foreign(
    path: str | os.PathLike[str],
    pattern: NMPattern,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    dim: int = 1,
) -> int:
    """Make sure that tensors of any safetensors file hold a pattern.

    Args:
        path: The file.
        pattern: What they have to hold.
        include: Globs of what has to; None: every tensor of two dimensions or more.
        exclude: Globs of what need not.
        dim: The dimension that holds the groups.

    Returns:
        How many tensors were verified.

    Raises:
        FileFormatError: If the file cannot be read.
        TargetError: If a glob matches nothing, or nothing is left to verify.
        ConfigurationError: If a tensor has a dtype with which nobody calculates.
        ViolationError: With the first bad group of the first bad tensor.

    Example:
        >>> verify_foreign("/nonexistent", NMPattern(2, 4))
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a whole safetensors file, but got '/nonexistent' (...
    """
    path = Path(path)
    with _opened(path) as file:
        wanted = chosen_names(list(file.keys()), include, exclude)
    count = 0
    for name, tensor in _tensors(path):
        if name not in wanted or (tensor.dim() < 2 and include is None):
            continue
        shape = tuple(tensor.shape)
        if tensor.dtype in _PACKED_DTYPES:
            raise ConfigurationError(
                f"Expected numbers that torch can compare with zero, but got {name!r} of {tensor.dtype}. Leave it out with "
                "--exclude."
            )
        if not 0 <= dim < len(shape) or shape[dim] % pattern.m:
            raise ViolationError(
                f"Expected {name!r} to hold {pattern} along dim {dim}, but got the shape {shape}, which cannot. Name "
                "another dimension with --dim, or leave the tensor out with --exclude."
            )
        bad = find_violation(tensor != 0, pattern, dim)
        if bad is not None:
            raise ViolationError(
                f"Expected {name!r} to hold {pattern} along dim {dim}, but got {bad.nonzeros} non-zero weights in group "
                f"{bad.index} (and {bad.groups - 1} more bad groups)."
            )
        count += 1
    if not count:
        raise TargetError(f"Expected a tensor to verify in {str(path)!r}, but got none that is chosen. Widen --include.")
    return count


def _looked_into(tensor: Tensor) -> tuple[str, str]:
    """Density, and along which dimensions 2:4 holds."""
    if tensor.dtype in _PACKED_DTYPES:
        return "not known", "not known"
    kept = tensor != 0
    dims = [d for d in range(kept.dim()) if kept.shape[d] % 4 == 0 and find_violation(kept, _TWO_FOUR, d) is None]
    density = kept.count_nonzero().item() / max(kept.numel(), 1)
    return f"{density:.1%}", ", ".join(f"dim {dim}" for dim in dims) or "none"


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError(None, "no such file")
        with safe_open(path, framework="pt") as file:
            yield file
    # The others are what torch makes of absurd sizes, which safetensors lets pass.
    except (SafetensorError, OSError, RuntimeError, TypeError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise FileFormatError(f"Expected a whole safetensors file, but got {str(path)!r} ({said}).") from error
