"""What the products of an ONNX file hold, in words and as a check."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_step.errors import ConfigurationError, TargetError
from lightning_step.export.onnx_check import OnnxWeight, onnx_weights
from lightning_step.globs import chosen_names
from lightning_step.pattern import NMPattern
from lightning_step.summary import format_table

__all__ = ["describe_onnx", "is_onnx", "verify_onnx"]


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a file is to be read as ONNX.

    Args:
        path: The file.

    Returns:
        True if its name says so.

    Example:
        >>> is_onnx("model.onnx"), is_onnx("model.safetensors")
        (True, False)
    """
    return Path(path).suffix.lower() == ".onnx"


def describe_onnx(path: str | os.PathLike[str]) -> str:
    """Say which products of an ONNX graph multiply with an n:m weight.

    Args:
        path: The file.

    Returns:
        A table with every constant weight of a product.

    Raises:
        FileFormatError: If it cannot be read.
        ConfigurationError: If onnx is not installed.

    Example:
        >>> describe_onnx("/nonexistent.onnx")  # doctest: +SKIP
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got none (in '/nonexistent.onnx')
    """
    path, weights = Path(path), onnx_weights(path)
    rows = [["weight", "product", "shape", "axis", "n:m", "holds it", "TensorRT"]]
    for each in weights:
        holds = "yes" if each.holds else f"no: {each.reason}"
        about = [str(each.shape), str(each.axis), str(each.pattern) + " (its manifest)" * each.required, holds]
        rows.append([each.initializer, f"{each.op} {each.node}", *about, _tensorrt(each)])
    held = sum(each.holds for each in weights)
    head = f"{path.name}: onnx, {held} of {len(weights)} constant weights hold their pattern along the summed axis"
    return "\n".join([head, "", *format_table(rows)])


def verify_onnx(
    path: str | os.PathLike[str],
    pattern: NMPattern | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> int:
    """Make sure that the weights of an ONNX file hold a pattern along the axis that their products sum over.

    Args:
        path: The file.
        pattern: What they have to hold. None: what the file itself says, which is then all that is verified.
        include: Globs over the names of the weights that have to; None: all.
        exclude: Globs of those that need not.

    Returns:
        How many were verified.

    Raises:
        FileFormatError: If the file cannot be read.
        ConfigurationError: If there is neither a pattern nor a manifest, or onnx is not installed.
        TargetError: If a glob matches nothing, or nothing is left to verify.
        ViolationError: With the first bad group of the first bad weight.

    Example:
        >>> verify_onnx("/nonexistent.onnx")  # doctest: +SKIP
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got none (in '/nonexistent.onnx')
    """
    weights = onnx_weights(path, pattern)
    if pattern is None and not any(weight.required for weight in weights):
        raise ConfigurationError(
            f"Expected a pattern for {str(path)!r}, whose metadata name none, but got none. Pass --n and --m."
        )
    wanted = chosen_names([weight.initializer for weight in weights], include, exclude)
    judged = [each for each in weights if each.initializer in wanted and (pattern is not None or each.required)]
    for weight in judged:
        weight.check(path)
    if not judged:
        raise TargetError(f"Expected a weight to verify in {str(path)!r}, but got none that is chosen. Widen --include.")
    return len(judged)


def _tensorrt(weight: OnnxWeight) -> str:
    if weight.channel_groups > 1:
        return "no: a grouped convolution"
    if weight.op not in ("Gemm", "MatMul", "Conv"):
        return "not known"
    two_four = weight.holds and (weight.pattern.m % 4 == 0 and weight.pattern.n <= 2)
    return "yes" if two_four else "no"
