"""The reference steps of NAdam and RAdam against torch.optim."""

import itertools
import math

import pytest
import torch

from lightning_step.functional import (
    AdamState,
    NAdamState,
    nadam_bound,
    nadam_momentum,
    nadam_step,
    preconditioned_nadam_step,
    preconditioned_radam_step,
    preconditioner,
    radam_step,
    rectification,
)

KINDS = {
    "NAdam": (torch.optim.NAdam, nadam_step, NAdamState, {"momentum_decay": 0.3}),
    "RAdam": (torch.optim.RAdam, radam_step, AdamState, {}),
}
DECAYS = [(0.0, False), (0.1, False), (0.1, True)]  # weight_decay, decoupled
SETTINGS = [*itertools.product([(0.9, 0.999), (0.8, 0.9), (0.0, 0.5)], [1e-8, 1e-2], DECAYS, [False, True])]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("betas", "eps", "decay", "maximize"), SETTINGS)
def test_the_reference_step_is_the_step_of_torch(kind, betas, eps, decay, maximize):
    stock, step, state_type, extra = KINDS[kind]
    shared = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": decay[0], "maximize": maximize, **extra}
    weight = normal(4, 3)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer, state = stock([parameter], decoupled_weight_decay=decay[1], **shared), state_type.zeros(weight)
    for t in range(60):
        grad = normal(4, 3, seed=t + 1)
        parameter.grad = grad.clone()
        optimizer.step()
        weight, state = step(weight, grad, state, decoupled=decay[1], **shared)
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-9)  # torch keeps mu_product in float32
    expected = optimizer.state[parameter]
    torch.testing.assert_close(state.m, expected["exp_avg"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state.v, expected["exp_avg_sq"], rtol=1e-6, atol=1e-9)
    assert state.t == int(expected["step"]) == 60
    if kind == "NAdam":
        assert state.mu_product == pytest.approx(float(expected["mu_product"]), rel=1e-4)


@pytest.mark.parametrize("t0", [6, 30])
def test_a_frozen_step_is_the_live_step_where_v_is_held(t0):
    """A gradient whose square is v leaves the corrected v as it was."""
    for kind, (_, step, state_type, _) in KINDS.items():
        weight, state = normal(4, 3), state_type.zeros(normal(4, 3))
        for t in range(t0):
            weight, state = step(weight, normal(4, 3, seed=t), state, lr=0.01, eps=0.0)
        grad = (state.v / (1 - 0.999**t0)).sqrt()
        live, after = step(weight, grad, state, lr=0.01, eps=0.0)
        denominator = preconditioner(state.v, t0, beta2=0.999, eps=0.0)
        if kind == "NAdam":
            held, m, mu_product = preconditioned_nadam_step(
                weight, grad, state.m, denominator, t0, state.mu_product, lr=0.01
            )
            assert mu_product == after.mu_product
        else:
            held, m = preconditioned_radam_step(weight, grad, state.m, denominator, t0, lr=0.01)
        torch.testing.assert_close(held, live, rtol=1e-12, atol=0)
        torch.testing.assert_close(m, after.m, rtol=0, atol=0)


def test_rectification_is_zero_while_too_few_gradients_are_averaged_and_then_grows_to_one():
    values = [rectification(float(t), 0.999) for t in range(1, 5000)]
    assert values[:5] == [0.0] * 5
    assert 0 < values[5] < 0.03
    assert all(a < b < 1 for a, b in itertools.pairwise(values[5:]))
    assert rectification(1e6, 0.999) == pytest.approx(1)
    assert rectification(1e6, 2 / 3) == rectification(1e6, 0.5) == 0
    on_device = [rectification(torch.tensor(float(t), dtype=torch.float64), 0.999) for t in (1, 5, 6, 4000)]
    assert [float(value) for value in on_device] == pytest.approx([rectification(float(t), 0.999) for t in (1, 5, 6, 4000)])


def test_nadams_momentum_grows_from_half_of_beta1_to_beta1():
    values = [nadam_momentum(t, 0.9, 4e-3) for t in (0.0, 1.0, 100.0, 1e6)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.45, pytest.approx(0.9))
    assert float(nadam_momentum(torch.tensor(100.0), 0.9, 4e-3)) == pytest.approx(values[2])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize("t", [3000, 10**6])
def test_nadam_bound_is_how_far_stock_nadam_moves_for_one_spike_after_silence(betas, t):
    zero = torch.zeros(1, dtype=torch.float64)
    spiked, _ = nadam_step(zero, zero + 5, NAdamState(zero, zero, 0.0, t), lr=1.0, betas=betas, eps=0.0)
    mu, mu_next = (nadam_momentum(float(t + i), betas[0], 4e-3) for i in (1, 2))
    corrected = math.sqrt(1 - betas[1] ** (t + 1))
    assert max(1.0, -spiked.item() / corrected) == pytest.approx(nadam_bound(betas, mu, mu_next))


@pytest.mark.parametrize("max_step", [0.5, 2.0])
def test_max_step_binds_only_where_it_is_exceeded(max_step):
    grad, one = torch.tensor([100.0, -100.0, 0.1], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    at = (0 * one, grad, 0 * one, one, 20_000)
    for bounded, free in (
        (preconditioned_nadam_step(*at, 0.0, lr=0.1, max_step=max_step), preconditioned_nadam_step(*at, 0.0, lr=0.1)),
        (preconditioned_radam_step(*at, lr=0.1, max_step=max_step), preconditioned_radam_step(*at, lr=0.1)),
    ):
        assert bounded[0][:2].tolist() == pytest.approx([-0.1 * max_step, 0.1 * max_step], rel=1e-4)
        assert bounded[0][2] == free[0][2]
        assert (free[0][:2].abs() > 0.1 * max_step).all()
