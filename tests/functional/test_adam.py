"""The reference steps against torch.optim, and the preconditioner against plain arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_step.functional import (
    AdamState,
    adam_bound,
    adam_step,
    moment_behind,
    preconditioned_step,
    preconditioner,
)

HALF_DTYPES = [torch.float16, torch.bfloat16]
DECAYS = [(0.0, False), (0.1, False), (0.1, True)]  # weight_decay, decoupled


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stock(weight, *, decoupled, **settings):
    parameter = torch.nn.Parameter(weight.clone())
    return parameter, (torch.optim.AdamW if decoupled else torch.optim.Adam)([parameter], **settings)


def run_stock(parameter, optimizer, steps):
    for t in range(steps):
        parameter.grad = normal(*parameter.shape, seed=t + 1) / (1 + t)  # shrinking, so that amsgrad matters
        optimizer.step()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize(("weight_decay", "decoupled"), DECAYS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adam_step_is_the_step_of_torch(betas, eps, weight_decay, decoupled, amsgrad, maximize):
    shared = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    weight = normal(4, 3)
    parameter, optimizer = stock(weight, decoupled=decoupled, amsgrad=amsgrad, **shared)
    state = AdamState.zeros(weight)
    for t in range(60):
        grad = normal(4, 3, seed=t + 1) / (1 + t)
        parameter.grad = grad.clone()
        optimizer.step()
        weight, state = adam_step(weight, grad, state, decoupled=decoupled, amsgrad=amsgrad, **shared)
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-11, atol=1e-14)
    expected = optimizer.state[parameter]
    torch.testing.assert_close(state.m, expected["exp_avg"], rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(state.v, expected["exp_avg_sq"], rtol=1e-11, atol=1e-16)
    assert state.t == int(expected["step"]) == 60
    if amsgrad:
        torch.testing.assert_close(state.v_max, expected["max_exp_avg_sq"], rtol=1e-11, atol=1e-16)
        assert (state.v_max > state.v).any()


def test_steps_do_not_modify_their_inputs():
    inputs = [normal(5, seed=s) for s in range(4)]
    before = [tensor.clone() for tensor in inputs]
    weight, grad, m, v = inputs
    adam_step(weight, grad, AdamState(m, v.abs(), v.abs(), 3), lr=0.1, weight_decay=0.1, decoupled=True, maximize=True)
    preconditioned_step(weight, grad, m, v, 3, lr=0.1, weight_decay=0.1, decoupled=True, maximize=True)
    preconditioner(v, 3, beta2=0.9)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("t0", [1, 7, 60])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("weight_decay", "decoupled"), DECAYS)
def test_first_frozen_step_is_the_step_of_stock_adam(t0, betas, maximize, weight_decay, decoupled):
    shared = {"lr": 0.01, "weight_decay": weight_decay, "maximize": maximize}
    parameter, optimizer = stock(normal(4, 3), decoupled=decoupled, betas=betas, eps=1e-8, **shared)
    run_stock(parameter, optimizer, t0)
    state = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    weight = parameter.detach().clone()
    # A gradient whose square is v-hat leaves v-hat as it was: the live step then divides by the frozen denominator.
    effective = (state["exp_avg_sq"] / (1 - betas[1] ** t0)).sqrt() * normal(4, 3, seed=99).sign()
    grad = effective if decoupled else effective - weight_decay * weight
    grad = -grad if maximize else grad
    parameter.grad = grad
    optimizer.step()
    denominator = preconditioner(state["exp_avg_sq"], t0, beta2=betas[1], eps=1e-8)
    stepped, m = preconditioned_step(
        weight, grad, state["exp_avg"], denominator, t0, beta1=betas[0], decoupled=decoupled, **shared
    )
    torch.testing.assert_close(stepped, parameter.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(m, optimizer.state[parameter]["exp_avg"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("t", "jump"), [(1, 31.62), (1000, 1.2577), (10000, 1.0)])
def test_the_papers_form_jumps_by_the_missing_bias_correction(t, jump):
    v = normal(8).square() * (1 - 0.999**t)
    ratio = preconditioner(v, t, beta2=0.999, eps=1e-30) / preconditioner(v, t, beta2=0.999, eps=1e-30, form="paper")
    assert ratio.tolist() == pytest.approx([jump] * 8, rel=1e-3)


@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_papers_form_is_the_root_of_v_plus_eps(eps):
    v = [0.0, 1e-12, 0.04, 7.0]
    made = preconditioner(torch.tensor(v, dtype=torch.float64), 3, beta2=0.9, eps=eps, form="paper")
    assert made.tolist() == pytest.approx([math.sqrt(x + eps) for x in v], rel=1e-14)


@pytest.mark.parametrize("t", [1, 10, 5000])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_dead_coordinates_take_the_root_mean_square_of_their_tensor(t, eps):
    v = [0.04, 0.0, 9.0, (eps * 0.9) ** 2 * (1 - 0.99**t), (eps * 1.1) ** 2 * (1 - 0.99**t), 0.0]
    v_hat = [x / (1 - 0.99**t) for x in v]
    rms = math.sqrt(math.fsum(v_hat) / 6)
    expected = [math.sqrt(x) + eps if i in (0, 2, 4) else rms + eps for i, x in enumerate(v_hat)]
    made = preconditioner(torch.tensor(v, dtype=torch.float64).reshape(2, 3), t, beta2=0.99, eps=eps)
    assert made.shape == (2, 3)
    assert made.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "smallest"), [("adam", 1e-13), ("paper", 1e-5)])
@pytest.mark.parametrize("t", [1, 500])
def test_the_moment_behind_a_preconditioner_is_found_again(t, form, smallest, dtype):
    v = (normal(64).square() + smallest).to(dtype)
    behind = moment_behind(preconditioner(v, t, beta2=0.999, form=form), t, beta2=0.999, form=form)
    assert behind.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(behind, v.to(behind), rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_the_moment_behind_a_guarded_coordinate_is_the_mean_of_its_tensor():
    v = torch.tensor([0.04, 0.0, 0.08, 0.0], dtype=torch.float64)
    behind = moment_behind(preconditioner(v, 7, beta2=0.99), 7, beta2=0.99)
    assert behind.tolist() == pytest.approx([0.04, 0.03, 0.08, 0.03])
    assert moment_behind(preconditioner(v, 7, beta2=0.99, form="paper"), 7, beta2=0.99, form="paper").min() >= 0


def test_the_guard_never_lowers_a_denominator():
    v = torch.tensor([(0.5e-3) ** 2, 0.0, 0.0, 0.0], dtype=torch.float64)  # its root mean square is below its own root
    assert preconditioner(v, 10**6, beta2=0.9, eps=1e-3).tolist() == pytest.approx([1.5e-3] + [1.25e-3] * 3)


def test_a_dead_tensor_is_divided_by_eps():
    assert preconditioner(torch.zeros(3), 5, beta2=0.999, eps=1e-8).tolist() == pytest.approx([1e-8] * 3)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_dead_tensor_in_half_precision_is_not_divided_by_zero(dtype):
    made = preconditioner(torch.zeros(3, dtype=dtype), 5, beta2=0.999, eps=1e-8)
    assert made.dtype == dtype
    assert (made > 0).all()
    assert (1 / made).isfinite().all()


@given(
    v=st.lists(st.floats(0, 6e4), min_size=1, max_size=6),
    t=st.integers(1, 20000),
    beta2=st.sampled_from([0.0, 0.9, 0.99, 0.999, 0.9999]),
    dtype=st.sampled_from([*HALF_DTYPES, torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_preconditioner_is_positive_and_finite(v, t, beta2, dtype):
    made = preconditioner(torch.tensor(v, dtype=torch.float64).to(dtype), t, beta2=beta2)
    assert made.dtype == dtype
    assert (made > 0).all()
    assert made.isfinite().all()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_computed_wider(dtype):
    v = (normal(64).square() * 0.1).to(dtype)
    exact = preconditioner(v.double(), 3, beta2=0.999)
    made = preconditioner(v, 3, beta2=0.999).double()
    assert ((made / exact - 1).abs() <= torch.finfo(dtype).eps / 2 * 1.001).all()


def frozen_step_by_numpy(weight, grad, m, denominator, t, rule):
    """One coordinate after the other, from the formula."""
    lr, beta1, decay, decoupled, maximize, max_step = rule
    new_weight, new_m = np.empty_like(weight), np.empty_like(m)
    for i in range(weight.size):
        w, g = weight[i], -grad[i] if maximize else grad[i]
        g = g if decoupled else g + decay * w
        new_m[i] = beta1 * m[i] + (1 - beta1) * g
        move = new_m[i] / (1 - beta1 ** (t + 1)) / denominator[i]
        move = max(-max_step, min(max_step, move))
        new_weight[i] = (w - lr * decay * w if decoupled else w) - lr * move
    return new_weight, new_m


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("weight_decay", "decoupled"), DECAYS)
@pytest.mark.parametrize("max_step", [math.inf, 1.5])
def test_fifty_frozen_steps(beta1, maximize, weight_decay, decoupled, max_step):
    shared = {"lr": 0.05, "beta1": beta1, "weight_decay": weight_decay, "decoupled": decoupled, "maximize": maximize}
    weight, m, denominator = normal(6), normal(6, seed=1) / 10, normal(6, seed=2).abs() / 3
    expected, expected_m = weight.numpy().copy(), m.numpy().copy()
    for t in range(20, 70):
        grad = normal(6, seed=t)
        weight, m = preconditioned_step(weight, grad, m, denominator, t, max_step=max_step, **shared)
        expected, expected_m = frozen_step_by_numpy(
            expected, grad.numpy(), expected_m, denominator.numpy(), t, (*shared.values(), max_step)
        )
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(m.numpy(), expected_m, rtol=1e-11, atol=1e-13)


@given(
    grad=st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4),
    denominator=st.floats(1e-30, 1e3),
    max_step=st.floats(0.1, 10),
    t=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_no_coordinate_moves_more_than_max_step_rates(grad, denominator, max_step, t):
    grads, zeros = torch.tensor(grad, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    moved, _ = preconditioned_step(zeros, grads, zeros, zeros + denominator, t, lr=0.1, max_step=max_step)
    assert (moved.abs() <= 0.1 * max_step).all()


def test_max_step_binds_only_where_it_is_exceeded():
    grad, one = torch.tensor([100.0, -100.0, 0.5], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    bounded, _ = preconditioned_step(0 * one, grad, 0 * one, one, 0, lr=0.1, max_step=2.0)
    free, _ = preconditioned_step(0 * one, grad, 0 * one, one, 0, lr=0.1)
    assert bounded.tolist() == pytest.approx([-0.2, 0.2, -0.05])
    assert free.tolist() == pytest.approx([-10.0, 10.0, -0.05])


@pytest.mark.parametrize(("betas", "bound"), [((0.9, 0.999), math.sqrt(10)), ((0.9, 0.95), 1.0), ((0.0, 0.99), 10.0)])
def test_adam_bound_is_how_far_stock_adam_moves_for_one_spike(betas, bound):
    assert adam_bound(betas) == pytest.approx(bound)
    zero = torch.zeros(1, dtype=torch.float64)
    moves = []
    for t in (0, 10**6):  # the very first gradient, and the first one after a long silence
        state = AdamState(zero, zero, zero, t)
        moves.append(-adam_step(zero, zero + 5, state, lr=1.0, betas=betas, eps=0.0)[0].item())
    assert max(moves) == pytest.approx(adam_bound(betas))
