"""torch.export of a model with masks on: the masked weights are computed in the graph, keys are plain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_step import NMPattern, apply_nm_masks, strip

LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (3, 8)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)), (2, 4, 6, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_an_exported_program_computes_with_the_masks_of_its_weights(layer: str) -> None:
    make, shape = LAYERS[layer]
    model, x = make().eval(), torch.randn(shape)
    names = [name for name, _ in model.named_parameters()]
    apply_nm_masks(model, NMPattern(2, 4))
    program = torch.export.export(model, (x,))
    assert [name for name, _ in program.named_parameters()] == names
    exported = program.module()
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), exported.parameters(), strict=True):
            other.copy_(parameter.copy_(torch.randn_like(parameter)))  # other weights, other masks
    torch.testing.assert_close(exported(x), model(x))
    strip(model)
    torch.testing.assert_close(exported(x), model(x))
