"""What is in a file: sizes, densities, and whether every pattern holds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.export.acceleration import format_accelerations, of_file
from lightning_step.export.foreign import describe_foreign, is_ours, verify_foreign
from lightning_step.export.hardening import verify
from lightning_step.export.load import load_sparse, read_manifest
from lightning_step.export.manifest import Format, Manifest, SparseTensor
from lightning_step.export.onnx_contents import describe_onnx, is_onnx, verify_onnx
from lightning_step.export.write import Exported, export_tensors
from lightning_step.functional.packing import index_bytes
from lightning_step.pattern import NMPattern
from lightning_step.summary import format_table

__all__ = ["convert_file", "describe_file", "verify_file"]


@dataclass(frozen=True)
class _File:
    path: Path
    manifest: Manifest
    tensors: dict[str, Tensor]  # dense, each once


def describe_file(path: str | os.PathLike[str]) -> str:
    """Say what a file holds and which runtime takes what, without any model.

    Args:
        path: A file of this package, any other safetensors file, or an ONNX file (needs ``lightning-step[onnx]``).

    Returns:
        Several lines of plain text. Of a file that says nothing of patterns, where 2:4 holds.

    Raises:
        FileFormatError: See `load_sparse`.

    Example:
        >>> describe_file("/nonexistent")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got '/nonexistent': ...
    """
    if is_onnx(path):
        return describe_onnx(path)
    if not is_ours(path):
        return describe_foreign(path)
    file = _read(path)
    rows = [["tensor", "n:m", "along", "shape", "dtype", "density", "bytes", "of dense"]]
    for name, entry in file.manifest.sparse.items():
        tensor = file.tensors[name]
        stored = _stored_bytes(file.manifest.format, entry, tensor)
        density = (tensor != 0).sum().item() / max(tensor.numel(), 1)
        ratio = stored / max(tensor.nbytes, 1)
        about = [str(entry.pattern), f"dim {entry.dim}", str(entry.shape), str(tensor.dtype).removeprefix("torch.")]
        rows.append([name, *about, f"{density:.1%}", f"{stored:,}", f"{ratio:.1%}"])
    dense = sum(tensor.nbytes for tensor in file.tensors.values())
    size, rest = file.path.stat().st_size, len(file.tensors) - len(file.manifest.sparse)
    head = (
        f"{file.path.name}: {file.manifest.format}, {len(file.manifest.sparse)} sparse and {rest} other tensors, "
        f"{size:,} bytes, {size / max(dense, 1):.1%} of {dense:,} bytes dense"
    )
    judged = of_file(file.manifest, {name: file.tensors[name].dtype for name in file.manifest.sparse})
    return "\n".join([head, "", *format_table(rows, right=[5, 6, 7]), "", format_accelerations(judged)])


def verify_file(
    path: str | os.PathLike[str],
    pattern: NMPattern | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    dim: int | None = None,
) -> int:
    """Make sure that every tensor holds the pattern its manifest says, or, in a file of somebody else's, one that is named.

    Args:
        path: A file of this package, any other safetensors file, or an ONNX file (needs ``lightning-step[onnx]``).
        pattern: What tensors have to hold, for a file that does not say it itself.
        include: Globs of what has to, for such a file; None: every tensor of two dimensions or more.
        exclude: Globs of what need not, for such a file.
        dim: The dimension that holds the groups, for such a file; None: 1. ONNX says itself which axis is summed over.

    Returns:
        How many tensors were verified.

    Raises:
        FileFormatError: See `load_sparse`.
        ConfigurationError: If a pattern is needed and not given, or given and not needed.
        TargetError: If a glob matches nothing, or nothing is left to verify.
        ViolationError: With the first bad group of the first bad tensor.

    Example:
        >>> verify_file("/nonexistent")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got '/nonexistent': ...
    """
    if is_onnx(path):
        if dim is not None:
            raise ConfigurationError(f"Expected no dimension for an ONNX file, whose products say it, but got {dim}.")
        return verify_onnx(path, pattern, include=include, exclude=exclude)
    if not is_ours(path):
        if pattern is None:
            raise ConfigurationError(
                f"Expected a pattern for {str(path)!r}, which has no manifest of lightning-step, but got none. Pass --n and "
                "--m, and with --include or --exclude which tensors have to hold it."
            )
        return verify_foreign(path, pattern, include=include, exclude=exclude, dim=1 if dim is None else dim)
    if pattern is not None or include is not None or exclude or dim is not None:
        raise ConfigurationError(
            f"Expected no pattern, globs or dimension for {str(path)!r}, whose manifest says what it holds. Leave them out."
        )
    try:
        file = _read(path)
    except FileFormatError:
        # Of a file that was changed, the group that no longer holds says more than that it was changed.
        _verify_all(_read(path, check_digests=False))
        raise
    return _verify_all(file)


def convert_file(path: str | os.PathLike[str], out: str | os.PathLike[str], format: Format) -> Exported:
    """Write the same tensors in another format. Patterns are verified again; nothing is pruned.

    Args:
        path: A file of this package.
        out: The file to write; one that is there is replaced at the end, as a whole.
        format: The format to write.

    Returns:
        What was written.

    Raises:
        FileFormatError: See `load_sparse`.
        ViolationError: If a tensor does not hold its pattern.
        ConfigurationError: If ``out`` cannot be written.

    Example:
        >>> convert_file("/nonexistent", "out.safetensors", "packed")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got '/nonexistent': ...
    """
    file, manifest = _read(path), read_manifest(path)
    return export_tensors(file.tensors, manifest.sparse, out, format, aliases=manifest.aliases, info=manifest.info)


def _verify_all(file: _File) -> int:
    for name, entry in file.manifest.sparse.items():
        verify(name, file.tensors[name], entry)
    return len(file.manifest.sparse)


def _read(path: str | os.PathLike[str], check_digests: bool = True) -> _File:
    tensors = load_sparse(path, check_digests=check_digests)
    manifest = read_manifest(path)
    return _File(Path(path), manifest, {name: t for name, t in tensors.items() if name not in manifest.aliases})


def _stored_bytes(format: Format, entry: SparseTensor, tensor: Tensor) -> int:
    if format == "dense":
        return tensor.nbytes
    groups = math.prod(entry.shape) // entry.m
    return groups * entry.n * tensor.itemsize + index_bytes(entry.pattern, groups)
