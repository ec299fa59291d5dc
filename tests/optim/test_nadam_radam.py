"""NAdam and RAdam with v frozen, against the slow references and against the stock optimizers themselves."""

import copy
import io
import itertools
import math

import pytest
import torch

from lightning_step.functional import (
    adam_bound,
    nadam_bound,
    nadam_momentum,
    preconditioned_nadam_step,
    preconditioned_radam_step,
    preconditioner,
    rectification,
)
from lightning_step.optim import adapter_for

KINDS = {"NAdam": torch.optim.NAdam, "RAdam": torch.optim.RAdam}
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"foreach": False},  # stock capturable runs on accelerators only: switched on for phase II
}
SETTINGS = {
    "plain": {},
    "maximize": {"maximize": True},
    "coupled decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "all at once": {"maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    "two groups": {"groups": {"lr": 0.003, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.2}},
    "tensor lr": {"lr": torch.tensor(0.01), "weight_decay": 0.1, "decoupled_weight_decay": True},
}
SHAPES = [(4, 6), (5,), ()]
MATRIX = [pytest.param(*each, id=", ".join(each)) for each in itertools.product(KINDS, IMPLEMENTATIONS, SETTINGS)]


def make(kind, implementation="for-loop", settings="plain", dtype=torch.float32):
    """An optimizer of three tensors, the last of which may be in a group of its own."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    arguments = {"lr": 0.01, **copy.deepcopy(SETTINGS[settings])}
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], **arguments.pop("groups", {})}]
    optimizer = KINDS[kind](groups, **arguments, **IMPLEMENTATIONS[implementation])
    return optimizer, parameters, adapter_for(optimizer)


def gradients(parameters, scale=1.0):
    return [torch.randn_like(p) * scale for p in parameters]


def stock_steps(optimizer, parameters, steps=14):
    """The second tensor gets its first gradient late, so that step counts and products of momenta differ."""
    for i in range(steps):
        for p, grad in zip(parameters, gradients(parameters), strict=True):
            p.grad = None if p is parameters[1] and i < steps - 8 else grad
        optimizer.step()


def frozen(kind, implementation="for-loop", settings="plain", dtype=torch.float32, form="adam"):
    optimizer, parameters, adapter = make(kind, implementation, settings, dtype)
    stock_steps(optimizer, parameters)
    assert adapter.freeze(optimizer, parameters, form) == parameters
    for group in optimizer.param_groups:
        group["capturable"] = implementation == "capturable"
    return optimizer, parameters, adapter


def group_of(optimizer, parameter):
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def own_bound(kind, group, t):
    if kind == "RAdam":
        return adam_bound(group["betas"])
    mu, mu_next = (nadam_momentum(float(t + i), group["betas"][0], group["momentum_decay"]) for i in (1, 2))
    return nadam_bound(group["betas"], mu, mu_next)


class Reference:
    """The slow reference of one tensor, in float64."""

    def __init__(self, kind, optimizer, parameter):
        state = optimizer.state[parameter]
        self.kind, self.group, self.t = kind, group_of(optimizer, parameter), int(state["step"])
        self.weight, self.m, self.denominator = (
            x.detach().double().clone() for x in (parameter, state["exp_avg"], state["exp_avg_sq"])
        )
        self.mu_product = float(state["mu_product"]) if kind == "NAdam" else None

    def step(self, grad, max_step=None):
        group = self.group
        shared = {
            "lr": float(group["lr"]), "weight_decay": group["weight_decay"], "maximize": group["maximize"],
            "decoupled": group["decoupled_weight_decay"],
            "max_step": own_bound(self.kind, group, self.t) if max_step is None else max_step,
        }  # fmt: skip
        before = (self.weight, grad.double(), self.m, self.denominator, self.t)
        if self.kind == "NAdam":
            beta1, momentum_decay = group["betas"][0], group["momentum_decay"]
            self.weight, self.m, self.mu_product = preconditioned_nadam_step(
                *before, self.mu_product, beta1=beta1, momentum_decay=momentum_decay, **shared
            )
        else:
            self.weight, self.m = preconditioned_radam_step(*before, betas=group["betas"], **shared)
        self.t += 1


def check_hundred_steps(kind, optimizer, parameters, adapter, max_step=None, rtol=1e-5):
    oracles = {p: Reference(kind, optimizer, p) for p in parameters}
    kept = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in parameters}
    for i in range(100):
        if i == 50:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        grads = dict(zip(parameters, gradients(parameters, 100.0 if 20 < i < 25 else 1.0), strict=True))
        if i % 3 == 1:
            del grads[parameters[1]]
        for p, grad in grads.items():
            oracles[p].step(grad, max_step)
        adapter.step(optimizer, grads, max_step)
        for p, oracle in oracles.items():
            state = optimizer.state[p]
            torch.testing.assert_close(p.detach().double(), oracle.weight, rtol=rtol, atol=rtol)
            torch.testing.assert_close(state["exp_avg"].double(), oracle.m, rtol=1e-5, atol=1e-5)
            assert float(state["step"]) == oracle.t
            if kind == "NAdam":
                assert float(state["mu_product"]) == pytest.approx(oracle.mu_product, rel=1e-4)
    assert all(torch.equal(optimizer.state[p]["exp_avg_sq"], kept[p]) for p in parameters)


@pytest.fixture
def counts_on_the_device(monkeypatch):
    """Takes the way of a step count that must not be read, which no CPU would take."""
    for module in ("adam", "nadam", "radam"):
        monkeypatch.setattr(f"lightning_step.optim.{module}.on_host", lambda states: False)


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_hundred_steps_equal_the_reference_and_the_preconditioner_never_changes(kind, implementation, settings):
    check_hundred_steps(kind, *frozen(kind, implementation, settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("counts_on_the_device")
def test_hundred_steps_with_the_step_count_left_on_the_device_equal_the_reference(kind, settings):
    # Early on r_t is the root of a small difference, which a device computes in single precision, as stock RAdam does.
    check_hundred_steps(kind, *frozen(kind, "capturable", settings), rtol=1e-4 if kind == "RAdam" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_step", [math.inf, 0.5])
@pytest.mark.parametrize("form", ["adam", "paper"])
def test_hundred_steps_equal_the_reference_for_every_bound_and_form(kind, max_step, form):
    check_hundred_steps(kind, *frozen(kind, settings="two groups", form=form), max_step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "implementation"), [*itertools.product(KINDS, ["for-loop", "foreach"])])
def test_a_step_in_another_dtype_is_within_its_rounding(kind, implementation, dtype):
    optimizer, parameters, adapter = frozen(kind, implementation, "decoupled decay", dtype)
    rounding = 4 * torch.finfo(dtype).eps
    for _ in range(20):
        oracles = [Reference(kind, optimizer, p) for p in parameters]
        grads = dict(zip(parameters, gradients(parameters), strict=True))
        adapter.step(optimizer, grads, None)
        for (p, grad), oracle in zip(grads.items(), oracles, strict=True):
            oracle.step(grad)
            tolerance = {"rtol": max(rounding, 1e-6), "atol": max(rounding, 1e-6)}
            torch.testing.assert_close(p.detach().double(), oracle.weight, **tolerance)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), oracle.m, **tolerance)
            assert p.dtype == optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_the_first_step_is_the_one_the_stock_optimizer_takes_where_v_is_held(kind, implementation, settings):
    optimizer, parameters, adapter = make(kind, implementation, settings, torch.float64)
    stock_steps(optimizer, parameters)
    stock, twins, _ = make(kind, implementation, settings, torch.float64)
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = gradients(parameters, 0.1)
    for p, twin, grad in zip(parameters, twins, grads, strict=True):
        twin.grad, twin.data = grad, p.detach().clone()
        group, state = group_of(stock, twin), stock.state[twin]
        # Make stock's own update of v end where what it divides by is what it divides by now.
        beta2, t = group["betas"][1], int(state["step"])
        short, long = math.sqrt(1 - beta2**t), math.sqrt(1 - beta2 ** (t + 1))
        if kind == "NAdam":
            held = state["exp_avg_sq"] * (long / short) ** 2
        else:  # eps is in the root's unit before the correction
            held = ((state["exp_avg_sq"].sqrt() + group["eps"]) * long / short - group["eps"]) ** 2
        sign = -1 if group["maximize"] else 1
        coupled = 0 if group["decoupled_weight_decay"] else sign * group["weight_decay"] * p.detach()
        state["exp_avg_sq"] = (held - (1 - beta2) * (grad + coupled) ** 2) / beta2
    stock.step()
    adapter.freeze(optimizer, parameters, "adam")
    adapter.step(optimizer, dict(zip(parameters, grads, strict=True)), None)
    for p, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-8)
        for key in set(stock.state[twin]) - {"exp_avg_sq"}:
            # torch loads mu_product in the dtype of the parameter
            ours, theirs = optimizer.state[p][key], stock.state[twin][key]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, check_dtype=False)


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_freezing_adds_no_memory_and_keeps_the_storage(kind, implementation, settings):
    optimizer, parameters, adapter = make(kind, implementation, settings)
    stock_steps(optimizer, parameters)
    places = {p: {key: value.data_ptr() for key, value in optimizer.state[p].items()} for p in parameters}
    v = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in parameters}
    adapter.freeze(optimizer, parameters, "adam")
    for p in parameters:
        group, state = group_of(optimizer, p), optimizer.state[p]
        assert {key: value.data_ptr() for key, value in state.items()} == places[p]
        t, beta2 = int(state["step"]), group["betas"][1]
        eps = group["eps"] if kind == "NAdam" else group["eps"] / math.sqrt(1 - beta2**t)
        assert torch.equal(adapter.second_moment(optimizer, p), preconditioner(v[p], t, beta2=beta2, eps=eps))


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_effective_gradient_is_what_the_stock_optimizer_averages_and_squares(kind, implementation, settings):
    optimizer, parameters, adapter = make(kind, implementation, settings)
    assert [adapter.second_moment(optimizer, p) for p in parameters] == [None] * 3
    effective = {}
    for p, grad in zip(parameters, gradients(parameters), strict=True):
        effective[p] = adapter.effective_gradient(group_of(optimizer, p), p.detach().clone(), grad.clone())
        p.grad = grad
    optimizer.step()
    for p, grad in effective.items():
        moments = adapter.moments(group_of(optimizer, p))
        torch.testing.assert_close(grad * (1 - moments.beta1), optimizer.state[p]["exp_avg"])
        torch.testing.assert_close(grad.square() * (1 - moments.beta2), adapter.second_moment(optimizer, p))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_survives_a_safe_load_and_the_next_steps_are_bit_equal(kind):
    optimizer, parameters, adapter = frozen(kind, "foreach", "two groups")
    torch.save([optimizer.state_dict(), [p.detach() for p in parameters]], file := io.BytesIO())
    state, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed, twins, _ = make(kind, "foreach", "two groups")
    resumed.load_state_dict(state)
    for twin, weight in zip(twins, weights, strict=True):
        twin.data = weight
    for _ in range(3):
        grads = gradients(parameters)
        adapter.step(optimizer, dict(zip(parameters, grads, strict=True)), None)
        adapter.step(resumed, dict(zip(twins, grads, strict=True)), None)
    for p, twin in zip(parameters, twins, strict=True):
        assert torch.equal(p, twin)
        assert all(torch.equal(optimizer.state[p][key], resumed.state[twin][key]) for key in optimizer.state[p])


@pytest.mark.parametrize(
    ("steps", "beta2", "trusted"), [(5, 0.999, False), (6, 0.999, True), (6, 0.7, False), (40, 0.7, True)]
)
def test_radam_freezes_nothing_that_it_would_not_divide_by_itself(steps, beta2, trusted):
    weight, twin = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.RAdam([weight], lr=0.1, betas=(0.9, beta2))
    for _ in range(steps):
        weight.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        before, stock = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
    # What stock does not divide by makes no difference to its step.
    other = torch.optim.RAdam([twin])
    other.load_state_dict(stock)
    other.state[twin]["exp_avg_sq"].mul_(100)
    twin.data, twin.grad = before, weight.grad
    other.step()
    assert torch.allclose(twin, weight, rtol=1e-12) is not trusted
    v = optimizer.state[weight]["exp_avg_sq"].clone()
    assert adapter_for(optimizer).freeze(optimizer, [weight], "adam") == ([weight] if trusted else [])
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], v) is not trusted


@pytest.mark.parametrize("t", [100, 20_000])
@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_coordinate_moves_further_than_what_the_live_optimizer_makes_of_a_first_gradient(kind, t, way, request):
    if way == "device":
        request.getfixturevalue("counts_on_the_device")
    moves = {}
    for which in ("live", "frozen"):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = KINDS[kind]([weight], lr=1.0, eps=0.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = optimizer.state[weight]
        state["step"].fill_(t)
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        if kind == "NAdam":
            state["mu_product"].fill_(math.prod(nadam_momentum(float(i), 0.9, 4e-3) for i in range(1, t + 1)))
        before, spike = weight.detach().clone(), torch.full_like(weight, 1e6)
        if which == "live":
            weight.grad = spike
            optimizer.step()
        else:
            state["exp_avg_sq"].fill_(1.0)
            adapter_for(optimizer).step(optimizer, {weight: spike}, None)
        moves[which] = float((before - weight.detach()).max())
    # The bound is that of late steps, where neither moment is corrected any more.
    corrected = math.sqrt(1 - 0.999 ** (t + 1))
    assert moves["live"] == pytest.approx(moves["frozen"] * corrected, rel=0.01)
    if kind == "RAdam":
        assert moves["frozen"] == pytest.approx(math.sqrt(10) * rectification(t + 1.0, 0.999), rel=2e-4)
    else:
        assert 5.9 < moves["frozen"] < 18.9


def test_nadam_in_bf16_goes_on_after_a_resume_within_the_rounding_of_its_product_that_torch_loads():
    optimizer, parameters, adapter = frozen("NAdam", dtype=torch.bfloat16)
    resumed, twins, _ = make("NAdam", dtype=torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, twin in zip(parameters, twins, strict=True):
        twin.data = p.detach().clone()
        products = optimizer.state[p]["mu_product"], resumed.state[twin]["mu_product"]
        assert [product.dtype for product in products] == [torch.float32, torch.bfloat16]
        torch.testing.assert_close(*products, rtol=2**-8, atol=0, check_dtype=False)
    for _ in range(5):
        grads = gradients(parameters)
        adapter.step(optimizer, dict(zip(parameters, grads, strict=True)), None)
        adapter.step(resumed, dict(zip(twins, grads, strict=True)), None)
    for p, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(twin, p, rtol=2**-7, atol=2**-9)
