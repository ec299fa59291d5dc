"""Counts against numpy, at the edges of what there is."""

import numpy as np
import pytest
import torch

from lightning_step import SRSTE, Sparsifier
from lightning_step.monitoring import histograms as module
from lightning_step.monitoring.histograms import V_BINS, WEIGHT_BINS, Bins, histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_element_is_in_the_bin_whose_edges_hold_it(dtype):
    bins = Bins(-3, 4, 16)
    x = (10 ** (torch.rand(2000, dtype=torch.float64) * 6 - 4)).to(dtype)
    edges = bins.edges()
    logs = np.clip(np.log10(x.double().numpy()), edges[0], np.nextafter(edges[-1], 0))
    expected, _ = np.histogram(logs, edges)
    assert torch.bincount(bins.place(x), minlength=16).tolist() == expected.tolist()


def test_zeros_infinities_and_nan_have_a_bin_too():
    places = V_BINS.place(torch.tensor([0.0, 1e-45, torch.inf, torch.nan]))
    assert places.tolist() == [0, 0, V_BINS.number - 1, V_BINS.number - 1]


def driver(steps=3, width=8):
    model = torch.nn.Linear(width, 12)
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters(), lr=0.01), recipe=SRSTE())
    for _ in range(steps):
        model(torch.randn(4, width)).square().sum().backward()
        sparsifier.optimizer.step()
        sparsifier.optimizer.zero_grad()
    return sparsifier


def test_kept_and_pruned_share_their_edges_and_make_up_the_whole():
    found = {each.kind: each for each in histograms(driver())}
    assert sum(found["kept"].counts) == sum(found["pruned"].counts) == 48
    assert sum(found["v"].counts) == 96
    every = {0.0, *(10**edge for edge in WEIGHT_BINS.edges())}
    assert set(found["kept"].edges) | set(found["pruned"].edges) <= every
    assert found["kept"].counts[0] > 0 < found["kept"].counts[-1], "empty ends are left out"


def test_large_tensors_are_counted_part_by_part(monkeypatch):
    sparsifier = driver()
    whole = histograms(sparsifier)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    assert histograms(sparsifier) == whole


def test_before_the_first_step_v_is_zero_everywhere():
    (v,) = [each for each in histograms(driver(0)) if each.kind == "v"]
    assert (v.counts, v.edges) == ([96], V_BINS.edges()[:2])


def test_it_is_deterministic_where_that_is_asked_for():
    sparsifier = driver()
    torch.use_deterministic_algorithms(True)
    try:
        assert histograms(sparsifier) == histograms(sparsifier)
    finally:
        torch.use_deterministic_algorithms(False)
