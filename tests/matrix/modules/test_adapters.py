"""Low-rank adapters: on top of masked layers, and masks on top of a model that has adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    NMPattern,
    Sparsifier,
    apply_nm_masks,
    export_model,
    find_targets,
    load_sparse,
    nm_masks,
    strip,
)
from lightning_step.errors import TargetError

TWO_FOUR = NMPattern(2, 4)
STEPS = 6
RECIPES = [Dense(), ASP(AtStep(3)), STE(), SRSTE(lam=1e-2), STEP(AtStep(3), lam=1e-2)]


class LoRALinear(nn.Module):
    """The usual hand-written wrapper."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.ones(rank, base.in_features))
        self.up = nn.Parameter(torch.ones(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.fc(x).tanh())


def by_hand(model):
    model.fc, model.out = LoRALinear(model.fc), LoRALinear(model.out)
    return model


def by_peft(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["fc", "out"]))


def wrapped(wrap, model):
    """With adapters that do something, the same ones every time."""
    model = wrap(model)
    torch.manual_seed(2)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.3)
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer):
    for t in range(STEPS):
        torch.manual_seed(t)
        x = torch.randn(6, 8)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def nonzeros(weight):
    return set((weight.reshape(-1, 4) != 0).sum(1).tolist())


@pytest.mark.parametrize("wrap", [by_hand, by_peft])
def test_adapters_on_masked_layers_train_on_the_masked_base(wrap):
    torch.manual_seed(1)
    model = Net()
    plain = copy.deepcopy(model)
    apply_nm_masks(model, TWO_FOUR)
    masked = wrapped(wrap, model)
    apply_nm_masks(plain, TWO_FOUR)
    strip(plain)
    hard, before = wrapped(wrap, plain), copy.deepcopy(masked)
    for net in (masked, hard):
        train(net, torch.optim.AdamW(trainable(net), lr=0.05))
    x = torch.randn(5, 8)
    torch.testing.assert_close(masked(x), hard(x))
    assert not torch.allclose(masked(x), before(x))
    assert len(nm_masks(masked)) == 2
    for ours, theirs in zip(masked.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs) != ours.requires_grad
    assert len(strip(masked)) == 2
    torch.testing.assert_close(masked(x), hard(x))


def test_adapters_are_merged_into_a_stripped_base():
    model = Net()
    apply_nm_masks(model, TWO_FOUR)
    masked, x = wrapped(by_peft, model), torch.randn(5, 8)
    expected = masked(x)
    strip(masked)
    merged = masked.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert type(merged.fc) is nn.Linear
    assert max(nonzeros(merged.fc.weight)) == 4  # a low-rank update is dense, and so is what it is added to


def test_what_is_merged_while_masks_are_on_is_lost():
    """PEFT writes into ``layer.weight``, a temporary while the masks are on: strip first."""
    model = Net()
    apply_nm_masks(model, TWO_FOUR)
    base, x = copy.deepcopy(model), torch.randn(5, 8)
    torch.testing.assert_close(wrapped(by_peft, model).merge_and_unload()(x), base(x))


def test_masks_on_a_model_with_adapters_are_masks_on_what_is_trained():
    model = wrapped(by_peft, Net())
    targets = find_targets(model, TWO_FOUR)
    assert {t.name.partition("model.model.")[2] for t in targets.masked} == {
        f"{layer}.lora_{part}.default.weight" for layer in ("fc", "out") for part in "AB"
    }
    reasons = {entry.name: entry.reason for entry in targets.left_out}
    assert reasons["base_model.model.fc.base_layer.weight"] == "not trainable"
    with pytest.raises(TargetError, match=r"base_layer\.weight: not trainable.*excluded by '\*lora_\*'"):
        find_targets(model, TWO_FOUR, exclude=["*lora_*"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_masks_on_a_trainable_base_under_adapters(recipe, tmp_path):
    torch.manual_seed(1)
    model = wrapped(by_peft, Net()).requires_grad_(True)
    keys, adapter_keys = list(model.state_dict()), list(get_peft_model_state_dict(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, recipe=recipe, total_steps=STEPS, exclude=["*lora_*"])
    train(model, optimizer)
    bases = [f"base_model.model.{layer}.base_layer.weight" for layer in ("fc", "out")]
    assert [t.name for t in sparsifier.targets.masked] == bases
    assert (list(model.state_dict()), list(get_peft_model_state_dict(model))) == (keys, adapter_keys)
    x = torch.randn(5, 8)
    expected = model(x)
    on = not isinstance(recipe, Dense)
    if on:
        path = export_model(model, tmp_path / "model.safetensors").path
        torch.testing.assert_close(load_sparse(path, by_peft(Net()))(x), expected)
    assert strip(model) == bases * on
    torch.testing.assert_close(model(x), expected)
    assert [nonzeros(dict(model.named_parameters())[name]) for name in bases] == [{2} if on else {4}] * 2
