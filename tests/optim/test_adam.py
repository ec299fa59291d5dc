import copy
import io
import itertools

import pytest
import torch

from lightning_step.functional import adam_bound, preconditioned_step, preconditioner
from lightning_step.optim import AdamAdapter, adapter_for

KINDS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": False},  # stock capturable runs on accelerators only: switched on for phase II
}
SETTINGS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.1},
    "all at once": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    "two groups": {"groups": {"lr": 0.003, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.2}},
    "tensor lr": {"lr": torch.tensor(0.01), "weight_decay": 0.1},
    "tensor lr and betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.99))},
}
SHAPES = [(4, 6), (5,), ()]
MATRIX = [
    pytest.param(kind, implementation, settings, id=f"{kind}, {implementation}, {settings}")
    for kind, implementation, settings in itertools.product(KINDS, IMPLEMENTATIONS, SETTINGS)
    if not (implementation == "foreach" and "tensor" in settings)  # torch refuses that itself
]
adapter = AdamAdapter()


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def make(kind="Adam", implementation="for-loop", settings="plain", dtype=torch.float32):
    """An optimizer of three tensors, the last of which may be in a group of its own."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    arguments = {"lr": 0.01, **copy.deepcopy(SETTINGS[settings])}
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], **arguments.pop("groups", {})}]
    return KINDS[kind](groups, **arguments, **IMPLEMENTATIONS[implementation]), parameters


def gradients(parameters, scale=1.0):
    return [torch.randn_like(p) * scale for p in parameters]


def phase_one(optimizer, parameters, steps=10):
    """Stock steps; the second tensor gets its first gradient late, so that step counts differ."""
    for i in range(steps):
        for p, grad in zip(parameters, gradients(parameters), strict=True):
            p.grad = None if p is parameters[1] and i < steps - 3 else grad
        optimizer.step()


def frozen(kind="Adam", implementation="for-loop", settings="plain", dtype=torch.float32, form="adam"):
    optimizer, parameters = make(kind, implementation, settings, dtype)
    phase_one(optimizer, parameters)
    assert adapter.freeze(optimizer, parameters, form) == parameters
    for group in optimizer.param_groups:
        group["capturable"] = implementation == "capturable"
    return optimizer, parameters


def group_of(optimizer, parameter):
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def reference(optimizer, parameter, weight, m, denominator, t, grad, max_step):
    group = group_of(optimizer, parameter)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return preconditioned_step(
        weight, grad, m, denominator, t, lr=float(group["lr"]), beta1=beta1, weight_decay=group["weight_decay"],
        decoupled=isinstance(optimizer, torch.optim.AdamW), maximize=group["maximize"],
        max_step=adam_bound((beta1, beta2)) if max_step is None else max_step,
    )  # fmt: skip


def check_hundred_steps(optimizer, parameters, max_step=None):
    state = optimizer.state
    oracle = {p: [x.detach().double() for x in (p, state[p]["exp_avg"], state[p]["exp_avg_sq"])] for p in parameters}
    t = {p: int(state[p]["step"]) for p in parameters}
    kept = {p: state[p]["exp_avg_sq"].clone() for p in parameters}
    for i in range(100):
        if i == 50:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        grads = dict(zip(parameters, gradients(parameters, 30.0 if 20 < i < 25 else 1.0), strict=True))
        if i % 3 == 1:
            del grads[parameters[1]]
        adapter.step(optimizer, grads, max_step)
        for p, grad in grads.items():
            weight, m, denominator = oracle[p]
            oracle[p][:2] = reference(optimizer, p, weight, m, denominator, t[p], grad.double(), max_step)
            t[p] += 1
        for p in parameters:
            torch.testing.assert_close(p.detach().double(), oracle[p][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state[p]["exp_avg"].double(), oracle[p][1], rtol=1e-5, atol=1e-5)
            assert float(state[p]["step"]) == t[p]
    assert all(torch.equal(state[p]["exp_avg_sq"], kept[p]) for p in parameters)


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_hundred_steps_equal_the_reference_and_the_preconditioner_never_changes(kind, implementation, settings):
    check_hundred_steps(*frozen(kind, implementation, settings))


@pytest.mark.parametrize("settings", SETTINGS)
def test_hundred_steps_with_the_step_count_left_on_the_device_equal_the_reference(settings, monkeypatch):
    monkeypatch.setattr("lightning_step.optim.adam.on_host", lambda states: False)  # a way that no CPU would take
    check_hundred_steps(*frozen("AdamW", "capturable", settings))


@pytest.mark.parametrize("max_step", [None, float("inf"), 0.5])
@pytest.mark.parametrize("settings", ["two groups", "tensor lr"])
@pytest.mark.parametrize("form", ["adam", "paper"])
def test_hundred_steps_equal_the_reference_for_every_bound_and_form(max_step, settings, form):
    check_hundred_steps(*frozen("AdamW", "for-loop", settings, form=form), max_step)


@pytest.mark.parametrize(("max_step", "rates"), [(None, 10**0.5), (0.5, 0.5), (2.0, 2.0)])
def test_no_coordinate_moves_by_more_than_max_step_or_what_live_adam_could(max_step, rates):
    optimizer, parameters = frozen()
    before = parameters[0].detach().clone()
    adapter.step(optimizer, {p: torch.full_like(p, 1e3) for p in parameters}, max_step)
    assert float((before - parameters[0].detach()).abs().max() / 0.01) == pytest.approx(rates, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "implementation"), [("Adam", "for-loop"), ("AdamW", "foreach"), ("AdamW", "capturable")])
def test_a_step_in_another_dtype_is_within_its_rounding(kind, implementation, dtype):
    optimizer, parameters = frozen(kind, implementation, "decay", dtype)
    rounding = 4 * torch.finfo(dtype).eps
    for _ in range(20):
        grads = dict(zip(parameters, gradients(parameters), strict=True))
        expected = {}
        for p, grad in grads.items():
            state = optimizer.state[p]
            wide = [x.detach().double() for x in (p, state["exp_avg"], state["exp_avg_sq"])]
            expected[p] = reference(optimizer, p, *wide, int(state["step"]), grad.double(), None)
        adapter.step(optimizer, grads, None)
        for p, (weight, m) in expected.items():
            torch.testing.assert_close(p.detach().double(), weight, rtol=rounding, atol=rounding)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=rounding, atol=rounding)
            assert p.dtype == optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["AdamW", "NAdam", "RAdam"])
def test_weight_decay_in_half_precision_is_that_of_the_for_loop(kind, dtype):
    """A factor that is itself rounded to half precision would decay twice as much: 0.998 is 0.996 in bfloat16."""
    weight = torch.nn.Parameter(torch.randn(64, 64).to(dtype))
    decoupled = {} if kind == "AdamW" else {"decoupled_weight_decay": True}
    optimizer = getattr(torch.optim, kind)([weight], lr=0.02, weight_decay=0.1, **decoupled)
    for _ in range(6):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = weight.detach().clone()
    adapter = adapter_for(optimizer)
    adapter.freeze(optimizer, [weight], "adam")
    optimizer.state[weight]["exp_avg"].zero_()
    adapter.step(optimizer, {weight: torch.zeros_like(weight)}, None)
    assert_same(weight.detach(), before.mul(0.998))


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_the_first_step_is_the_one_stock_adam_takes_where_v_is_held(kind, implementation, settings):
    optimizer, parameters = make(kind, implementation, settings, torch.float64)
    phase_one(optimizer, parameters)
    stock, twins = make(kind, implementation, settings, torch.float64)
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = gradients(parameters, 0.1)
    for p, twin, grad in zip(parameters, twins, grads, strict=True):
        twin.grad, twin.data = grad, p.detach().clone()
        group, state = group_of(stock, twin), stock.state[twin]
        # Make stock's own update of v end where the corrected v of the next step is the corrected v of now.
        beta2, t = float(group["betas"][1]), int(state["step"])
        held = state.get("max_exp_avg_sq", state["exp_avg_sq"]) * (1 - beta2 ** (t + 1)) / (1 - beta2**t)
        sign = -1 if group["maximize"] else 1
        squared = (grad + (sign * group["weight_decay"] * p.detach() if kind == "Adam" else 0)) ** 2
        state["exp_avg_sq"] = (held - (1 - beta2) * squared) / beta2
        if "max_exp_avg_sq" in state:
            state["max_exp_avg_sq"] = torch.zeros_like(held)
    stock.step()
    adapter.freeze(optimizer, parameters, "adam")
    adapter.step(optimizer, dict(zip(parameters, grads, strict=True)), None)
    for p, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], stock.state[twin]["exp_avg"], rtol=1e-6, atol=1e-8)


def stored(optimizer):
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize("form", ["adam", "paper"])
@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_freezing_adds_no_memory_and_keeps_the_storage(kind, implementation, settings, form):
    optimizer, parameters = make(kind, implementation, settings)
    phase_one(optimizer, parameters)
    places = {p: optimizer.state[p]["exp_avg_sq"].data_ptr() for p in parameters}
    largest = {p: optimizer.state[p].get("max_exp_avg_sq", optimizer.state[p]["exp_avg_sq"]).clone() for p in parameters}
    size = stored(optimizer)
    adapter.freeze(optimizer, parameters, form)
    dropped = sum(p.nbytes for p in parameters) if optimizer.defaults["amsgrad"] else 0
    assert stored(optimizer) == size - dropped
    for p in parameters:
        group, now = group_of(optimizer, p), adapter.second_moment(optimizer, p)
        assert now.data_ptr() == places[p]
        t, beta2 = int(optimizer.state[p]["step"]), float(group["betas"][1])
        assert torch.equal(now, preconditioner(largest[p], t, beta2=beta2, eps=group["eps"], form=form))


def test_only_what_is_named_freezes_and_moves():
    optimizer, parameters = make("AdamW", settings="decay")
    phase_one(optimizer, parameters)
    assert adapter.freeze(optimizer, parameters[:1], "adam") == parameters[:1]
    before = copy.deepcopy([[p, optimizer.state[p]] for p in parameters])
    adapter.step(optimizer, {parameters[0]: torch.ones(SHAPES[0])}, None)
    for p, (weight, state) in zip(parameters[1:], before[1:], strict=True):
        assert_same([p.detach(), optimizer.state[p]], [weight.detach(), state])
    assert not torch.equal(parameters[0], before[0][0])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_what_has_no_second_moment_to_freeze_stays_live(amsgrad):
    never, zero, dense, complex_ = (torch.nn.Parameter(torch.ones(3, dtype=d)) for d in [torch.float] * 3 + [torch.cfloat])
    optimizer = torch.optim.Adam([never, zero, dense, complex_], amsgrad=amsgrad)
    for _ in range(3):
        zero.grad, dense.grad, complex_.grad = torch.zeros_like(zero), torch.ones_like(dense), torch.ones_like(complex_)
        optimizer.step()
    before = copy.deepcopy([optimizer.state[zero], optimizer.state[complex_]])
    assert adapter.freeze(optimizer, [never, zero, dense, complex_], "adam") == [dense]
    assert never not in optimizer.state
    assert_same([optimizer.state[zero], optimizer.state[complex_]], before)


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_the_state_dict_survives_a_safe_load_and_the_next_steps_are_bit_equal(kind, implementation, settings):
    optimizer, parameters = frozen(kind, implementation, settings)
    torch.save([optimizer.state_dict(), [p.detach() for p in parameters]], file := io.BytesIO())
    state, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed, twins = make(kind, implementation, settings)
    resumed.load_state_dict(state)
    for twin, weight in zip(twins, weights, strict=True):
        twin.data = weight
    for _ in range(3):
        grads = gradients(parameters)
        adapter.step(optimizer, dict(zip(parameters, grads, strict=True)), None)
        adapter.step(resumed, dict(zip(twins, grads, strict=True)), None)
    for p, twin in zip(parameters, twins, strict=True):
        assert_same([twin.detach(), resumed.state[twin]], [p.detach(), optimizer.state[p]])


@pytest.mark.parametrize(("kind", "implementation", "settings"), MATRIX)
def test_effective_gradient_is_what_the_stock_optimizer_averages_and_squares(kind, implementation, settings):
    optimizer, parameters = make(kind, implementation, settings)
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
