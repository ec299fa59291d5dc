"""Which constant weights an ONNX graph multiplies with, and along which of their axes the product sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["GraphWeight", "graph_weights"]

Array = np.ndarray[Any, Any]
# Node or initializer by the name of the value it gives; a graph inside a node sees those around it.
_Scope = Mapping[str, Any]
_DEEPEST = 64  # no exporter puts more views than this between a weight and its product


@dataclass(frozen=True)
class GraphWeight:
    """One weight of one product.

    Example:
        >>> GraphWeight("node_linear", "Gemm", "fc.weight", np.ones((3, 8)), 1).rows.shape
        (3, 8)
    """

    node: str
    op: str
    initializer: str  # the name under which the file stores it
    array: Array  # as the product sees it, behind all transposes
    axis: int  # the one that the product sums over
    place: int = 1  # which input of the node it is
    channel_groups: int = 1  # of a convolution

    @property
    def key(self) -> str:
        """What the manifest calls it.

        Returns:
            Node and number of the input.
        """
        return f"{self.node}:{self.place}"

    @property
    def rows(self) -> Array:
        """The weight with the contraction axis last, all others flattened.

        Returns:
            Shape ``(everything else, contraction)``.
        """
        moved: Array = np.moveaxis(self.array, self.axis, -1)
        return moved.reshape(-1, moved.shape[-1]) if moved.size else moved.reshape(0, moved.shape[-1])


def graph_weights(graph: Any, around: _Scope | None = None, prefix: str = "") -> Iterator[GraphWeight]:
    """Every weight of a Gemm, MatMul, (transposed) convolution or recurrent node that is an initializer.

    Args:
        graph: An ``onnx.GraphProto``, its external data loaded.
        around: The values that a graph inside a node sees from outside.
        prefix: What the names of its nodes begin with.

    Yields:
        The weights in the order of the nodes. Transpose, Reshape, Squeeze, Unsqueeze, Identity, Cast and DequantizeLinear
        with constant arguments are followed, as are Constant nodes and sparse initializers.

    Example:
        >>> from types import SimpleNamespace
        >>> list(graph_weights(SimpleNamespace(initializer=[], sparse_initializer=[], node=[])))
        []
    """
    scope = {**(around or {})}
    scope |= {tensor.name: tensor for tensor in graph.initializer}
    scope |= {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    scope |= {output: node for node in graph.node for output in node.output if output}
    for node in graph.node:
        name = prefix + (node.name or node.output[0])
        for place, axis in _PRODUCTS.get(node.op_type, _nothing)(node):
            yield from _weight(node, name, place, axis, scope)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from graph_weights(inner, scope, f"{name}/")


def _weight(node: Any, name: str, place: int, axis: int, scope: _Scope) -> Iterator[GraphWeight]:
    found = _constant(node.input[place], scope) if place < len(node.input) and node.input[place] else None
    if found is None:
        return
    initializer, array = found
    if array.ndim == 1 and node.op_type == "MatMul":
        axis = 0
    if -array.ndim <= axis < array.ndim:
        groups = int(_attribute(node, "group", 1)) if node.op_type.startswith("Conv") else 1
        yield GraphWeight(name, node.op_type, initializer, array, axis % array.ndim, place, groups)


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _nothing(node: Any) -> list[tuple[int, int]]:
    return []


def _gemm(node: Any) -> list[tuple[int, int]]:
    return [(0, 0 if _attribute(node, "transA", 0) else 1), (1, 1 if _attribute(node, "transB", 0) else 0)]


# Input and its contraction axis. A constant on the left of a product is a weight as well.
_PRODUCTS: Mapping[str, Callable[[Any], list[tuple[int, int]]]] = {
    "Gemm": _gemm,
    "MatMul": lambda node: [(0, -1), (1, -2)],
    "Conv": lambda node: [(1, 1)],
    "ConvTranspose": lambda node: [(1, 0)],
    **dict.fromkeys(("LSTM", "GRU", "RNN"), lambda node: [(1, 2), (2, 2)]),
}


def _constant(name: str, scope: _Scope, depth: int = 0) -> tuple[str, Array] | None:
    """The initializer behind a value and what the value is; None if it is computed from the input of the model."""
    from onnx import NodeProto, SparseTensorProto, numpy_helper

    source = scope.get(name)
    if source is None or depth > _DEEPEST:
        return None
    if isinstance(source, SparseTensorProto):
        return name, _dense(source)
    if not isinstance(source, NodeProto):
        return name, numpy_helper.to_array(source)
    if source.op_type == "Constant":
        value = _attribute(source, "value")
        return (name, numpy_helper.to_array(value)) if value is not None else _plain_constant(name, source)
    view = _VIEWS.get(source.op_type)
    found = _constant(source.input[0], scope, depth + 1) if view is not None and source.input else None
    if view is None or found is None:
        return None
    arguments = [_constant(each, scope, depth + 1) if each else None for each in source.input[1:]]
    array = view(source, found[1], [each and each[1] for each in arguments])
    return None if array is None else (found[0], array)


def _plain_constant(name: str, node: Any) -> tuple[str, Array] | None:
    for kind in ("value_ints", "value_int", "value_floats", "value_float"):
        value = _attribute(node, kind)
        if value is not None:
            return name, np.array(value)
    return None


def _dense(tensor: Any) -> Array:
    from onnx import numpy_helper

    values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    array = np.zeros(tuple(tensor.dims), dtype=values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return array


def _transposed(node: Any, array: Array, arguments: list[Array | None]) -> Array:
    return np.transpose(array, _attribute(node, "perm"))


def _reshaped(node: Any, array: Array, arguments: list[Array | None]) -> Array | None:
    if not arguments or arguments[0] is None:
        return None
    keep = not _attribute(node, "allowzero", 0)
    sizes = [array.shape[i] if keep and size == 0 else int(size) for i, size in enumerate(arguments[0].tolist())]
    return array.reshape(sizes)


def _axes(node: Any, arguments: list[Array | None]) -> tuple[int, ...] | None:
    if arguments:  # an input since opset 13
        return None if arguments[0] is None else tuple(arguments[0].tolist())
    axes = _attribute(node, "axes")
    return None if axes is None else tuple(axes)


def _squeezed(node: Any, array: Array, arguments: list[Array | None]) -> Array | None:
    axes = _axes(node, arguments)
    return None if arguments and axes is None else np.squeeze(array, axes)


def _unsqueezed(node: Any, array: Array, arguments: list[Array | None]) -> Array | None:
    axes = _axes(node, arguments)
    return None if axes is None else np.expand_dims(array, axes)


def _dequantized(node: Any, array: Array, arguments: list[Array | None]) -> Array | None:
    """Distances from the zero point: they are zero where the weight is."""
    if not arguments or arguments[0] is None:
        return None
    zero = arguments[1] if len(arguments) > 1 else None
    if zero is None:
        return None if len(arguments) > 1 and len(node.input) > 2 and node.input[2] else array
    if zero.ndim == 1 and zero.size > 1:
        sizes = [1] * array.ndim
        sizes[_attribute(node, "axis", 1)] = zero.size
        zero = zero.reshape(sizes)
    if array.dtype.kind not in "iu":
        return array if not np.any(zero.astype(np.float32)) else None  # float8 has a zero of its own
    difference: Array = array.astype(np.int64) - zero.astype(np.int64)
    return difference


_VIEWS: Mapping[str, Callable[[Any, Array, list[Array | None]], Array | None]] = {
    "Identity": lambda node, array, arguments: array,
    "Cast": lambda node, array, arguments: array,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "DequantizeLinear": _dequantized,
}
