"""Every recipe and optimizer written down a second time: masks by sorting, no parametrization, no hook, no adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, Recipe
from lightning_step.functional import (
    AdamState,
    NAdamState,
    adam_bound,
    adam_step,
    nadam_bound,
    nadam_momentum,
    nadam_step,
    preconditioned_nadam_step,
    preconditioned_radam_step,
    preconditioned_step,
    preconditioner,
    radam_step,
)

BETAS, EPS = (0.9, 0.98), 1e-8
SWITCH = 10
LAM = 0.02
RECIPES: dict[str, Recipe] = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=LAM),
    "STEP": STEP(AtStep(SWITCH), lam=LAM),
}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}),
}


def make_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def make_batch(t: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """The data of the step after ``t`` steps."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs(), x[:, 4]], dim=1)


def mask_by_sorting(weight: Tensor) -> Tensor:
    """2:4; the sort is stable, so equal magnitudes keep the lower place."""
    groups = weight.reshape(-1, 4).tolist()
    kept = [sorted(range(4), key=lambda i, group=group: -abs(group[i]))[:2] for group in groups]
    return torch.tensor([[i in places for i in range(4)] for places in kept]).reshape(weight.shape)


class OneTensor:
    """The optimizer of one tensor, out of the slow references."""

    def __init__(self, kind: str, arguments: dict[str, Any], weight: Tensor) -> None:
        self.kind, self.decay = kind, arguments.get("weight_decay", 0.01 if kind == "amsgrad" else 0.0)
        self.decoupled = kind in ("AdamW", "amsgrad", "NAdam")
        self.state: Any = (NAdamState if kind == "NAdam" else AdamState).zeros(weight)
        self.denominator: Tensor | None = None

    def freeze(self) -> None:
        v, t = self.state.v_max if self.kind == "amsgrad" else self.state.v, self.state.t
        eps = EPS / (1 - BETAS[1] ** t) ** 0.5 if self.kind == "RAdam" else EPS
        self.denominator = preconditioner(v, t, beta2=BETAS[1], eps=eps)

    def step(self, weight: Tensor, grad: Tensor, lr: float, betas: tuple[float, float]) -> Tensor:
        shared = {"lr": lr, "weight_decay": self.decay, "decoupled": self.decoupled}
        if self.denominator is not None:
            return self._frozen(weight, grad, betas, shared)
        step = {"NAdam": nadam_step, "RAdam": radam_step}.get(self.kind, adam_step)
        extra = {"amsgrad": True} if self.kind == "amsgrad" else {}
        weight, self.state = step(weight, grad, self.state, betas=betas, eps=EPS, **shared, **extra)
        return weight

    def _frozen(self, weight: Tensor, grad: Tensor, betas: tuple[float, float], shared: Any) -> Tensor:
        m, t = self.state.m, self.state.t
        if self.kind == "NAdam":
            mu, mu_next = (nadam_momentum(float(t + i), betas[0], 4e-3) for i in (1, 2))
            weight, m, product = preconditioned_nadam_step(
                weight, grad, m, self.denominator, t, self.state.mu_product, beta1=betas[0],
                max_step=nadam_bound(betas, mu, mu_next), **shared,
            )  # fmt: skip
            self.state = self.state._replace(m=m, t=t + 1, mu_product=product)
            return weight
        if self.kind == "RAdam":
            weight, m = preconditioned_radam_step(
                weight, grad, m, self.denominator, t, betas=betas, max_step=adam_bound(betas), **shared
            )
        else:
            weight, m = preconditioned_step(
                weight, grad, m, self.denominator, t, beta1=betas[0], max_step=adam_bound(betas), **shared
            )
        self.state = self.state._replace(m=m, t=t + 1)
        return weight


def clipped(grads: dict[str, Tensor], norm: float | None, value: float | None) -> dict[str, Tensor]:
    if norm is not None:
        total = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        grads = {name: grad * min(1.0, norm / (float(total) + 1e-6)) for name, grad in grads.items()}
    if value is not None:
        grads = {name: grad.clamp(-value, value) for name, grad in grads.items()}
    return grads


def train_by_hand(
    recipe: str,
    kind: str,
    settings: list[tuple[float, tuple[float, float]]],
    *,
    norm: float | None = None,
    value: float | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[dict[str, Tensor]]:
    """The latent weights after every step; ``settings`` holds the rate and the betas of each."""
    net = make_net(dtype)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizers = {name: OneTensor(kind, OPTIMIZERS[kind][1], w) for name, w in weights.items()}
    masked = ("0.weight", "2.weight")
    held: dict[str, Tensor] = {}
    history = []
    for t, (lr, betas) in enumerate(settings):
        on = recipe in ("STE", "SRSTE") or (recipe in ("ASP", "STEP") and t >= SWITCH)
        if recipe == "ASP" and t == SWITCH:
            held = {name: mask_by_sorting(weights[name]) for name in masked}
            weights |= {name: weights[name] * held[name] for name in masked}
        if recipe == "STEP" and t == SWITCH:
            for name in masked:
                optimizers[name].freeze()
        masks = held or {name: mask_by_sorting(weights[name]) for name in masked}
        seen = {k: (w * masks[k] if on and k in masks else w.clone()).requires_grad_() for k, w in weights.items()}
        x, y = (part.to(dtype) for part in make_batch(t))
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = nn.functional.mse_loss(torch.func.functional_call(net, seen, (x,)), y)
        grads = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
        if held:
            grads |= {name: grads[name] * held[name] for name in masked}
        grads = clipped(grads, norm, value)
        if on and recipe in ("SRSTE", "STEP"):
            grads |= {name: grads[name] + LAM * (weights[name] * ~masks[name]) for name in masked}
        weights = {name: optimizers[name].step(w, grads[name], lr, betas) for name, w in weights.items()}
        weights |= {name: weights[name] * held[name] for name in held}
        history.append(weights)
    return history


@pytest.fixture
def by_hand() -> Callable[..., list[dict[str, Tensor]]]:
    """The oracle."""
    return train_by_hand


@pytest.fixture
def matrix_net() -> Callable[..., nn.Sequential]:
    return make_net


@pytest.fixture
def matrix_batch() -> Callable[..., tuple[Tensor, Tensor]]:
    return make_batch


@pytest.fixture(params=RECIPES)
def every_recipe(request: pytest.FixtureRequest) -> tuple[str, Recipe]:
    """Name and recipe; masks of STEP and ASP begin after 10 steps."""
    return request.param, RECIPES[request.param]


@pytest.fixture(params=OPTIMIZERS)
def every_optimizer(request: pytest.FixtureRequest) -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """Name, and what makes the optimizer over some parameters."""
    kind, arguments = OPTIMIZERS[request.param]

    def make(parameters: Any, **more: Any) -> torch.optim.Optimizer:
        return kind(parameters, **{"lr": 0.02, "betas": BETAS, "eps": EPS, **arguments, **more})

    return request.param, make


@pytest.fixture
def matrix_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Makes a quiet trainer on the CPU."""

    def make(*callbacks: pl.Callback, steps: int = 20, **arguments: Any) -> pl.Trainer:
        quiet: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": -1, "max_steps": steps,
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        return pl.Trainer(**{**quiet, "callbacks": list(callbacks), **arguments})

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Makes a quiet trainer on the CPU; three epochs, so the switch of most recipes is half-way."""

    def make(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "max_epochs": 3,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
        }
        return pl.Trainer(**{**quiet, "callbacks": list(callbacks), **arguments})

    return make
