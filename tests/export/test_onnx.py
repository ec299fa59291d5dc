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
from onnx import numpy_helper  # noqa: E402

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
