import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_step import NMPattern, find_targets
from lightning_step.errors import ArgumentTypeError, PatternError, TargetError

TWO_FOUR = NMPattern(2, 4)


class MyLinear(nn.Linear):
    pass


def found(model, **arguments):
    targets = find_targets(model, TWO_FOUR, **arguments)
    return {t.name: t.dim for t in targets.masked}, {entry.name: entry.reason for entry in targets.left_out}


def beside_a_linear(model):
    """So that something is left to mask."""
    return nn.ModuleDict({"x": model, "fc": nn.Linear(4, 4, bias=False)})


def tied():
    model = nn.ModuleDict({"emb": nn.Embedding(16, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["emb"].weight
    return model


PRODUCTS = [  # layer, an input, dim of the groups
    pytest.param(lambda: nn.Linear(8, 4), (3, 8), 1, id="Linear"),
    pytest.param(lambda: MyLinear(8, 4), (3, 8), 1, id="Linear subclass"),
    pytest.param(lambda: nn.Conv1d(8, 4, 3), (1, 8, 5), 1, id="Conv1d"),
    pytest.param(lambda: nn.Conv2d(8, 4, 3), (1, 8, 5, 5), 1, id="Conv2d"),
    pytest.param(lambda: nn.Conv3d(8, 4, 3), (1, 8, 5, 5, 5), 1, id="Conv3d"),
    pytest.param(lambda: nn.Conv2d(16, 8, 3, groups=4), (1, 16, 5, 5), 1, id="grouped Conv2d"),
    pytest.param(lambda: nn.ConvTranspose1d(8, 4, 3), (1, 8, 5), 0, id="ConvTranspose1d"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 4, 3), (1, 8, 5, 5), 0, id="ConvTranspose2d"),
    pytest.param(lambda: nn.ConvTranspose3d(8, 4, 3), (1, 8, 5, 5, 5), 0, id="ConvTranspose3d"),
    pytest.param(lambda: nn.ConvTranspose2d(16, 8, 3, groups=4), (1, 16, 5, 5), 0, id="grouped ConvTranspose2d"),
    pytest.param(lambda: Conv1D(4, 8), (3, 8), 0, id="HF Conv1D"),
]


@pytest.mark.parametrize(("make", "shape", "dim"), PRODUCTS)
def test_groups_lie_along_what_one_output_sums_over(make, shape, dim):
    layer = make()
    (target,) = find_targets(layer, TWO_FOUR).masked
    assert (target.name, target.dim, target.kind) == ("weight", dim, type(layer).__name__)
    assert (target.shape, target.owners) == (tuple(layer.weight.shape), (("", "weight"),))
    # The oracle: one output number reads all members of a group or none, whatever the type of the layer is called.
    output = layer(torch.rand(shape) + 1)
    output = output if output.dim() == 2 else output[(slice(None), slice(None), *[2] * (output.dim() - 2))]
    for channel in range(output.shape[1]):
        (grad,) = torch.autograd.grad(output[0, channel], layer.weight, retain_graph=True)
        groups = (grad != 0).movedim(target.dim, -1).reshape(-1, 4)
        assert groups.any()
        assert not groups.all()
        assert torch.equal(groups.any(1), groups.all(1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(3, 8, 3), "size 3 along dim 1 is not divisible by m=4"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), "size 1 along dim 1 is not divisible by m=4"),
        (lambda: nn.Linear(6, 8), "size 6 along dim 1 is not divisible by m=4"),
        (lambda: Conv1D(8, 6), "size 6 along dim 0 is not divisible by m=4"),
        (
            lambda: nn.ConvTranspose2d(16, 8, 3, groups=8),
            "size 2 along dim 0 within each of 8 groups is not divisible by m=4",
        ),
        (lambda: nn.Embedding(16, 8), "an embedding: a look-up, not a product"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear.weight is not a weight that N:M masks know"),
        (lambda: nn.ParameterDict({"weight": torch.ones(4, 4)}), "ParameterDict.weight is not a weight that N:M masks know"),
        (lambda: nn.LayerNorm(8), "1-D (a bias or a scale)"),
        (lambda: nn.Linear(8, 8).requires_grad_(False), "not trainable"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "not a real floating-point tensor (torch.complex64)"),
    ],
)
def test_left_out_with_the_reason(make, reason):
    masked, left_out = found(beside_a_linear(make()))
    assert masked == {"fc.weight": 1}
    assert left_out["x.weight"] == reason


def test_integer_weights_are_left_out():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    assert found(beside_a_linear(layer))[1]["x.weight"] == "not trainable"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_left_out_until_it_has_seen_a_batch():
    model = beside_a_linear(nn.LazyLinear(4))
    targets = find_targets(model, TWO_FOUR)
    assert {(entry.shape, entry.reason.partition(" (")[0]) for entry in targets.left_out} == {((), "not initialized yet")}
    model["x"](torch.ones(1, 8))
    assert found(model)[0] == {"x.weight": 1, "fc.weight": 1}


def test_min_weights_counts_weights_of_the_tensor_and_is_inclusive():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    assert found(model, min_weights=16)[0] == {"0.weight": 1, "1.weight": 1}
    assert found(model, min_weights=17)[1]["1.weight"] == "too small (16 weights < min_weights=17)"


@pytest.mark.parametrize(
    ("arguments", "projections"),
    [({}, ["in_proj_weight"]), ({"kdim": 4, "vdim": 12}, ["q_proj_weight", "k_proj_weight", "v_proj_weight"])],
)
def test_attention_projections(arguments, projections):
    masked, left_out = found(nn.MultiheadAttention(8, 2, add_bias_kv=True, **arguments))
    assert masked == dict.fromkeys([*projections, "out_proj.weight"], 1)
    assert left_out["bias_k"] == "MultiheadAttention.bias_k is not a weight that N:M masks know"


def test_a_head_tied_to_an_embedding_is_left_out_unless_named_exactly():
    for include in (None, ["*"], ["emb*", "fc"], ["head*", "fc"]):
        masked, left_out = found(tied(), include=include)
        assert masked == {"fc.weight": 1}
        assert left_out["emb.weight"] == "tied to an embedding (name 'head.weight' in `include` to mask both)"


@pytest.mark.parametrize("name", ["head", "head.weight", "emb", "emb.weight"])
def test_a_tied_head_named_exactly_is_masked_for_both(name):
    (target,) = find_targets(tied(), TWO_FOUR, include=[name]).masked
    assert target.owners == (("emb", "weight"), ("head", "weight"))
    assert found(tied(), include=[name, "fc"], exclude=["emb"])[1]["emb.weight"] == "excluded by 'emb'"
    assert (target.name, target.kind, target.dim) == ("emb.weight", "Linear", 1)


def test_two_layers_that_share_a_weight_are_one_target_with_two_owners():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    (target,) = find_targets(model, TWO_FOUR).masked
    assert (target.name, target.owners) == ("0.weight", (("0", "weight"), ("2", "weight")))


def test_a_weight_shared_across_dimensions_or_with_a_stranger_is_left_out():
    linear, hf = nn.Linear(8, 8, bias=False), Conv1D(8, 8)
    hf.weight = linear.weight
    reason = "shared by layers that group it along different dimensions [0, 1]"
    assert found(beside_a_linear(nn.Sequential(linear, hf)))[1]["x.0.weight"] == reason
    stranger = nn.ParameterDict({"scale": linear.weight})
    reason = "ParameterDict.scale is not a weight that N:M masks know"
    assert found(beside_a_linear(nn.Sequential(linear, stranger)))[1]["x.0.weight"] == reason


def test_include_and_exclude_choose_by_container_and_layer():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 4)})
    masked, left_out = found(model, include=["body", "head.*"], exclude=["body.1"])
    assert masked == {"body.0.weight": 1, "head.weight": 1}
    assert left_out["body.1.weight"] == "excluded by 'body.1'"
    assert found(model, exclude=["head.*"])[0] == {"body.0.weight": 1, "body.1.weight": 1}


@pytest.mark.parametrize("value", [NMPattern(1, 8), (1, 8), [1, 8]], ids=repr)
def test_overrides_take_a_pattern_or_two_integers_and_the_last_wins(value):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(12, 8))
    overrides = {"0": (4, 4), "*": value, "1": (2, 2)}
    targets = find_targets(model, TWO_FOUR, overrides=overrides)
    assert [(t.name, str(t.pattern)) for t in targets.masked] == [("0.weight", "1:8"), ("1.weight", "2:2")]
    assert found(model, overrides=overrides)[1]["2.weight"] == "size 12 along dim 1 is not divisible by m=8"


@pytest.mark.parametrize("value", ["2:4", "24", b"24", (2,), (1, 2, 4), 124, None], ids=repr)
def test_an_override_that_is_no_pattern_is_refused_by_its_glob(value):
    with pytest.raises(
        ArgumentTypeError, match=r"Expected `overrides\['weight'\]` to be an NMPattern or two integers \[n, m\]"
    ):
        find_targets(nn.Linear(8, 8), TWO_FOUR, overrides={"weight": value})


def test_an_override_that_cannot_hold_is_refused():
    with pytest.raises(PatternError, match="Expected 1 <= n <= m, but got n=5 and m=4"):
        find_targets(nn.Linear(8, 8), TWO_FOUR, overrides={"weight": (5, 4)})
    with pytest.raises(TargetError, match=r"glob of `overrides` to match a module or a tensor, but got 'encoder\.\*'"):
        find_targets(nn.Linear(8, 8), TWO_FOUR, overrides={"encoder.*": (1, 4)})


def test_nothing_eligible_lists_each_reason_once():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(6, 8), nn.LayerNorm(8))
    reasons = r"all 6 parameters are left out \(0\.weight: size 6 [^;]*; 0\.bias: 1-D [^;]*\)\. Widen `include`"
    with pytest.raises(TargetError, match=reasons):
        find_targets(model, TWO_FOUR)
    with pytest.raises(TargetError, match=r"all 0 parameters are left out \(the model has no parameters\)"):
        find_targets(nn.ReLU(), TWO_FOUR)


def test_every_parameter_is_in_exactly_one_list_in_the_models_order():
    parts = [make() for make, *_ in (p.values for p in PRODUCTS)]
    model = nn.Sequential(
        tied(), *parts, nn.MultiheadAttention(8, 2, kdim=4), nn.LSTM(8, 8), nn.LayerNorm(8), nn.Linear(5, 5)
    )
    targets = find_targets(model, TWO_FOUR, exclude=["4"])
    order = [name for name, _ in model.named_parameters()]
    masked, left_out = [t.name for t in targets.masked], [entry.name for entry in targets.left_out]
    assert Counter(masked + left_out) == Counter(order)
    assert (masked, left_out) == (sorted(masked, key=order.index), sorted(left_out, key=order.index))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {t.name: t.shape for t in (*targets.masked, *targets.left_out)} == shapes


SPY = """
import builtins
importers, real = set(), builtins.__import__
def spy(name, globals=None, *args, **kwargs):  # other packages may import transformers; what counts is whose line it is
    if name.partition(".")[0] == "transformers":
        importers.add((globals or {{}}).get("__name__", ""))
    return real(name, globals, *args, **kwargs)
builtins.__import__ = spy
{code}
print(sorted(name for name in importers if name.startswith("lightning_step")))
"""
USE = "import lightning_step as ls, torch; ls.find_targets(torch.nn.Linear(4, 4), ls.NMPattern(2, 4))"
AS_IF = "exec('import transformers', {'__name__': 'lightning_step.x'})"  # the spy would see it


@pytest.mark.parametrize(
    ("code", "importers"),
    [
        pytest.param(USE, "[]", id="ours does not import transformers"),
        pytest.param(
            "exec('import transformers', {'__name__': 'lightning_step.x'})",
            "['lightning_step.x']",
            id="the spy would see it",
        ),
    ],
)
def test_transformers_is_not_imported(code, importers):
    command = [sys.executable, "-W", "ignore", "-c", SPY.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == importers
