"""Going on from a model that is sparse already: a file that was exported, a checkpoint, a pruned network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_step import (
    ASP,
    SRSTE,
    AtStep,
    NMPattern,
    Recipe,
    Sparsifier,
    apply_nm_masks,
    export_model,
    load_sparse,
    nm_masks,
    strip,
)

MASKED = ("0.weight", "2.weight")
Net = Callable[..., nn.Sequential]


def zeros_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: net.get_parameter(name).detach() == 0 for name in MASKED}


def tune(net: nn.Sequential, batch: Any, recipe: Recipe, steps: int = 15) -> Sparsifier:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    sparsifier = Sparsifier(net, optimizer, 2, 4, recipe=recipe, measure_every=1)
    for t in range(steps):
        x, y = batch(t)
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


@pytest.fixture
def sparse_net(matrix_net: Net) -> nn.Sequential:
    net = matrix_net()
    apply_nm_masks(net, NMPattern(2, 4))
    strip(net)
    return net


def test_asp_from_step_0_keeps_the_zeros_of_a_pruned_model_where_they_are(
    sparse_net: nn.Sequential, matrix_batch: Any
) -> None:
    before = zeros_of(sparse_net)
    weight = sparse_net[0].weight.detach().clone()
    tune(sparse_net, matrix_batch, ASP(AtStep(0)))
    strip(sparse_net)
    after = zeros_of(sparse_net)
    assert all(torch.equal(before[name], after[name]) and before[name].sum() * 2 == before[name].numel() for name in MASKED)
    assert (sparse_net[0].weight != weight).sum() * 2 == weight.numel()  # every kept weight moved


def test_asp_goes_on_from_an_exported_file(
    sparse_net: nn.Sequential, matrix_net: Net, matrix_batch: Any, tmp_path: Path
) -> None:
    apply_nm_masks(sparse_net, NMPattern(2, 4))
    file = str(tmp_path / "model.safetensors")
    export_model(sparse_net, file, "packed")
    loaded = load_sparse(file, matrix_net())
    before = zeros_of(loaded)
    tune(loaded, matrix_batch, ASP(AtStep(0)))
    strip(loaded)
    assert all(torch.equal(before[name], zeros_of(loaded)[name]) for name in MASKED)


def test_masks_that_are_learned_do_move_and_the_flip_rate_says_so(sparse_net: nn.Sequential, matrix_batch: Any) -> None:
    before = zeros_of(sparse_net)
    sparsifier = tune(sparse_net, matrix_batch, SRSTE(lam=1e-3))
    assert 0 < sparsifier.gauges()["flip_rate"] < 0.5
    strip(sparse_net)
    after = zeros_of(sparse_net)
    assert all(not torch.equal(before[name], after[name]) for name in MASKED)


def test_weights_are_sparse_after_the_one_line_that_asks_for_it(matrix_net: Net, matrix_batch: Any) -> None:
    net = matrix_net()
    tune(net, matrix_batch, SRSTE())
    masks = nm_masks(net)
    for name in MASKED:
        kept = masks[name].mask(net.state_dict()[name])
        assert kept.sum() * 2 == kept.numel()
        assert (net.get_submodule(name.removesuffix(".weight")).weight != 0).sum() == kept.sum()
