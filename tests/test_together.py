"""Many small tensors at once are the same bits as one at a time."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_step import SRSTE, NMMask, NMPattern, Sparsifier, nm_masks
from lightning_step.functional import mask as masks_of_weights
from lightning_step.functional import pruned_part
from lightning_step.together import add_pruned_parts, prepare_masks

PATTERN = NMPattern(2, 4)


def pairs_of(*shapes, dtype=torch.float32, dim=-1, pattern=PATTERN):
    torch.manual_seed(0)
    made = [(nn.Parameter(torch.randn(shape).to(dtype)), NMMask(pattern, dim)) for shape in shapes]
    for weight, mask in made:
        weight.grad = torch.randn_like(weight)
        mask.kept.train(True)
    return made


def test_masks_are_there_afterwards_and_are_what_they_are_alone():
    pairs = [*pairs_of((8, 8), (8, 8), (4, 16)), *pairs_of((8, 8), pattern=NMPattern(1, 8))]
    off = NMMask(NMPattern(2, 4), enabled=False)
    off.kept.train(True)
    prepare_masks([*pairs, (weight := nn.Parameter(torch.randn(4, 4)), off)])
    for weight_, mask in pairs:
        assert mask.kept.lacking(weight_, mask.rule) is None
        assert torch.equal(mask.kept_mask(weight_), mask.mask(weight_))
    assert off.kept.lacking(weight, off.rule) is not None


def test_what_is_there_is_left_alone():
    (first, mask), (second, other) = pairs_of((8, 8), (8, 8))
    there = mask.kept_mask(first)
    prepare_masks([(first, mask), (second, other)])
    assert mask.kept_mask(first) is there


def test_a_large_weight_waits_for_its_own_turn(monkeypatch):
    ((weight, mask),) = pairs_of((8, 8))
    monkeypatch.setitem(masks_of_weights.SMALL, "cpu", 63)
    prepare_masks([(weight, mask)])
    assert mask.kept.lacking(weight, mask.rule) is not None


@pytest.mark.parametrize("limit", [0, 200, 2**17])
@pytest.mark.parametrize("scale", [None, torch.tensor(64.0)], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_term_is_the_same_bits_as_one_tensor_at_a_time(dtype, scale, limit, monkeypatch):
    monkeypatch.setitem(masks_of_weights.TOGETHER, "cpu", limit)
    pairs = pairs_of((8, 8), (4, 16), (16, 8, 3), dtype=dtype, dim=1)
    expected = []
    for weight, mask in pairs:
        term = pruned_part(weight, mask.mask(weight))
        expected.append(weight.grad.clone().add_(term if scale is None else term * scale.to(term), alpha=0.3))
    add_pruned_parts(pairs, 0.3, scale)
    assert all(torch.equal(weight.grad, grad) for (weight, _), grad in zip(pairs, expected, strict=True))
    assert any(mask.mask(weight).logical_not().any() for weight, mask in pairs)


def test_the_terms_of_many_tensors_are_not_all_there_at_once(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch, "_foreach_add_", lambda to, terms, alpha: sizes.append(sum(map(torch.numel, terms))))
    monkeypatch.setitem(masks_of_weights.TOGETHER, "cpu", 200)
    add_pruned_parts(pairs_of(*[(8, 8)] * 10), 0.3)
    assert max(sizes) == 256  # as many as are more than 200
    assert sum(sizes) == 640


def test_a_kept_infinity_adds_nothing():
    ((weight, mask), other) = pairs_of((1, 4), (1, 4))
    with torch.no_grad():
        weight.copy_(torch.tensor([[torch.inf, torch.nan, -1.0, 2.0]]))
    weight.grad.zero_()
    add_pruned_parts([(weight, mask), other], 0.5)
    assert weight.grad.tolist() == [[0.0, 0.0, -0.5, 1.0]]


def calls(layers, sparse):
    """Operations of one training step, as the profiler sees them: to a dispatch mode nothing is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    if sparse:
        Sparsifier(model, optimizer, 2, 4, recipe=SRSTE(), total_steps=100)
    for profiled in (False, False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profiled else nullcontext() as seen:
            model(torch.randn(2, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))


def test_a_layer_more_costs_few_operations_more():
    ours, dense = (calls(40, sparse) - calls(20, sparse) for sparse in (True, False))
    assert (ours - dense) / 20 <= 13  # most of them inside of others; some 60 if every mask is computed by itself


def test_one_forward_pass_computes_all_small_masks_in_one_go(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, 4, recipe=SRSTE(), total_steps=100)
    shapes, compute = [], masks_of_weights.magnitude_mask

    def counting(weight, *args):
        shapes.append(tuple(weight.shape))
        return compute(weight, *args)

    monkeypatch.setattr(masks_of_weights, "magnitude_mask", counting)
    model(torch.randn(2, 8))
    assert shapes == [(20, 8, 8)]
    for name, mask in nm_masks(model).items():
        weight = dict(model.named_parameters())[name]
        assert torch.equal(mask.kept_mask(weight), compute(weight, mask.pattern, mask.dim))
