import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lightning_step import NMMask, NMPattern, apply_nm_masks, find_targets, strip
from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.parametrization import install_masks, nm_masks

TWO_FOUR = NMPattern(2, 4)


def by_hand(weight, pattern, dim):
    """The mask of a weight, group by group: an oracle that shares no code with the package."""
    moved = weight.detach().movedim(dim, -1)
    mask = torch.zeros(moved.numel() // pattern.m, pattern.m)
    for row, group in zip(mask, moved.reshape(mask.shape).tolist(), strict=True):
        row[sorted(range(pattern.m), key=[-abs(w) for w in group].__getitem__)[: pattern.n]] = 1
    return mask.reshape(moved.shape).movedim(-1, dim)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Attention(nn.MultiheadAttention):
    """From one input to one output, like the other models here: all that attention can return."""

    def forward(self, x):
        other = x if self._qkv_same_embed_dim else x[..., : self.kdim]
        bare, _ = super().forward(x, other, other, need_weights=False)
        return torch.cat([*super().forward(x, other, other, need_weights=True), bare], -1)


class Block(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def tied(first, second):
    second.weight = first.weight
    return nn.Sequential(first, second)


MODELS = {  # a model and an input
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3)), torch.randn(2, 4, 6)),
    "conv2d": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)), torch.randn(2, 3, 6, 6)),
    "hf": lambda: (nn.Sequential(Conv1D(8, 4), Conv1D(4, 8)), torch.randn(3, 4)),
    "attention": lambda: (Attention(8, 2, batch_first=True), torch.randn(2, 5, 8)),
    "cross": lambda: (Attention(8, 2, kdim=4, vdim=4, batch_first=True), torch.randn(2, 5, 8)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 5, 8)),
    "shared": lambda: (tied(nn.Linear(8, 8), nn.Linear(8, 8, bias=False)), torch.randn(3, 8)),
    "tied": lambda: (tied(nn.Embedding(12, 8), nn.Linear(8, 12)), torch.randint(12, (3, 5))),
}


@pytest.fixture(params=MODELS)
def zoo(request):
    """A plain model, an equal masked one, its targets, and an input."""
    torch.manual_seed(1)
    plain, x = MODELS[request.param]()
    masked = copy.deepcopy(plain)
    include = ["0"] if request.param == "tied" else None  # a tied embedding is masked only where it is named
    return plain, masked, apply_nm_masks(masked, TWO_FOUR, include=include).masked, x


@torch.no_grad()
def prune_by_hand(model, targets):
    for target in targets:
        parameter = model.get_parameter(target.name)
        parameter.mul_(by_hand(parameter, target.pattern, target.dim))
    return model


def names(model):
    parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    return parameters, list(model.state_dict()), [name for name, _ in model.named_modules()], [*dict(model.named_buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "masked"])
def test_forward_and_backward_equal_a_plain_model_pruned_by_hand(zoo, gradient, training):
    plain, masked, targets, x = zoo
    latent = copy.deepcopy(plain)
    for mask in nm_masks(masked).values():
        mask.gradient = gradient
    for model in (prune_by_hand(plain, targets), masked):
        output = model.train(training)(x)
        output.square().sum().backward()
    assert_same(output, plain(x))
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for t in targets if gradient == "masked" else ():
        expected[t.name] = expected[t.name] * by_hand(latent.get_parameter(t.name), t.pattern, t.dim)
    torch.testing.assert_close({name: p.grad for name, p in masked.named_parameters()}, expected)
    assert_same(dict(masked.named_parameters()), dict(latent.named_parameters()))


def test_names_and_parameter_objects_are_those_of_the_plain_module(zoo):
    plain, _, targets, _ = zoo
    before = names(plain)
    assert list(install_masks(plain, targets, enabled=True)) == [target.name for target in targets]
    assert names(plain) == before


def test_strict_load_works_in_both_directions(zoo):
    plain, masked, _, _ = zoo
    state = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    masked.load_state_dict(state, strict=True)
    plain.load_state_dict(masked.state_dict(), strict=True)
    assert_same(dict(plain.state_dict()), state)


def test_strip_gives_back_types_keys_and_parameters_with_exact_zeros(zoo):
    plain, masked, targets, x = zoo
    before, output = names(masked), masked.eval()(x)
    assert strip(masked) == [target.name for target in targets]
    assert names(masked) == before
    for ours, theirs in zip(masked.modules(), plain.modules(), strict=True):
        assert (type(ours), vars(ours).keys()) == (type(theirs), vars(theirs).keys())
    assert_same(dict(masked.named_parameters()), dict(prune_by_hand(plain, targets).named_parameters()))
    assert_same(masked(x), output)
    assert strip(masked) == []


def test_strip_prunes_nothing_whose_mask_is_off():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_nm_masks(model, TWO_FOUR, enabled=False)
    nm_masks(model)["1.weight"].enabled = True
    assert strip(model) == ["1.weight"]
    assert [(type(layer), int(layer.weight.count_nonzero())) for layer in model] == [(nn.Linear, 64), (nn.Linear, 32)]


def by_torch_save(model):
    torch.save(model, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("fresh_process", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save])
def test_copies_have_masks_of_their_own(zoo, copied, fresh_process, monkeypatch):
    _, model, targets, x = zoo
    if fresh_process:  # as far as our classes go: none is made yet
        monkeypatch.setattr("lightning_step.masked_classes._masked_classes", {})
    twin = copied(model.eval())
    output = model(x)
    assert_same(twin(x), output)
    for mask in nm_masks(twin).values():
        mask.enabled = False
    assert not torch.equal(twin(x), output)
    assert_same(model(x), output)
    assert len({id(mask) for mask in nm_masks(twin).values()}) == len(targets)  # shared weights share a mask, as before
    strip(model)
    assert list(nm_masks(twin)) == [f"{name}.{attribute}".strip(".") for t in targets for name, attribute in t.owners]


def test_all_modules_of_a_type_share_one_class():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)), Conv1D(8, 8))
    apply_nm_masks(model, TWO_FOUR)
    assert len({type(module) for module in model}) == 2
    assert [cls.__name__ for cls in type(model[0]).__mro__[:2]] == ["MaskedLinear", "Linear"]
    assert [t.kind for t in find_targets(model, TWO_FOUR).masked] == ["Linear"] * 12 + ["Conv1D"]


def test_a_weight_can_be_assigned_and_cast():
    layer = nn.Linear(8, 8, bias=False)
    apply_nm_masks(layer, TWO_FOUR)
    layer.weight = nn.Parameter(torch.arange(1, 65.0).reshape(8, 8))
    assert_same(layer.double().weight, torch.arange(1, 65).reshape(8, 8) * torch.tensor([0, 0, 1, 1] * 2).double())
    assert [(name, int(p.count_nonzero())) for name, p in layer.named_parameters()] == [("weight", 64)]


def test_functional_call_masks_the_weights_it_is_given(zoo):
    plain, masked, targets, x = zoo
    given = {name: (p.detach() * -2).roll(1, -1).requires_grad_() for name, p in plain.named_parameters()}
    plain.load_state_dict(given, strict=False)
    assert_same(torch.func.functional_call(masked, given, (x,)), prune_by_hand(plain, targets)(x))


def test_mask_works_with_torchs_own_parametrization():
    layer = nn.Linear(8, 4)
    expected = layer.weight.detach() * by_hand(layer.weight, NMPattern(1, 4), 1)
    parametrize.register_parametrization(layer, "weight", NMMask(NMPattern(1, 4), 1))
    assert torch.equal(layer.weight, expected)
    layer.weight = torch.ones(4, 8)
    assert torch.equal(layer.parametrizations.weight.original, torch.ones(4, 8))
    with pytest.raises(ArgumentTypeError, match=r"Expected `pattern` to be an NMPattern, but got \(2, 4\)"):
        NMMask((2, 4))


def test_installing_again_keeps_mask_and_state_but_another_pattern_is_an_error():
    model = tied(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_nm_masks(model, TWO_FOUR, enabled=False)
    before = nm_masks(model), [type(module) for module in model]
    apply_nm_masks(model, TWO_FOUR, enabled=True)
    assert (nm_masks(model), [type(module) for module in model]) == before
    assert not any(mask.enabled for mask in nm_masks(model).values())
    with pytest.raises(ConfigurationError, match=r"'0\.weight' .* 1:4 along dim 1, but got 2:4 along dim 1 .* `strip"):
        apply_nm_masks(model, NMPattern(1, 4))


def test_masks_can_be_added_to_a_module_one_by_one():
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    apply_nm_masks(model, TWO_FOUR, include=["q_proj_weight"])
    apply_nm_masks(model, NMPattern(1, 4), include=["v_proj_weight"])
    assert list(nm_masks(model)) == ["q_proj_weight", "v_proj_weight"]
    assert [int(getattr(model, f"{name}_proj_weight").count_nonzero()) for name in "qkv"] == [32, 32, 8]


FAST = {"attention": ("aten::_native_multi_head_attention", 2), "encoder": ("aten::_transformer_encoder_layer_fwd", 1)}


@pytest.mark.parametrize(("zoo", "path"), FAST.items(), indirect=["zoo"])
def test_the_fast_path_of_evaluation_sees_masked_weights(zoo, path):
    plain, masked, targets, x = zoo
    with torch.inference_mode(), torch.autograd.profiler.profile() as profile:
        output = masked.eval()(x)
    assert path in [(event.key, event.count) for event in profile.key_averages()]
    assert_same(output, torch.inference_mode()(prune_by_hand(plain, targets).eval())(x))


def compiled(blocks, x, masks=()):
    """How many graphs there are after each of four runs with masks off, on, off and on; and the four outputs."""
    torch._dynamo.reset()
    counter, graphs, outputs = CompileCounter(), [], []
    for block in blocks:
        block.compile(backend=counter)
    for enabled in (False, True, False, True):
        for mask in masks:
            mask.enabled = enabled
        outputs.append(blocks(x))
        graphs.append(counter.frame_count)
    return graphs, outputs


def test_compiled_blocks_share_graphs_and_recompile_once_at_the_switch():
    blocks = nn.Sequential(*(Block(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(12)))
    masked, pruned, x = copy.deepcopy(blocks), copy.deepcopy(blocks), torch.randn(3, 8, requires_grad=True)
    prune_by_hand(pruned, apply_nm_masks(masked, TWO_FOUR).masked)
    graphs, outputs = compiled(masked, x, nm_masks(masked).values())
    torch.testing.assert_close(outputs, [blocks(x), pruned(x)] * 2)
    assert (compiled(blocks, x)[0], graphs) == ([1, 1, 1, 1], [1, 2, 2, 2])
