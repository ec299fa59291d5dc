"""ONNX files give what PyTorch gives, hold the pattern where a product sums, and a planted violation is found."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from lightning_step import NMPattern, apply_nm_masks, find_targets, nm_masks, strip
from lightning_step.errors import ArgumentTypeError, ConfigurationError, FileFormatError, ViolationError
from lightning_step.export import check_onnx, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

TWO_FOUR = NMPattern(2, 4)


def cnn():
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()]
    head = [
        nn.ConvTranspose2d(8, 4, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Linear(8, 4, bias=False),
    ]
    model = nn.Sequential(*layers, *head)
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2.0)  # so that folding it changes the weights
        model[1].running_mean.normal_()
    return model, (torch.randn(2, 4, 8, 8),), {}


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(**sizes, vocab_size=32, max_position_embeddings=16))
    return model, (torch.randint(0, 32, (2, 6)),), {}


def gpt2():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), (torch.randint(0, 32, (2, 6)),), {"use_cache": False}


class Attention(nn.Module):
    """What exporters take apart: attention, recurrence, 3-D products."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.up(x)
        return self.attention(y, y, y, need_weights=False)[0]


MODELS = {"cnn": cnn, "bert": bert, "gpt2": gpt2, "attention": lambda: (Attention(), (torch.randn(2, 5, 8),), {})}
MASKED = {"cnn": 5, "bert": 7, "gpt2": 4, "attention": 3}  # tensors


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """Name, the model after export, its inputs, what it gave before, and the file."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[request.param]()
    model.train()
    apply_nm_masks(model, TWO_FOUR)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = export_onnx(model, args, path, kwargs=kwargs, info={"recipe": "STEP"})
    assert model.training
    assert all(mask.enabled for mask in nm_masks(model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return request.param, model.eval(), args, kwargs, done


def edited(source, path, change):
    model = onnx.load(str(source))
    change(model)
    onnx.save(model, str(path))
    return path


def fill(initializer, at):
    """Ones where there were zeros."""
    array = numpy_helper.to_array(initializer).copy()
    array[at] = 1.0
    initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))


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


def test_the_runtime_gives_what_pytorch_gives(exported):
    _, model, args, kwargs, done = exported
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {entry.name: arg.numpy() for entry, arg in zip(session.get_inputs(), args, strict=True)})
    with torch.no_grad():
        wanted = model(*args, **kwargs)
    wanted = wanted[0] if not isinstance(wanted, torch.Tensor) else wanted
    assert torch.allclose(torch.from_numpy(outputs[0]), wanted, atol=1e-5)
    assert wanted.abs().max() > 0.01


def test_every_masked_tensor_is_found_and_holds_its_pattern(exported):
    name, model, _, _, done = exported
    found = {weight.node: weight for weight in check_onnx(done.path)}
    assert len({id(mask) for mask in nm_masks(model).values()}) == MASKED[name]
    required = [weight for weight in found.values() if weight.required]
    assert len(required) + len(done.elsewhere) == MASKED[name]
    assert all(weight.holds and weight.pattern == TWO_FOUR for weight in required)
    assert done.elsewhere == ()
    assert set(done.nodes.values()) == set(nm_masks(model))
    assert done.bytes == done.path.stat().st_size


def test_a_planted_violation_is_found_in_every_product(exported, tmp_path):
    _, _, _, _, done = exported
    for weight in check_onnx(done.path):
        if weight.required:
            at = [0] * len(weight.shape)
            at[weight.axis] = slice(0, 4)

            def plant(model, name=weight.initializer, at=tuple(at)):
                fill(next(each for each in model.graph.initializer if each.name == name), at)

            path = edited(done.path, tmp_path / "bad.onnx", plant)
            where = rf"weight '{weight.initializer}' .* of {weight.op} '{weight.node}' to hold 2:4 along axis {weight.axis}"
            with pytest.raises(ViolationError, match=rf"{where}, .* got 4 non-zero weights in group \(0, .*0\)"):
                check_onnx(path)
            assert [each.node for each in check_onnx(path, TWO_FOUR) if not each.holds] != []


def test_the_manifest_is_in_the_file(exported):
    _, _, _, _, done = exported
    model = onnx.load(str(done.path))
    manifest = json.loads({entry.key: entry.value for entry in model.metadata_props}["lightning_step"])
    assert (manifest["format"], manifest["info"], manifest["version"]) == ("onnx", {"recipe": "STEP"}, 1)
    assert {node: entry["tensor"] for node, entry in manifest["nodes"].items()} == done.nodes
    onnx.checker.check_model(model)


W = two_four(8, 8)  # (out, in)
SHAPES = {"gemm": (3, 8), "conv": (1, 8, 5, 5)}
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


def test_weights_in_an_external_file_are_read(exported, tmp_path):
    _, _, _, _, done = exported
    path = tmp_path / "model.onnx"
    settings = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(str(done.path)), str(path), **settings)
    assert path.stat().st_size < done.bytes
    assert check_onnx(path) == check_onnx(done.path)
    data = tmp_path / "weights.bin"
    data.write_bytes(b"\x3f" * data.stat().st_size)
    with pytest.raises(ViolationError):
        check_onnx(path)
    data.unlink()
    with pytest.raises(FileFormatError, match="which cannot be read"):
        check_onnx(path)


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


def linear(masked=True):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    if masked:
        apply_nm_masks(model, TWO_FOUR)
    return model


def test_recurrent_weights_are_found_though_their_gates_are_reordered(tmp_path):
    model = nn.LSTM(8, 4, batch_first=True)
    apply_nm_masks(model, TWO_FOUR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes")
        done = export_onnx(model, (torch.randn(2, 5, 8),), tmp_path / "model.onnx")
    assert sorted(done.nodes.values()) == ["weight_hh_l0", "weight_ih_l0"]
    assert [(w.op, w.axis, w.shape, w.holds) for w in check_onnx(done.path)] == [
        ("LSTM", 2, (1, 16, 8), True),
        ("LSTM", 2, (1, 16, 4), True),
    ]


def test_a_stripped_model_is_verified_not_pruned(tmp_path):
    model = linear()
    strip(model)
    targets = find_targets(model, TWO_FOUR)
    done = export_onnx(model, (torch.randn(2, 8),), tmp_path / "model.onnx", targets=targets)
    assert [weight.required for weight in check_onnx(done.path)] == [True]
    good = done.path.read_bytes()
    with torch.no_grad():
        model.weight.fill_(1.0)
    with pytest.raises(ViolationError, match=r"^Expected 'weight' to hold 2:4 along dim 1, but got 4 non-zero"):
        export_onnx(model, (torch.randn(2, 8),), done.path, targets=targets)
    assert done.path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [done.path]


def test_masks_that_are_off_are_refused_and_one_shot_prunes_a_copy(tmp_path):
    model = linear(masked=False)
    apply_nm_masks(model, TWO_FOUR, enabled=False)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="but got 1 masks of which none is on"):
        export_onnx(model, (torch.randn(2, 8),), tmp_path / "model.onnx")
    done = export_onnx(model, (torch.randn(2, 8),), tmp_path / "model.onnx", one_shot=True)
    assert check_onnx(done.path)[0].holds
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dynamo": False}, ConfigurationError, "but got 'dynamo'. Leave it out"),
        ({"info": {"where": object()}}, ArgumentTypeError, "Expected `info` to hold plain values"),
        ({"targets": (), "args": "x"}, ConfigurationError, "Expected a model that torch.onnx can export"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_writes_nothing(settings, error, message, tmp_path):
    settings = dict(settings)
    args = (settings.pop("args", torch.randn(2, 8)),)
    settings.pop("targets", None)
    with pytest.raises(error, match=message):
        export_onnx(linear(), args, tmp_path / "model.onnx", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_changed_since_is_told(exported, tmp_path):
    _, _, _, _, done = exported

    def rename(model):
        for node in model.graph.node:
            node.name = f"new_{node.name}"

    path = edited(done.path, tmp_path / "model.onnx", rename)
    with pytest.raises(FileFormatError, match="The file was changed since it was exported; check it with `pattern=`"):
        check_onnx(path)
    assert sum(weight.holds for weight in check_onnx(path, TWO_FOUR)) >= len(done.nodes)


def test_damaged_files_are_refused_or_read_but_never_another_error(tmp_path):
    done = export_onnx(linear(), (torch.randn(2, 8),), tmp_path / "model.onnx")
    whole, path = done.path.read_bytes(), tmp_path / "damaged"
    source, texts = np.random.default_rng(0), []
    for attempt in range(400):
        raw = bytearray(whole)
        if attempt % 4 == 0:
            del raw[int(source.integers(len(raw))) :]
        for _ in range(int(source.integers(1, 4))):
            if raw:
                raw[int(source.integers(len(raw)))] = int(source.integers(256))
        path.write_bytes(raw)
        try:
            check_onnx(path)
        except (FileFormatError, ViolationError) as error:
            texts.append(str(error))
    assert len(texts) > 200
    assert all(str(path) in text for text in texts)


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
