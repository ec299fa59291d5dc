"""The compiled preconditioned step on a CUDA device: the eager one within rounding, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import compiling
from lightning_step.compiling import VARIABLE
from lightning_step.optim import adapter_for
from lightning_step.optim.kernel import worth_compiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHAPES = [(256, 256)] * 5 + [(512, 256), (64, 64), (7,)]
SETTINGS = [{"fused": True}, {"foreach": True}, {"capturable": True}]


def stepped(kind: str, settings: dict[str, Any], strict: bool, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in SHAPES]
    optimizer = getattr(torch.optim, kind)(weights, lr=1e-2, weight_decay=0.1, **settings)
    for _ in range(8):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    adapter = adapter_for(optimizer)
    assert len(adapter.freeze(optimizer, weights, "adam")) == len(weights)
    for i in range(10):
        grads = {weight: torch.randn_like(weight) for weight in weights}
        if strict and i == 3:  # compiled by then
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            adapter.step(optimizer, grads, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [[weight.detach(), optimizer.state[weight]["exp_avg"]] for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "NAdam"])
def test_it_is_the_eager_step_within_rounding_and_waits_for_nothing(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "NAdam" and settings.get("fused"):
        pytest.skip("torch has no fused NAdam")
    monkeypatch.setattr(compiling, "_failures", set())
    monkeypatch.setenv(VARIABLE, "1")
    ours = stepped(kind, settings, "foreach" not in settings, dtype)
    monkeypatch.setenv(VARIABLE, "0")
    theirs = stepped(kind, settings, False, dtype)
    assert compiling._failures == set(), "it was compiled indeed"
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_fused_optimizer_has_it_compiled_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    weight = torch.empty(256, 256, device="cuda")
    assert worth_compiling({"fused": True}, [weight])
    assert not worth_compiling({"fused": None}, [weight])
