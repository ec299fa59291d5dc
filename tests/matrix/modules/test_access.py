"""What people do with ``layer.weight`` besides training it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_step import NMMask, NMPattern, apply_nm_masks, find_targets, latent_weights, nm_masks, strip
from lightning_step.errors import ConfigurationError

TWO_FOUR = NMPattern(2, 4)


@pytest.fixture
def layer():
    layer = nn.Linear(8, 4)
    apply_nm_masks(layer, TWO_FOUR)
    return layer


def test_a_masked_weight_says_all_that_a_weight_says(layer):
    latent = dict(layer.named_parameters())["weight"]
    for attribute in ("shape", "dtype", "device", "requires_grad", "ndim"):
        assert getattr(layer.weight, attribute) == getattr(latent, attribute)
    assert (layer.weight.size(0), layer.weight.numel(), layer.weight.stride()) == (4, 32, latent.stride())
    assert torch.equal(layer.weight.data, layer.weight.detach())
    assert not layer.weight.data.requires_grad
    assert latent.grad is None
    layer.weight.sum().backward()
    assert torch.equal(latent.grad, torch.ones(4, 8))
    assert repr(layer) == "MaskedLinear(in_features=8, out_features=4, bias=True)"


def test_the_model_moves_casts_and_freezes_like_a_plain_one(layer):
    plain = copy.deepcopy(layer)
    strip(plain)
    assert torch.equal(layer.to(torch.float64).weight, plain.double().weight)
    assert {p.dtype for p in layer.half().parameters()} == {torch.float16}
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert next(layer.to("meta").parameters()).is_meta
    assert layer.weight.is_meta
    assert layer.to_empty(device="cpu").weight.shape == (4, 8)


def test_what_is_written_in_place_while_masks_are_on_is_lost(layer):
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
        nn.init.ones_(layer.weight)
        layer.weight.data.copy_(torch.ones(4, 8))
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)
    with pytest.raises(AttributeError, match=r"`weight` is not an nn\.Parameter"):
        nn.Sequential(layer).get_parameter("0.weight")


def test_while_masks_are_off_layer_weight_is_the_parameter():
    layer = nn.Linear(8, 4)
    apply_nm_masks(layer, TWO_FOUR, enabled=False)
    assert layer.weight is layer.get_parameter("weight")
    nn.init.ones_(layer.weight)
    assert torch.equal(dict(layer.named_parameters())["weight"], torch.ones(4, 8))


def test_latent_weights_can_be_initialized_edited_and_got_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8))
    apply_nm_masks(model, TWO_FOUR)
    nm_masks(model)["1.weight"].enabled = False
    with latent_weights(model):
        assert model.get_parameter("0.weight") is model[0].weight
        nn.init.ones_(model[0].weight)
        model[1].reset_parameters()
        model[2].weight_hh_l0.data.fill_(1)
    assert torch.equal(model[0].weight, torch.tensor([1.0, 1, 0, 0] * 2).expand(8, 8))
    assert [mask.enabled for mask in nm_masks(model).values()] == [True, False, True, True]
    assert torch.equal(model[2].weight_hh_l0, torch.tensor([1.0, 1, 0, 0] * 2).expand(32, 8))


def test_latent_weights_puts_the_masks_back_on_after_an_error(layer):
    with pytest.raises(ZeroDivisionError), latent_weights(layer):
        _ = 1 / 0
    assert nm_masks(layer)["weight"].enabled


def test_apply_with_an_initializer_reaches_every_latent_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3))
    apply_nm_masks(model, TWO_FOUR)
    with latent_weights(model):
        model.apply(lambda m: nn.init.constant_(m.weight, 3.0) if hasattr(m, "weight") else None)
    assert all(bool((p == 3).all()) for name, p in model.named_parameters() if name.endswith("weight"))


REPARAMETRIZE = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
REASONS = {
    "weight_norm": {"parametrized: _WeightNorm computes the weight from it"},
    "spectral_norm": {"parametrized: _SpectralNorm computes the weight from it"},
    "orthogonal": {"parametrized: _Orthogonal computes the weight from it"},
    "parametrize": {"parametrized: Tanh computes the weight from it"},
    "old weight_norm": {f"Linear.weight_{part} is not a weight that N:M masks know" for part in "gv"},
    "old spectral_norm": {"Linear.weight_orig is not a weight that N:M masks know"},
    "prune": {"Linear.weight_orig is not a weight that N:M masks know"},
}
OLD = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@OLD
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("how", REPARAMETRIZE)
def test_a_parametrization_of_a_masked_weight_is_refused_by_name(how, enabled):
    layer = nn.Linear(8, 4)
    apply_nm_masks(layer, TWO_FOUR, enabled=enabled)
    ours = (ConfigurationError, r"masked 'weight' of a Linear to stay its parameter.*Call `strip\(model\)`")
    torchs = (TypeError, "cannot assign .* to parameter 'weight_orig'")  # what is pruned there is no Parameter any more
    error, match = torchs if enabled and how == "prune" else ours
    with pytest.raises(error, match=match):
        REPARAMETRIZE[how](layer)
    if not how.startswith(("old", "prune")):  # those take the weight away before they ask
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert type(layer).__name__ == "MaskedLinear"


@OLD
@pytest.mark.parametrize("how", REPARAMETRIZE)
def test_a_weight_that_is_parametrized_already_stays_dense_with_the_reason(how):
    model = nn.Sequential(REPARAMETRIZE[how](nn.Linear(8, 4)), nn.Linear(4, 4))
    targets = find_targets(model, TWO_FOUR)
    assert [t.name for t in targets.masked] == ["1.weight"]
    assert {entry.reason for entry in targets.left_out if len(entry.shape) > 1} == REASONS[how]
    x = torch.randn(3, 8)
    expected = model.eval()(x)
    apply_nm_masks(model, TWO_FOUR, enabled=False)
    assert torch.equal(model(x), expected)
    strip(model)
    assert torch.equal(model(x), expected)


def test_data_parallel_is_refused_by_name(layer):
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(ConfigurationError, match=r"masked 'weight' of a Linear .* nn\.DataParallel"):
        replica.weight = torch.ones(4, 8)  # its replicas hold tensors, not parameters


def test_masks_go_beside_a_parametrization_of_another_tensor():
    layer = parametrize.register_parametrization(nn.Linear(8, 4), "bias", nn.Tanh())
    plain, kind = copy.deepcopy(layer), type(layer)
    apply_nm_masks(layer, TWO_FOUR)
    twin, x = copy.deepcopy(layer), torch.randn(3, 8)
    expected = nn.functional.linear(x, layer.weight, plain.bias)
    assert int(layer.weight.count_nonzero()) == 16
    assert torch.equal(layer(x), expected)
    assert torch.equal(twin(x), expected)
    strip(layer)
    assert type(layer) is kind
    assert torch.equal(layer(x), expected)


def test_our_mask_composes_with_weight_norm_as_a_parametrization():
    layer = parametrizations.weight_norm(nn.Linear(8, 4))
    parametrize.register_parametrization(layer, "weight", NMMask(TWO_FOUR, 1))
    assert (layer.weight.reshape(-1, 4) != 0).sum(1).tolist() == [2] * 8
    layer.weight.sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.dim() > 1)
