"""The compiled step. Its graph is run as it is here; one test compiles for real."""

import copy
import logging

import pytest
import torch

from lightning_step import compiling
from lightning_step.compiling import VARIABLE, compiled
from lightning_step.optim import adapter_for, kernel
from lightning_step.optim.kernel import LEAST, TOGETHER, _step, worth_compiling

KINDS = {
    "Adam": ("Adam", {}),
    "Adam, coupled": ("Adam", {"weight_decay": 0.1, "maximize": True, "amsgrad": True}),
    "AdamW": ("AdamW", {"weight_decay": 0.1, "maximize": True}),
    "AdamW, tensor lr": ("AdamW", {"weight_decay": 0.1, "lr": torch.tensor(0.01)}),
    "NAdam": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ("RAdam", {"weight_decay": 0.1}),
}
SHAPES = [(8, 40), (8, 40), (8, 40), (40, 8), (6, 10, 5, 2), (64,), (3, 300), (2, 5)]


@pytest.fixture
def graphs(monkeypatch):
    """Compiles tensors from 64 weights on, and counts the graphs."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(kernel, "LEAST", 64)
    monkeypatch.setattr(kernel, "_kernel", compiled(_step, backend=backend))
    yield found
    torch._dynamo.reset()


def frozen(kind, dtype=torch.float32):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    weights[4].data = weights[4].data.to(memory_format=torch.channels_last)
    name, settings = KINDS[kind]
    optimizer = getattr(torch.optim, name)(weights, **copy.deepcopy({"lr": 0.01, **settings}))
    for _ in range(8):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    adapter = adapter_for(optimizer)
    assert adapter.freeze(optimizer, weights, "adam") == weights
    return optimizer, adapter, weights


def steps(optimizer, adapter, weights, times, max_step=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for i in range(times):
        scale = 30.0 if i == 2 else 1.0  # one step that meets the bound
        grads = {w: (torch.randn(w.shape, generator=generator) * scale).to(w) for w in weights}
        grads = {w: grad.to(memory_format=torch.channels_last) if grad.dim() == 4 else grad for w, grad in grads.items()}
        adapter.step(optimizer, grads, max_step)
    return [[weight.detach(), dict(optimizer.state[weight])] for weight in weights]


@pytest.mark.parametrize(("kind", "max_step"), list(zip(KINDS, [None, 0.5, float("inf")] * 2, strict=True)))
def test_it_takes_the_eager_step_within_rounding_by_one_graph_for_one_tensor_and_one_for_several(
    kind, max_step, graphs, monkeypatch
):
    ours = steps(*frozen(kind), 12, max_step)
    assert len(graphs) == 2
    assert TOGETHER == 4  # as many as there are of one size
    monkeypatch.setenv(VARIABLE, "0")
    theirs = steps(*frozen(kind), 12, max_step)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["AdamW", "NAdam", "RAdam"])
def test_step_counts_that_stay_on_the_device_give_the_same(kind, graphs, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    theirs = steps(*frozen(kind), 6)
    monkeypatch.setenv(VARIABLE, "1")
    for module in ("adam", "nadam", "radam"):
        monkeypatch.setattr(f"lightning_step.optim.{module}.on_host", lambda states: False)
    ours = steps(*frozen(kind), 6)
    assert graphs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float64, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_in_another_dtype_a_step_is_at_least_as_exact_as_the_eager_one(dtype, ulps, graphs, monkeypatch):
    errors = {}
    for wish in "01":
        monkeypatch.setenv(VARIABLE, wish)
        optimizer, adapter, weights = frozen("AdamW", dtype)
        wide = copy.deepcopy([[w.detach().double(), optimizer.state[w]["exp_avg"].double()] for w in weights])
        roots = [optimizer.state[w]["exp_avg_sq"].double() for w in weights]
        grads = [torch.randn(w.shape, dtype=torch.float64).to(dtype) for w in weights]
        adapter.step(optimizer, dict(zip(weights, grads, strict=True)), None)
        errors[wish] = 0.0
        for w, (weight, first), root, grad in zip(weights, wide, roots, grads, strict=True):
            first = 0.9 * first - 0.1 * grad.double()
            update = (first / (1 - 0.9**9) / root).clamp(-(10**0.5), 10**0.5)
            exact = weight * (1 - 0.01 * 0.1) - 0.01 * update
            relative = (w.detach().double() - exact).abs() / exact.abs().clamp_min(0.1)
            errors[wish] = max(errors[wish], float(relative.max()))
    assert graphs
    assert errors["1"] <= ulps * torch.finfo(dtype).eps
    assert errors["1"] <= errors["0"] * 1.5


def test_tensors_of_one_size_share_a_call_and_no_size_compiles_anew(graphs, monkeypatch):
    monkeypatch.setattr(kernel, "TOGETHER", 2)
    calls = []
    inner = kernel._kernel
    monkeypatch.setattr(kernel, "_kernel", lambda *lists: (calls.append([len(w) for w in lists[0]]), inner(*lists))[1])
    steps(*frozen("AdamW"), 1)
    assert calls == [[64], [320, 320], [320, 320], [600], [900]]
    steps(*frozen("NAdam"), 1)  # other numbers, the same graphs
    assert len(graphs) == 2


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(graphs):
    whole = frozen("AdamW")
    steps(*whole, 5)
    optimizer, adapter, weights = frozen("AdamW")
    steps(optimizer, adapter, weights, 5)
    state = copy.deepcopy([optimizer.state_dict(), [w.detach() for w in weights]])
    torch._dynamo.reset()  # another process would compile anew
    twin, adapter, twins = frozen("AdamW")
    twin.load_state_dict(state[0])
    for w, value in zip(twins, state[1], strict=True):
        w.data.copy_(value)
    ours, theirs = steps(twin, adapter, twins, 4, seed=2), steps(*whole, 4, seed=2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(graphs) == 4


def test_a_gradient_that_is_not_finite_reaches_the_weight_as_in_the_eager_step(graphs, monkeypatch):
    found = []
    for wish in "10":
        monkeypatch.setenv(VARIABLE, wish)
        optimizer, adapter, weights = frozen("AdamW")
        grads = {w: torch.ones_like(w) for w in weights}
        grads[weights[0]][0, 0] = torch.nan
        adapter.step(optimizer, grads, None)
        found.append(weights[0].detach())
    assert found[0][0, 0].isnan()
    torch.testing.assert_close(*found, equal_nan=True)


BIG = [torch.empty(1024, 1024, device="meta") for _ in range(4)]


@pytest.mark.parametrize(
    ("wish", "fused", "place", "tensors", "expected"),
    [
        (None, False, "cpu", 4, False),
        (None, True, "cpu", 4, True),
        (None, True, "cpu", 3, False),
        (None, None, "cpu", 4, False),
        ("0", True, "cpu", 4, False),
        ("1", False, "cpu", 1, True),
        ("1", True, "meta", 4, False),
    ],
)
def test_it_is_for_fused_optimizers_where_it_pays_and_for_whoever_asks(
    wish, fused, place, tensors, expected, monkeypatch, caplog
):
    monkeypatch.setattr(kernel, "_told", [])
    monkeypatch.delenv(VARIABLE, raising=False)
    if wish is not None:
        monkeypatch.setenv(VARIABLE, wish)
    given = [torch.empty(1).expand(1024, 1024) if place == "cpu" else BIG[i] for i in range(tensors)]
    with caplog.at_level(logging.INFO, "lightning_step"):
        assert [worth_compiling({"fused": fused}, given) for _ in range(2)] == [expected] * 2
    lines = [record.getMessage() for record in caplog.records]
    told = "compiling the preconditioned step of 4,194,304 weights (fused=True; LIGHTNING_STEP_COMPILE=0 keeps it eager)"
    assert lines == [told] * (expected and wish is None)


def test_small_tensors_are_never_worth_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    assert not worth_compiling({"fused": True}, [torch.empty(LEAST - 1)] * 9)
    assert worth_compiling({"fused": True}, [torch.empty(LEAST)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_compiled_by_the_real_compiler_it_is_still_the_same_step(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "_failures", set())
    results = []
    for wish in "10":
        monkeypatch.setenv(VARIABLE, wish)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(LEAST // 32 + 1, 33))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        adapter = adapter_for(optimizer)
        adapter.freeze(optimizer, [weight], "adam")
        versions = weight._version, optimizer.state[weight]["exp_avg"]._version
        steps(optimizer, adapter, [weight], 3)
        # Whoever keeps something of a weight sees that it has changed.
        assert weight._version >= versions[0] + 3
        assert optimizer.state[weight]["exp_avg"]._version >= versions[1] + 3
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)
    torch._dynamo.reset()
    assert compiling._failures == set()
