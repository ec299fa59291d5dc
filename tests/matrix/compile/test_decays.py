"""Patterns and factors that change while a compiled model trains: how many graphs that takes, and the same weights."""

import pytest
import torch
from torch import nn

from lightning_step import STE, STEP, AtStep, DenseTail, Layerwise, MaskDecay, Sparsifier, StructureDecay, nm_masks

STEPS = 12
GRAPHS = {  # recipe and graphs: one for each pattern or phase; a factor that moves every step takes one for all of its steps
    "StructureDecay": (StructureDecay(STEP(AtStep(2)), end=8), 4),  # dense, 3:4, 2:4, 1:4
    "MaskDecay": (MaskDecay(STEP(AtStep(2)), end=11), 4),  # dense, at 1, below 1, at 0
    "Layerwise": (Layerwise(STEP(AtStep(2)), by="erk", budget=0.25), 2),
    "DenseTail": (DenseTail(STE(), start=8), 3),  # 1:4, 4:4, and 1:4 again after the last step
}


def train(recipe, compiled):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    Sparsifier(model, optimizer, 1, 4, recipe=recipe, total_steps=STEPS)
    net = compiled(model)
    for t in range(STEPS):
        torch.manual_seed(t)
        x = torch.randn(3, 8)
        (net(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, net(x).detach()


@pytest.mark.parametrize(("recipe", "graphs"), GRAPHS.values(), ids=GRAPHS)
def test_a_decay_compiles_once_a_frame_and_not_at_every_step(counter, recipe, graphs):
    torch._dynamo.reset()
    ours = counter("eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model, output = train(recipe, lambda model: torch.compile(model, backend=ours))
    plain, expected = train(recipe, lambda model: model)
    assert (ours.breaks, ours.skipped) == ({}, 0)
    assert ours.graphs <= graphs
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert repr(nm_masks(model)) == repr(nm_masks(plain))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
