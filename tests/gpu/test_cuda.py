"""What only a CUDA device can show. `make gpu` runs these; elsewhere they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import ASP, SRSTE, STEP, AtStep, AutoSwitch, NMPattern, Recipe, Sparsifier, strip
from lightning_step.functional import (
    AdamState,
    NAdamState,
    adam_step,
    magnitude_mask,
    nadam_step,
    preconditioned_nadam_step,
    preconditioned_radam_step,
    preconditioned_step,
    preconditioner,
    radam_step,
)
from lightning_step.optim import adapter_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IMPLEMENTATIONS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}]


def model_on_gpu(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scaler: Any = None) -> None:
    for step in range(steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).cuda()
        loss = (model(x) - x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any host synchronization inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
def test_step_equals_the_reference(settings: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64, device="cuda"))
    layer = nn.Linear(16, 8, bias=False, dtype=torch.float64, device="cuda")
    layer.weight = weight
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, betas=(0.9, 0.99), **settings)
    Sparsifier(layer, optimizer, recipe=STEP(AtStep(5), lam=0.0))
    expected, state, frozen = weight.detach().clone(), AdamState.zeros(weight), None
    for step in range(20):
        grad = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).cuda()
        weight.grad = grad.clone()
        optimizer.step()
        common = {"lr": 1e-2, "weight_decay": 1e-2, "decoupled": True}
        if frozen is None:
            expected, state = adam_step(expected, grad, state, betas=(0.9, 0.99), **common)
            m = state.m
        else:
            expected, m = preconditioned_step(expected, grad, m, frozen, step, beta1=0.9, max_step=1.0, **common)
        if step == 4:
            frozen = preconditioner(state.v, 5, beta2=0.99)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_step_of_nadam_and_radam_equals_the_reference(kind: Any, settings: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64, device="cuda"))
    optimizer = kind([weight], lr=1e-2, betas=(0.9, 0.99), **settings)
    step = nadam_step if kind is torch.optim.NAdam else radam_step
    expected = weight.detach().clone()
    state: Any = (NAdamState if kind is torch.optim.NAdam else AdamState).zeros(weight)
    grads = [torch.randn(8, 16, dtype=torch.float64, device="cuda") for _ in range(30)]
    for grad in grads[:10]:
        weight.grad = grad.clone()
        optimizer.step()
        expected, state = step(expected, grad, state, lr=1e-2, betas=(0.9, 0.99))
    adapter = adapter_for(optimizer)
    assert adapter.freeze(optimizer, [weight], "adam") == [weight]
    eps = 1e-8 if kind is torch.optim.NAdam else 1e-8 / (1 - 0.99**10) ** 0.5
    frozen, m, product = preconditioner(state.v, 10, beta2=0.99, eps=eps), state.m, getattr(state, "mu_product", None)
    torch.cuda.synchronize()
    for t, grad in enumerate(grads[10:], 10):
        with no_waiting():
            adapter.step(optimizer, {weight: grad}, 1.0)
        if product is None:
            expected, m = preconditioned_radam_step(expected, grad, m, frozen, t, lr=1e-2, betas=(0.9, 0.99), max_step=1.0)
        else:
            expected, m, product = preconditioned_nadam_step(expected, grad, m, frozen, t, product, lr=1e-2, max_step=1.0)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("recipe", [STEP(AutoSwitch(t_min=50, t_max=60)), SRSTE()], ids=["STEP phase I", "SRSTE"])
def test_a_step_does_not_wait_for_the_device(recipe: Recipe, settings: dict[str, Any]) -> None:
    model = model_on_gpu()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    Sparsifier(model, optimizer, recipe=recipe, read_every=1_000)
    train(model, optimizer, 2)
    x = torch.randn(32, 64, device="cuda")
    with no_waiting():
        (model(x) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
def test_phase_two_does_not_wait_for_the_device(settings: dict[str, Any]) -> None:
    model = model_on_gpu()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    Sparsifier(model, optimizer, recipe=STEP(AtStep(2)), read_every=1_000)
    train(model, optimizer, 4)
    x = torch.randn(32, 64, device="cuda")
    with no_waiting():
        (model(x) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", [STEP(AtStep(5)), SRSTE(lam=1e-2), ASP(AtStep(5))], ids=["STEP", "SRSTE", "ASP"])
def test_a_loss_scaler_changes_nothing(recipe: Recipe, fused: bool) -> None:
    plain, scaled = model_on_gpu(), model_on_gpu()
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cuda", init_scale=2.0**10))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        Sparsifier(model, optimizer, recipe=recipe)
        train(model, optimizer, 12, scaler)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (1, 16), (8, 32)])
def test_masks_equal_those_of_the_cpu(n: int, m: int, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128).to(dtype).round(decimals=1)  # many ties
    pattern = NMPattern(n, m)
    assert torch.equal(magnitude_mask(weight.cuda(), pattern, 1).cpu(), magnitude_mask(weight, pattern, 1))


def test_a_stripped_model_runs_semi_structured() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    model = model_on_gpu()
    optimizer = torch.optim.AdamW(model.parameters())
    Sparsifier(model, optimizer, recipe=SRSTE())
    train(model, optimizer, 3)
    strip(model)
    model.half()
    x = torch.randn(32, 64, device="cuda", dtype=torch.float16)
    expected = model(x)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-3)
