"""What is kept between two reads of a weight is what computing it anew would give."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    MaskDecay,
    NMPattern,
    Sparsifier,
    apply_nm_masks,
    kept_weights,
    nm_masks,
)
from tests.writes import WRITES, anew, assert_fresh, count_masks, in_inference_mode, in_place, latent, read, trained

RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(3)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(3), lam=1e-2),
    "MaskDecay": MaskDecay(SRSTE(lam=1e-2), end=6),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture
def computed(monkeypatch):
    return count_masks(monkeypatch)


@pytest.mark.parametrize("batches", [1, 3])
@every_recipe
def test_every_mask_is_computed_once_in_a_step(recipe, batches, computed):
    model, optimizer, sparsifier = trained(recipe)
    for t in range(6):
        begins = sparsifier.phase == 1
        computed.clear()
        for _ in range(batches):
            model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        began = begins and sparsifier.phase == 2 and isinstance(recipe, ASP)  # it prunes, once
        assert sorted(computed) == ([] if begins and not began else [(4, 16), (16, 8)]), t


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@every_recipe
def test_training_is_the_same_bit_for_bit(recipe, arguments, batches):
    ends = []
    for keep in (True, False):
        model, optimizer, sparsifier = trained(recipe, **arguments)
        sparsifier.measure_every = 2
        sparsifier.masks.keep(keep)
        torch.manual_seed(1)
        for _ in range(8):
            for _ in range(batches):
                model(torch.randn(5, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()(torch.randn(5, 8))
            model.train()
        ends.append([*model.state_dict().values(), torch.tensor(sparsifier.gauges().get("flip_rate", 0.0))])
    assert all(map(torch.equal, *ends))


def test_a_shared_layer_is_masked_once(computed):
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(8, 8))
    model[3].weight = layer.weight
    Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=STE(), total_steps=9)
    model(torch.ones(1, 8)).sum().backward()
    assert computed == [(8, 8)]
    assert_fresh(nn.Sequential(layer))


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_after_a_write_the_mask_is_fresh(write):
    model, _, _ = trained()
    before = read(model)
    write(model)
    assert_fresh(model)
    assert not torch.equal(read(model)["0.weight"], before["0.weight"].to(latent(model).dtype))


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_a_write_that_nobody_sees_leaves_the_mask_until_the_next_step_and_never_the_values(write):
    model, optimizer, _ = trained()
    model(torch.ones(1, 8)).sum().backward()
    mask = read(model)["0.weight"] != 0
    new = torch.randn(16, 8)
    latent(model).data.copy_(new) if write == "data" else latent(model).detach().numpy().__setitem__(slice(None), new)
    assert torch.equal(read(model)["0.weight"], torch.where(mask, new, 0.0))  # documented: values live, mask of before
    assert not torch.equal(read(model)["0.weight"], anew(model)["0.weight"])
    model.eval()
    assert_fresh(model)
    model.train()
    assert_fresh(model)
    latent(model).data.copy_(torch.randn(16, 8))
    optimizer.step()
    assert_fresh(model)


def test_a_mask_that_somebody_writes_into_is_not_used_again():
    model, _, _ = trained()
    nm_masks(model)["0.weight"].kept_mask(latent(model)).logical_not_()
    assert_fresh(model)
    model.eval()
    with torch.no_grad(), kept_weights(model):
        model[0].weight.zero_()
        assert_fresh(model)


def test_kept_masks_end_with_the_driver_and_with_the_step():
    model, optimizer, sparsifier = trained()

    def holds():
        return [mask.kept._mask is not None for mask in nm_masks(model).values()]

    model(torch.ones(1, 8)).sum().backward()
    assert holds() == [True, True]
    optimizer.step()
    assert holds() == [False, False]
    model(torch.ones(1, 8))
    assert holds() == [True, True]
    model.eval()(torch.ones(1, 8))
    assert holds() == [False, False]
    model.train()(torch.ones(1, 8))
    sparsifier.detach()
    assert holds() == [False, False]
    model(torch.ones(1, 8))
    assert holds() == [False, False]


def test_without_a_driver_every_read_computes(computed):
    layer = nn.Linear(8, 8)
    apply_nm_masks(layer, NMPattern(2, 4))
    for _ in range(3):
        layer(torch.ones(1, 8))
    assert len(computed) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_states_carry_nothing(copied):
    model, _, sparsifier = trained()
    size = len(pickle.dumps(model))
    before = len(pickle.dumps(sparsifier.state_dict()))
    model(torch.ones(1, 8))
    with torch.no_grad(), kept_weights(model):
        model.eval()(torch.ones(1, 8))
        model.train()(torch.ones(1, 8))
        assert len(pickle.dumps(model)) == size
        twin = copied(model)
        assert len(pickle.dumps(sparsifier.state_dict())) == before
    for mask in nm_masks(twin).values():
        assert (mask.kept._mask, mask.kept._weight, mask.kept.trains, mask.kept.windows) == (None, None, False, 0)
    with torch.no_grad():
        latent(twin).data.copy_(torch.randn(16, 8))
    assert_fresh(twin)


class Special(nn.Parameter):
    """Any subclass may count versions in its own way."""


STRANGE = {
    "inference": lambda: torch.inference_mode()(lambda: nn.Parameter(torch.randn(4, 8), requires_grad=False))(),
    "subclass": lambda: Special(torch.randn(4, 8)),
    "meta": lambda: nn.Parameter(torch.empty(4, 8, device="meta")),
    "no parameter": lambda: torch.randn(4, 8),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_what_counts_no_versions_is_never_kept(make, computed):
    layer = nn.Linear(8, 4, bias=False)
    apply_nm_masks(layer, NMPattern(2, 4))
    (mask,) = nm_masks(layer).values()
    mask.kept.train(True)
    weight = make()
    with kept_weights(layer), torch.no_grad():
        for training in (True, True, False, False):
            mask.shown(weight, training)
    assert len(computed) == 4


def test_graphs_and_transforms_compute_their_own(computed):
    layer = nn.Linear(8, 4, bias=False)
    Sparsifier(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe=STE(), total_steps=9)
    parameters, x = dict(layer.named_parameters()), torch.ones(1, 8)
    layer(x)
    with FlopCounterMode(display=False):
        layer(x)
    torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)
    torch.func.functional_call(layer, {"weight": parameters["weight"].detach() * 2}, (x,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.ones(1, 8))
    assert len(computed) == 5
    assert_fresh(nn.Sequential(layer))


def copied_in(model):
    with torch.no_grad():
        latent(model).copy_(torch.randn(16, 8).round())


DEEDS = {
    "step": lambda model, optimizer: optimizer.step(),
    "fused step": lambda model, optimizer: torch.optim.SGD(model.parameters(), lr=0.3, fused=True).step(),
    "backward": lambda model, optimizer: model(torch.randn(4, 8)).square().sum().backward(),
    "copy": lambda model, optimizer: copied_in(model),
    "in place": lambda model, optimizer: in_place(model),
    "in inference mode": lambda model, optimizer: in_inference_mode(model),
    "set": lambda model, optimizer: setattr(latent(model), "data", torch.randn(16, 8)),
    "load": lambda model, optimizer: model.load_state_dict({k: torch.randn_like(p) for k, p in model.state_dict().items()}),
    "pattern": lambda model, optimizer: setattr(nm_masks(model)["0.weight"], "pattern", NMPattern(1, 4)),
    "leak": lambda model, optimizer: setattr(nm_masks(model)["0.weight"], "leak", 0.25),
    "eval": lambda model, optimizer: model.eval(),
    "train": lambda model, optimizer: model.train(),
    "off": lambda model, optimizer: setattr(nm_masks(model)["0.weight"], "enabled", False),
    "on": lambda model, optimizer: setattr(nm_masks(model)["0.weight"], "enabled", True),
    "write into what was read": lambda model, optimizer: model[0].weight.detach().add_(1) if masked(model) else None,
}


def masked(model):
    return nm_masks(model)["0.weight"].enabled


@given(st.lists(st.sampled_from(sorted(DEEDS)), max_size=12), st.booleans(), st.sampled_from([True, False, None]))
@settings(max_examples=60, deadline=None)
def test_whatever_is_done_in_between_reads_are_fresh(deeds, windowed, grad):
    torch.manual_seed(0)
    model, optimizer, _ = trained()
    with kept_weights(model if windowed else nn.Identity()):
        for deed in deeds:
            DEEDS[deed](model, optimizer)
            with torch.inference_mode() if grad is None else torch.set_grad_enabled(grad):
                assert_fresh(model)
                assert_fresh(model)
