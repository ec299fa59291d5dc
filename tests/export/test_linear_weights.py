"""Which layers multiply as a Linear layer does, and that a turned weight computes the same."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_step import NMPattern, apply_nm_masks, strip
from lightning_step.export import to_semi_structured
from lightning_step.export.linear_weights import linear_weights, shared_with, use_packed


class Gpt(nn.Module):
    """Two layers of GPT-2's kind that share one weight, and one that multiplies in a way of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.own = Conv1D(32, 64), Conv1D(32, 64), OwnConv1D(64, 64)
        apply_nm_masks(self, NMPattern(2, 4))
        strip(self)
        self.two.weight = self.one.weight
        nn.init.normal_(self.one.bias)


class OwnConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_conv1d_computes_the_same_with_its_weight_turned():
    model, x = Gpt(), torch.randn(2, 3, 64)
    expected = model.one(x), model.two(x)
    found = linear_weights(model)
    assert [(each.name, each.transposed) for each in found] == [("one.weight", True), ("two.weight", True)]
    assert shared_with(model, found) == {}
    turned = nn.Parameter(found[0].rows.contiguous())
    for each in found:
        use_packed(each, turned)
    assert model.one.weight.shape == (32, 64)
    for layer, before in zip((model.one, model.two), expected, strict=True):
        torch.testing.assert_close(layer(x), before)
        torch.testing.assert_close(copy.deepcopy(layer)(x), before)
    assert type(model.one) is type(model.two), "one class for all, so that compiled graphs are shared"
    assert linear_weights(model) == [], "it is not turned twice"


def test_a_whole_gpt2_computes_the_same_with_every_weight_turned():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    apply_nm_masks(model, NMPattern(2, 4))
    strip(model)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens).logits
        found = [each for each in linear_weights(model) if each.transposed]
        assert len(found) == 8
        for each in found:
            use_packed(each, nn.Parameter(each.rows.contiguous(), requires_grad=False))
        torch.testing.assert_close(model(tokens).logits, before)


@pytest.mark.filterwarnings("ignore:Expected to accelerate")
def test_the_head_of_gpt2_is_tied_and_told():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    assert list(shared_with(model, linear_weights(model)).values()) == ["transformer.wte.weight"]
    assert [layer.name for layer in to_semi_structured(model).layers][-1] == "lm_head.weight"
