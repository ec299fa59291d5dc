"""Graphs made by hand: the axis that a product sums over is followed through whatever stands before it."""

import numpy as np
import pytest

from lightning_step import NMPattern
from lightning_step.errors import FileFormatError, ViolationError
from lightning_step.export import check_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def graph(nodes, initializers, shape):
    """A file with one input, its output left without a shape."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializer=tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save(model, path):
    onnx.save(model, str(path))
    return path


def two_four(rows, columns):
    """2:4 along the last axis, and along no other."""
    weight = np.zeros((rows, columns), dtype=np.float32)
    weight.reshape(rows, -1, 4)[:, :, :2] = np.arange(1.0, rows * columns // 2 + 1).reshape(rows, -1, 2)
    return weight


W = two_four(8, 8)  # (out, in)
PRODUCTS = {
    "Gemm transB": ([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], W, (3, 8), 1),
    "Gemm": ([helper.make_node("Gemm", ["x", "w"], ["y"])], W.T, (3, 8), 0),
    "Gemm on the left": ([helper.make_node("Gemm", ["w", "x"], ["y"])], W, (8, 3), 1),
    "Gemm on the left, transA": ([helper.make_node("Gemm", ["w", "x"], ["y"], transA=1)], W.T, (8, 3), 0),
    "MatMul": ([helper.make_node("MatMul", ["x", "w"], ["y"])], W.T, (2, 3, 8), 0),
    "MatMul, 3-D": ([helper.make_node("MatMul", ["x", "w"], ["y"])], np.stack([W.T, W.T]), (2, 3, 8), 1),
    "MatMul on the left": ([helper.make_node("MatMul", ["w", "x"], ["y"])], W, (8, 3), 1),
    "MatMul of a vector": ([helper.make_node("MatMul", ["x", "w"], ["y"])], W[0], (3, 8), 0),
    "Conv": ([helper.make_node("Conv", ["x", "w"], ["y"])], W[:, :, None, None].repeat(3, 2).repeat(3, 3), (1, 8, 5, 5), 1),
    "Conv, 1-D": ([helper.make_node("Conv", ["x", "w"], ["y"])], W[:, :, None], (1, 8, 5), 1),
    "Conv, groups": ([helper.make_node("Conv", ["x", "w"], ["y"], group=2)], W[:, :, None], (1, 16, 5), 1),
    "ConvTranspose": ([helper.make_node("ConvTranspose", ["x", "w"], ["y"])], W.T[:, :, None], (1, 8, 5), 0),
    "Transpose": (
        [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])],
        W,
        (2, 3, 8),
        0,
    ),
    "Transpose of three, Identity, Cast": (
        [
            helper.make_node("Identity", ["w"], ["a"]),
            helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        np.stack([W, W]),
        (2, 3, 8),
        1,
    ),
    "Transpose and transB": (
        [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("Gemm", ["x", "t"], ["y"], transB=1)],
        W.T,
        (3, 8),
        1,
    ),
    "Reshape": (
        [
            helper.make_node("Constant", [], ["s"], value_ints=[0, -1, 1, 1]),
            helper.make_node("Reshape", ["w", "s"], ["t"]),
            helper.make_node("Conv", ["x", "t"], ["y"]),
        ],
        W,
        (1, 8, 5, 5),
        1,
    ),
    "Unsqueeze and Squeeze": (
        [
            helper.make_node("Constant", [], ["s"], value_ints=[2, 3]),
            helper.make_node("Constant", [], ["r"], value_ints=[3]),
            helper.make_node("Unsqueeze", ["w", "s"], ["u"]),
            helper.make_node("Squeeze", ["u", "r"], ["t"]),
            helper.make_node("Conv", ["x", "t"], ["y"]),
        ],
        W,
        (1, 8, 5),
        1,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_contraction_axis_is_followed(name, tmp_path):
    """The runtime is the oracle: groups of four inputs of which two never reach the output."""
    nodes, weight, shape, axis = PRODUCTS[name]
    path = save(graph(nodes, {"w": np.ascontiguousarray(weight)}, shape), tmp_path / "model.onnx")
    (found,) = check_onnx(path, strict=True)
    assert (found.axis, found.initializer, found.required) == (axis, "w", False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    contraction = {"Conv": 1, "ConvTranspose": 1}.get(nodes[-1].op_type, 0 if nodes[-1].input[0] == "w" else len(shape) - 1)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    other = x.copy()
    dead = [slice(None)] * len(shape)
    dead[contraction] = [i for i in range(shape[contraction]) if i % 4 > 1]  # what `two_four` drops
    other[tuple(dead)] += 1.0
    assert np.array_equal(session.run(None, {"x": x})[0], session.run(None, {"x": other})[0])
    turned = {"w": np.ascontiguousarray(np.ones_like(weight))}
    with pytest.raises(ViolationError, match="got 4 non-zero weights in group"):
        check_onnx(save(graph(nodes, turned, shape), tmp_path / "bad.onnx"), strict=True)


def test_a_pattern_along_the_other_axis_does_not_pass(tmp_path):
    """The last axis of a transposed initializer is not the one a product sums over."""
    path = save(graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W}, (2, 3, 8)), tmp_path / "model.onnx")
    (found,) = check_onnx(path)
    assert (found.axis, found.holds) == (0, False)
    assert "got 8 non-zero" not in found.reason
    assert found.reason.startswith("4 non-zero weights in group (0, 0)")
    (turned,) = check_onnx(
        save(graph([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": W}, (3, 8)), tmp_path / "b.onnx")
    )
    assert turned.holds


@pytest.mark.parametrize(("zero", "holds"), [(0, True), (3, True), (2, False)])
def test_quantized_weights_are_zero_where_they_equal_the_zero_point(zero, holds, tmp_path):
    stored = np.where(W == 0, 3 if zero == 3 else 0, 7).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["d"]),
        helper.make_node("Gemm", ["x", "d"], ["y"], transB=1),
    ]
    tensors = {"w": stored, "scale": np.array(0.5, dtype=np.float32), "zero": np.array(zero, dtype=np.int8)}
    (found,) = check_onnx(save(graph(nodes, tensors, (3, 8)), tmp_path / "model.onnx"))
    assert found.holds == holds


def test_a_graph_inside_a_node_sees_the_weights_outside(tmp_path):
    def branch(name):
        nodes = [helper.make_node("MatMul", ["x", "w"], [name], name=f"m_{name}")]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    nodes = [helper.make_node("If", ["c"], ["y"], name="choose", then_branch=branch("a"), else_branch=branch("b"))]
    path = save(graph(nodes, {"w": np.ones((8, 8), np.float32), "c": np.array(True)}, (2, 8)), tmp_path / "model.onnx")
    assert sorted(weight.node for weight in check_onnx(path)) == ["choose/m_a", "choose/m_b"]
    with pytest.raises(ViolationError):
        check_onnx(path, strict=True)


def test_a_function_of_the_model_is_entered(tmp_path):
    body = [helper.make_node("Transpose", ["b"], ["t"]), helper.make_node("MatMul", ["a", "t"], ["o"])]
    function = helper.make_function("own", "linear", ["a", "b"], ["o"], body, [helper.make_opsetid("", 20)])
    model = graph([helper.make_node("linear", ["x", "w"], ["y"], domain="own")], {"w": W}, (2, 8))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(function)
    (found,) = check_onnx(save(model, tmp_path / "model.onnx"))
    assert (found.op, found.axis, found.holds) == ("MatMul", 0, True)


def test_sparse_initializers_are_read(tmp_path):
    model = graph([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {}, (3, 8))
    places = np.flatnonzero(W)
    values = numpy_helper.from_array(W.reshape(-1)[places], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8, 8]))
    (found,) = check_onnx(save(model, tmp_path / "model.onnx"))
    assert (found.shape, found.holds) == ((8, 8), True)


def test_a_constant_that_is_computed_from_the_input_is_no_weight(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["x", "r"], ["y"])]
    assert check_onnx(save(graph(nodes, {}, (8, 8)), tmp_path / "model.onnx")) == ()


def test_a_size_that_m_does_not_divide_is_reported(tmp_path):
    path = save(
        graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros((6, 8), np.float32)}, (2, 6)), tmp_path / "x"
    )
    (found,) = check_onnx(path)
    assert found.reason == "a size of 6, which 4 does not divide"
    assert check_onnx(path, NMPattern(1, 3))[0].holds


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_is_no_file_is_refused(name, tmp_path):
    with pytest.raises(FileFormatError, match="Expected a readable file at `path`, but got none"):
        check_onnx(tmp_path / name)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"version": 2}', "of version 1 or older, but got 2"),
        ("{", "cannot be read"),
        ('{"version": 1, "nodes": {"a": {"n": 5, "m": 4}}}', "1 <= n <= m"),
        ('{"version": 1, "nodes": []}', "cannot be read"),
    ],
)
def test_a_manifest_that_is_damaged_or_newer_is_refused(manifest, message, tmp_path):
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W}, (2, 3, 8))
    model.metadata_props.add(key="lightning_step", value=manifest)
    with pytest.raises(FileFormatError, match=message):
        check_onnx(save(model, tmp_path / "model.onnx"))
