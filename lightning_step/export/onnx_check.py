"""Does an ONNX file hold n:m where a runtime would use it?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_step.errors import FileFormatError, LightningStepError, ViolationError
from lightning_step.export.manifest import HEADER_KEY
from lightning_step.export.onnx import ONNX_MANIFEST_VERSION, need_onnx
from lightning_step.export.onnx_graph import GraphWeight, graph_weights
from lightning_step.functional import find_violation
from lightning_step.pattern import NMPattern

__all__ = ["OnnxWeight", "check_onnx", "onnx_weights"]


@dataclass(frozen=True)
class OnnxWeight:
    """What one product of an ONNX graph multiplies with.

    Example:
        >>> weight = OnnxWeight("node_linear", "Gemm", "fc.weight", (4, 8), 1, NMPattern(2, 4), reason="", required=True)
        >>> weight.holds
        True
    """

    node: str
    op: str  # Gemm, MatMul, Conv, ConvTranspose, LSTM, GRU or RNN
    initializer: str
    shape: tuple[int, ...]  # as the product sees it, behind all transposes
    axis: int  # the one that the product sums over
    pattern: NMPattern  # what it was checked against
    reason: str  # why it does not hold the pattern; empty if it does
    required: bool  # the file itself says that it holds the pattern
    channel_groups: int = 1  # of a convolution; TensorRT never runs one with several as sparse

    @property
    def holds(self) -> bool:
        """Whether every group of the weight holds the pattern.

        Returns:
            True if it does.
        """
        return not self.reason

    def check(self, path: str | os.PathLike[str]) -> None:
        """Refuse the weight if it does not hold the pattern.

        Args:
            path: The file it is in.

        Raises:
            ViolationError: With its first bad group.
        """
        if self.reason:
            raise ViolationError(
                f"Expected the weight {self.initializer!r} {self.shape} of {self.op} {self.node!r} to hold {self.pattern} "
                f"along axis {self.axis}, over which the product sums, but got {self.reason} (in {str(path)!r}). Export the "
                "model again."
            )


def check_onnx(
    path: str | os.PathLike[str], pattern: NMPattern | None = None, *, strict: bool = False
) -> tuple[OnnxWeight, ...]:
    """Prove n:m along the contraction axis of every Gemm, MatMul and (transposed) convolution with a constant weight.

    Transposes, reshapes, casts and dequantization between a weight and its product are followed, weights in external files
    are read, and graphs inside nodes and functions of the model are entered. Needs ``lightning-step[onnx]``.

    Args:
        path: The ONNX file; from `export_onnx`, or any other.
        pattern: Check against this one. None: what `export_onnx` noted for each node, and 2:4 for all others.
        strict: Every weight has to hold its pattern, not only those of which the file says so.

    Returns:
        Every weight found, in the order of the nodes.

    Raises:
        ViolationError: If a weight does not hold the pattern that it has to; with its first bad group.
        FileFormatError: If the file is missing, damaged, newer than this version, or lacks a node that its manifest names.
        ConfigurationError: If onnx is not installed.

    Example:
        >>> for weight in check_onnx("model.onnx"):  # doctest: +SKIP
        ...     print(weight.node, weight.op, weight.holds)
        node_linear Gemm True
    """
    found = onnx_weights(path, pattern)
    for weight in found:
        if weight.required or strict:
            weight.check(path)
    return found


def onnx_weights(path: str | os.PathLike[str], pattern: NMPattern | None = None) -> tuple[OnnxWeight, ...]:
    """What `check_onnx` looks at, and whether it holds; nothing is refused for not holding.

    Args:
        path: See `check_onnx`.
        pattern: See `check_onnx`.

    Returns:
        See `check_onnx`.

    Raises:
        FileFormatError: See `check_onnx`.
        ConfigurationError: If onnx is not installed.

    Example:
        >>> [weight.holds for weight in onnx_weights("model.onnx")]  # doctest: +SKIP
        [True, False]
    """
    need_onnx("onnx")
    path = Path(path)
    try:
        model = _loaded(path)
        required = {} if pattern is not None else _required(model)
        weights = list(graph_weights(model.graph))
        found = [_judged(weight, pattern, required) for weight in weights]
    except LightningStepError as error:
        raise FileFormatError(f"{error} (in {str(path)!r})") from error
    except Exception as error:  # onnx, protobuf and numpy raise whatever they like at damaged files
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileFormatError(
            f"Expected a whole ONNX file, but got {str(path)!r}, which cannot be read ({(reason or repr(error))[:300]})."
        ) from error
    lost = sorted(required.keys() - {weight.key for weight in weights})
    if lost:
        raise FileFormatError(
            f"Expected {str(path)!r} to hold a constant weight at the node {lost[0]!r}, as its manifest says, but got "
            "none. The file was changed since it was exported; check it with `pattern=` instead."
        )
    return tuple(found)


def _loaded(path: Path) -> Any:
    import onnx
    from onnx.inliner import inline_local_functions

    if not path.is_file():  # a pipe would be waited for
        raise FileFormatError("Expected a readable file at `path`, but got none")
    model = onnx.load(str(path))  # external data too; it refuses to look outside of the folder
    if not model.graph.node and not model.ir_version:  # protobuf takes many bytes that are no model for an empty one
        raise FileFormatError("Expected an ONNX model, but got an empty one")
    return inline_local_functions(model) if model.functions else model


def _required(model: Any) -> dict[str, NMPattern]:
    """The inputs of nodes that have to hold a pattern, from the manifest; none without one."""
    text = next((entry.value for entry in model.metadata_props if entry.key == HEADER_KEY), None)
    if text is None:
        return {}
    body = json.loads(text)
    if body["version"] > ONNX_MANIFEST_VERSION:
        raise FileFormatError(
            f"Expected a manifest of version {ONNX_MANIFEST_VERSION} or older, but got {body['version']!r}. "
            "Update lightning-step."
        )
    return {str(node): NMPattern(entry["n"], entry["m"]) for node, entry in body["nodes"].items()}


def _judged(weight: GraphWeight, pattern: NMPattern | None, required: Mapping[str, NMPattern]) -> OnnxWeight:
    wanted = pattern or required.get(weight.key, NMPattern(2, 4))
    return OnnxWeight(
        weight.node,
        weight.op,
        weight.initializer,
        tuple(weight.array.shape),
        weight.axis,
        wanted,
        _why_not(weight, wanted),
        weight.key in required,
        weight.channel_groups,
    )


def _why_not(weight: GraphWeight, pattern: NMPattern) -> str:
    size = weight.array.shape[weight.axis]
    if size % pattern.m:
        return f"a size of {size}, which {pattern.m} does not divide"
    bad = find_violation(torch.from_numpy(weight.array != 0), pattern, weight.axis)
    if bad is None:
        return ""
    return f"{bad.nonzeros} non-zero weights in group {bad.index} (and {bad.groups - 1} more bad groups)"
