"""Masks against one elementwise multiply, and against the methods that others published, written anew."""

from __future__ import annotations

import os

import torch
from side_by_side import COMPILE, Row, Settings, Work, medians, ratios
from torch import Tensor

from lightning_step import NMPattern
from lightning_step.functional import magnitude_mask

PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 8), (1, 16), (8, 32)]


def by_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """SR-STE's reference: sort every group, write zeros at the places of the smallest."""
    groups = weight.detach().abs().reshape(-1, m)  # (groups, m)
    smallest = torch.argsort(groups, dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, smallest, 0).reshape(weight.shape)


def by_double_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """The rank of every weight in its group."""
    groups = weight.detach().abs().reshape(-1, m)
    ranks = groups.argsort(dim=1, descending=True).argsort(dim=1)
    return (ranks < n).to(weight.dtype).reshape(weight.shape)


def by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """Write ones at the places of the largest."""
    groups = weight.detach().abs().reshape(-1, m)
    return torch.zeros_like(groups).scatter_(1, groups.topk(n, dim=1).indices, 1).reshape(weight.shape)


def patterns_of(n: int, m: int, like: Tensor) -> Tensor:
    """Every way to keep n of m, one a row."""
    numbers = torch.arange(1 << m, device=like.device)
    bits = (numbers[:, None] >> torch.arange(m, device=like.device)) & 1
    return bits[bits.sum(1) == n].to(like.dtype)


def by_patterns(weight: Tensor, patterns: Tensor) -> Tensor:
    """ASP: multiply every group with every pattern and take the best."""
    groups = weight.detach().abs().reshape(-1, patterns.shape[1])
    return patterns[torch.argmax(groups @ patterns.t(), dim=1)].reshape(weight.shape)


def by_compiled(weight: Tensor, pattern: NMPattern) -> Tensor:
    """Ours, where a compiler is there."""
    os.environ[COMPILE] = "1"
    mask = magnitude_mask(weight, pattern)
    del os.environ[COMPILE]
    return mask


def masks(settings: Settings) -> list[Row]:
    """Every pattern, on a matrix of 4096 x 1024."""
    weight = torch.randn(256 if settings.quick else 4096, 1024, device=settings.device)
    rows = []
    for n, m in PATTERNS[:1] if settings.quick else PATTERNS:
        pattern = NMPattern(n, m)
        out = torch.empty_like(weight)
        works: dict[str, Work] = {
            "one multiply": lambda out=out: torch.mul(weight, weight, out=out),  # type: ignore[misc]
            "magnitude_mask": lambda pattern=pattern: magnitude_mask(weight, pattern),  # type: ignore[misc]
            "magnitude_mask, compiled": lambda pattern=pattern: by_compiled(weight, pattern),  # type: ignore[misc]
            "argsort": lambda n=n, m=m: by_argsort(weight, n, m),  # type: ignore[misc]
            "double argsort": lambda n=n, m=m: by_double_argsort(weight, n, m),  # type: ignore[misc]
            "topk": lambda n=n, m=m: by_topk(weight, n, m),  # type: ignore[misc]
        }
        if m <= 8:
            known = patterns_of(n, m, weight)
            works["pattern matmul"] = lambda known=known: by_patterns(weight, known)  # type: ignore[misc]
        rows += ratios("masks", medians(works, settings), "one multiply", f"{n}:{m} ")
    return rows
