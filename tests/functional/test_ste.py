"""The gradient passes a mask unchanged, and the part a mask drops is exact."""

import math

import pytest
import torch

from lightning_step.functional import apply_mask, pruned_part, straight_through

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_case(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(5, 8, generator=generator) < 0.5
    upstream = torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype)
    return weight, mask, upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_masked_weight(dtype):
    weight, mask, _ = random_case(dtype)
    masked = straight_through(weight, mask)
    assert masked.dtype == dtype
    assert masked.tolist() == [
        [w if kept else 0.0 for w, kept in zip(*row, strict=True)]
        for row in zip(weight.tolist(), mask.tolist(), strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_the_identity(dtype):
    weight, mask, upstream = random_case(dtype)
    weight.requires_grad_()
    straight_through(weight, mask).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_backward_passes_where_the_weight_is_not_finite():
    weight = torch.tensor([math.inf, math.nan, -math.inf, 1.0], requires_grad=True)
    masked = straight_through(weight, torch.tensor([False, False, False, True]))
    (masked * torch.arange(4.0)).sum().backward()
    assert masked.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert weight.grad.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_pruned_weight_learns_from_the_loss_at_the_masked_weight():
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    straight_through(weight, torch.tensor([True, False])).add(1).square().sum().backward()
    assert weight.grad.tolist() == [6.0, 2.0]  # 2 (w + 1) at the masked weight (2, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_kept_both_ways(dtype):
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-40, -3.0], dtype=dtype)
    weight = special.repeat(2).requires_grad_()
    mask = torch.arange(16) < 8
    upstream = special.roll(1).repeat(2)
    masked = straight_through(weight, mask)
    (grad,) = torch.autograd.grad(masked, weight, upstream)
    expected = torch.cat([special, torch.zeros_like(special)])
    assert torch.equal(masked.detach().view(bits), expected.view(bits))
    assert torch.equal(grad.view(bits), upstream.view(bits))


def test_the_weight_itself_is_left_as_it_is():
    weight, mask = torch.ones(2, requires_grad=True), torch.tensor([True, False])
    masked = straight_through(weight, mask)
    masked.detach().zero_()
    assert weight.tolist() == [1.0, 1.0]
    assert mask.tolist() == [True, False]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_passes_the_tangent_unchanged():
    weight, tangent = torch.randn(4), torch.randn(4)
    mask = torch.tensor([True, False, False, True])
    masked, moved = torch.func.jvp(lambda w: straight_through(w, mask), (weight,), (tangent,))
    assert torch.equal(masked, apply_mask(weight, mask))
    assert torch.equal(moved, tangent)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert torch.equal(jacobian(lambda w: straight_through(w, mask))(weight), torch.eye(4))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_traced_in_one_graph_and_without_a_warning(backend):
    weight, mask, upstream = random_case(torch.float32)
    weight.requires_grad_()
    torch._dynamo.reset()
    masked = torch.compile(straight_through, backend=backend, fullgraph=True)(weight, mask)
    masked.backward(upstream)
    torch._dynamo.reset()
    assert torch.equal(masked, apply_mask(weight, mask))
    assert torch.equal(weight.grad, upstream)


def test_dropped_weights_are_plus_zero():
    masked = straight_through(-torch.ones(3), torch.tensor([False, True, False]))
    assert masked.signbit().tolist() == [False, True, False]


def test_vmap_and_grad_compose():
    weights = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    masks = torch.tensor([[True, False], [False, True]])

    def loss(weight, mask):
        return (straight_through(weight, mask) * torch.tensor([5.0, 7.0])).sum()

    assert torch.func.vmap(loss)(weights, masks).tolist() == [5.0, 28.0]
    assert torch.func.vmap(torch.func.grad(loss))(weights, masks).tolist() == [[5.0, 7.0], [5.0, 7.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_and_kept_part_add_up_to_the_weight(dtype):
    weight, mask, _ = random_case(dtype)
    dropped = pruned_part(weight, mask)
    assert dropped.dtype == dtype
    assert torch.equal(dropped[~mask], weight[~mask])
    assert torch.equal(dropped + apply_mask(weight, mask), weight)


def test_pruned_part_is_plus_zero_where_the_mask_keeps():
    dropped = pruned_part(torch.tensor([-1.0, math.inf, math.nan, -2.0]), torch.tensor([True, True, True, False]))
    assert dropped.tolist() == [0.0, 0.0, 0.0, -2.0]
    assert dropped.signbit().tolist() == [False, False, False, True]


def test_pruned_part_is_new_and_outside_the_graph():
    weight = torch.ones(2, requires_grad=True)
    dropped = pruned_part(weight, torch.zeros(2, dtype=torch.bool))
    dropped.add_(1)
    assert not dropped.requires_grad
    assert weight.tolist() == [1.0, 1.0]
