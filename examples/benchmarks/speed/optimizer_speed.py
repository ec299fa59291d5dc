"""Optimizer steps of phase II against the stock ones, and how they and the masks grow with the size of the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from side_by_side import COMPILE, Row, Settings, Work, medians, peak_bytes, ratios
from torch import Tensor

from lightning_step import NMPattern
from lightning_step.functional import nm_mask
from lightning_step.optim import adapter_for

BLOCK = [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)] + [(1024,)] * 9
SMALL = [(64, 64)] * 4 + [(256, 256)]


def stock(shapes: Sequence[tuple[int, ...]], settings: Settings, **implementation: Any) -> torch.optim.AdamW:
    """An AdamW that has taken a step."""
    weights = [torch.nn.Parameter(torch.randn(shape, device=settings.device) * 0.02) for shape in shapes]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, **implementation)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    return optimizer


def frozen(shapes: Sequence[tuple[int, ...]], settings: Settings, compiles: bool, **implementation: bool) -> Work:
    """The step of phase II."""
    optimizer = stock(shapes, settings, **implementation)
    weights = optimizer.param_groups[0]["params"]
    adapter = adapter_for(optimizer)
    adapter.freeze(optimizer, weights, "adam")
    grads = {weight: weight.grad for weight in weights}

    def step() -> None:
        os.environ[COMPILE] = "1" if compiles else "0"
        adapter.step(optimizer, grads, None)
        del os.environ[COMPILE]

    return step


def bare(shapes: Sequence[tuple[int, ...]], settings: Settings, compiles: bool = False) -> Work:
    """The kernels of phase II, and nothing besides: what no step that is made of them can beat.

    Eager ones take portions of the size that our step takes, compiled ones all of a weight in one pass.
    """
    tensors = [[torch.rand(s, device=settings.device).view(-1) + 0.5 for s in shapes] for _ in range(4)]
    size = 2**62 if compiles else 2**24 if settings.device.type == "cuda" else 2**16
    portions = [part for whole in zip(*tensors, strict=True) for part in zip(*(t.split(size) for t in whole), strict=True)]
    kernel = torch.compile(frozen_step, dynamic=True) if compiles else frozen_step

    def step() -> None:
        for portion in portions:
            kernel(*portion)

    return step


def frozen_step(first: Tensor, grad: Tensor, root: Tensor, weight: Tensor) -> None:
    """A step with the second moment frozen, in the simplest form."""
    first.lerp_(grad, 0.1)
    update = torch.div(first, root).clamp_(-3.0, 3.0)
    weight.mul_(0.999).add_(update, alpha=-1e-4)


def optimizers(settings: Settings) -> list[Row]:
    """23 million weights; each implementation with weights of its own."""
    shapes = SMALL if settings.quick else [*BLOCK, *BLOCK[:-2]]
    works: dict[str, Work] = {
        "fused AdamW": stock(shapes, settings, fused=True).step,
        "for-loop AdamW": stock(shapes, settings, foreach=False).step,
        "foreach AdamW": stock(shapes, settings, foreach=True).step,
        "the kernels of phase II, bare": bare(shapes, settings),
        "the kernels of phase II, bare, compiled": bare(shapes, settings, compiles=True),
        "phase II, eager": frozen(shapes, settings, compiles=False, foreach=True),
        "phase II, compiled": frozen(shapes, settings, compiles=True, fused=True),
    }
    seconds = medians(works, settings, warm=3)
    rows = ratios("optimizer", seconds, "fused AdamW")
    rows += [r for r in ratios("optimizer", seconds, "foreach AdamW") if "phase II" in r.what]
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    for name, work in works.items():
        if ("compiled" not in name and "bare" not in name) or settings.device.type == "cuda":
            rows.append(
                Row("optimizer", f"{name}, peak of temporaries", "all weights", peak_bytes(work, settings.device) / size)
            )
    return rows


def growth(settings: Settings) -> list[Row]:
    """Per weight, as a multiple of what the smallest model takes: 1 throughout is linear."""
    rows: list[Row] = []
    sizes = [millions for millions in (1, 4, 16, 64, 100, 300) if millions <= settings.largest]
    first: dict[str, float] = {}
    for millions in [1] if settings.quick else sizes:
        shapes = [(1024, 1024)] * millions
        weights = [torch.randn(shape, device=settings.device) for shape in shapes]
        pattern = NMPattern(2, 4)
        works: dict[str, Work] = {
            "fused AdamW": stock(shapes, settings, fused=True).step,
            "phase II step, eager": frozen(shapes, settings, compiles=False),
            "2:4 masks": lambda weights=weights, pattern=pattern: [nm_mask(w, pattern) for w in weights],  # type: ignore[misc]
        }
        per_weight = {name: value / millions for name, value in medians(works, settings, warm=1).items()}
        first = first or per_weight
        rows += [
            Row("growth", f"{name}, {millions}M", "the same at 1M, per weight", value / first[name], value * millions)
            for name, value in per_weight.items()
        ]
    return rows
