"""Masks on a CUDA device: every way to compute them, and what is kept of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import SRSTE, NMPattern, Sparsifier, kept_weights, nm_masks
from lightning_step.functional import kernels, magnitude_mask, nm_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def with_specials(dtype: torch.dtype, rows: int = 1024) -> torch.Tensor:
    weight = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = weight.view(-1)
    flat[::7] = flat[1]
    flat[3::11], flat[4::13], flat[5::17], flat[6::19] = torch.nan, torch.inf, -torch.inf, -0.0
    return weight


@pytest.mark.parametrize("value", ["0", "1", None], ids=["eager", "compiled", "unset"])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 8), NMPattern(1, 16), NMPattern(3, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TensorFloat32")
def test_masks_are_those_of_the_cpu(value: str | None, pattern: NMPattern, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.delenv("LIGHTNING_STEP_COMPILE", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_STEP_COMPILE", value)
    kernels._kernel.cache_clear()
    for dim in (1, 0):
        weight = with_specials(dtype)
        mask = magnitude_mask(weight.cuda(), pattern, dim)
        assert torch.equal(mask.cpu(), magnitude_mask(weight, pattern, dim))
        assert torch.equal(nm_mask(weight.cuda().abs(), pattern, dim), mask)


def test_a_captured_graph_computes_its_masks_at_every_replay() -> None:
    layer = nn.Linear(64, 32, bias=False).cuda()
    Sparsifier(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe=SRSTE(), total_steps=9)
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad(), kept_weights(layer):
        layer(x)  # keeps a mask
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            y = layer(x)
        layer._parameters["weight"].data.copy_(torch.randn(32, 64))  # type: ignore[union-attr]
        graph.replay()
        (mask,) = nm_masks(layer).values()
        assert torch.equal(y, x @ mask(layer._parameters["weight"]).T)


def test_another_stream_computes_a_mask_of_its_own() -> None:
    layer = nn.Linear(64, 32, bias=False).cuda()
    Sparsifier(layer, torch.optim.SGD(layer.parameters(), lr=0.1), recipe=SRSTE(), total_steps=9)
    (mask,) = nm_masks(layer).values()
    weight = next(layer.parameters())
    first = mask.kept_mask(weight)
    assert mask.kept_mask(weight) is first
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert mask.kept_mask(weight) is not first
    torch.cuda.synchronize()
