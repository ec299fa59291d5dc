"""Recurrent layers under cuDNN, which wants all weights in one chunk of memory."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, nm_masks, strip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = {
    "LSTM": lambda: nn.LSTM(64, 64, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(64, 64, proj_size=32),
    "GRU": lambda: nn.GRU(64, 64, bias=False),
    "RNN": lambda: nn.RNN(64, 64),
}


@pytest.mark.parametrize("include", [None, ["weight_hh_l0"]])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_masked_layer_computes_what_the_stripped_one_does(make, include) -> None:
    masked = make().cuda()
    apply_nm_masks(masked, NMPattern(2, 4), include=include)
    stripped, x = copy.deepcopy(masked), torch.randn(7, 5, 64, device="cuda")
    strip(stripped)
    stripped.flatten_parameters()
    before = [(name, p.data_ptr()) for name, p in masked.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # cuDNN's own, about weights that are not in one chunk
        outputs = [layer(x)[0] for layer in (masked, stripped)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(masked.parameters(), stripped.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert [(name, p.data_ptr()) for name, p in masked.named_parameters()] == before


def test_no_memory_stays_behind_a_forward_pass() -> None:
    layer = nn.LSTM(256, 256).cuda()
    apply_nm_masks(layer, NMPattern(2, 4))
    x = torch.randn(3, 2, 256, device="cuda")
    with torch.no_grad():
        layer(x)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            layer(x)
        assert torch.cuda.memory_allocated() == before
    assert all(mask.enabled for mask in nm_masks(layer).values())
