"""Guards of speed that no clock is needed for: operations, allocations, waits for a device, over the dense model's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, Sparsifier

LAYERS = 3
WIDTH = 64


class Counting(TorchDispatchMode):
    """Operations, and new tensors of the size of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.full = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_full(t)}
        result = func(*args, **(kwargs or {}))
        self.ops[func.overloadpacket.__name__] += 1
        made = [t for t in torch.utils._pytree.tree_leaves(result) if is_full(t)]
        self.full += sum(t.untyped_storage().data_ptr() not in given for t in made)
        return result


def is_full(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == WIDTH * WIDTH


def training_step(
    recipe: Any, at: int = 6, micro_batches: int = 1, width: int = WIDTH, layers: int = LAYERS, **settings: Any
) -> Callable[[], None]:
    """A training step of a model of some layers, which has taken others before."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    if recipe is not None:
        Sparsifier(model, optimizer, 2, 4, recipe=recipe, total_steps=1000, read_every=100)
    x = torch.randn(2, width)

    def step() -> None:
        for _ in range(micro_batches):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(at):
        step()
    return step


def counted(recipe: Any, **settings: Any) -> Counting:
    """What a step takes under a mode, where nothing is kept and bits are numbers."""
    step = training_step(recipe, **settings)
    with Counting() as counting:
        step()
    return counting


def called(recipe: Any, **settings: Any) -> Counter[str]:
    """The operations that a step really calls, those within others apart; over those of a dense step of stock."""
    found = []
    for each in (recipe, None):
        step = training_step(each, **settings)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:  # torch 2.11 warns without
            step()
        outer = [e.name for e in profiler.events() if not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
        found.append(Counter(name for name in outer if name.startswith("aten::")))
    return found[0] - found[1]


IMPLEMENTATIONS = [{"foreach": True}, {"foreach": False}, {"fused": True}]
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


SAMPLING = STEP(AutoSwitch(t_min=900, t_max=950))


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("recipe", [Dense(), STEP(AtStep(900)), SAMPLING], ids=["Dense", "STEP", "STEP that samples"])
def test_phase_one_is_a_dense_step_but_for_its_samples(recipe: Any, settings: dict[str, Any]) -> None:
    stock, ours = counted(None, **settings), counted(recipe, **settings)
    assert ours.full <= stock.full
    extra = ours.ops - stock.ops
    assert not any(extra[name] for name in WAITS), extra
    if recipe is not SAMPLING:
        assert not extra
        assert not called(recipe, **settings)


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize(
    ("recipe", "width", "once", "for_each"),
    [(SAMPLING, 64, 18, 12), (STEP(AtStep(2)), 64, 54, 9), (STEP(AtStep(2)), 256, 10, 76)],
    ids=["samples", "phase II, small layers", "phase II, large layers"],
)
def test_a_step_calls_no_more_than_it_did(
    recipe: Any, width: int, once: int, for_each: int, layers: int, settings: dict[str, Any]
) -> None:
    extra = called(recipe, width=width, layers=layers, **settings)
    assert sum(extra.values()) <= once + for_each * layers, extra


@pytest.mark.parametrize("settings", IMPLEMENTATIONS, ids=str)
def test_a_step_of_phase_two_keeps_no_more_than_masks_and_updates(settings: dict[str, Any]) -> None:
    stock, ours = counted(None, **settings), counted(STEP(AtStep(2)), **settings)
    extra = ours.ops - stock.ops
    # Step counts lie on the host here, and are read there.
    assert ours.ops["_local_scalar_dense"] <= LAYERS + 1, extra
    assert sum(extra[name] for name in WAITS[1:]) == 0, extra


@pytest.mark.parametrize("recipe", [STEP(AtStep(2)), SRSTE(), STE(), ASP(AtStep(2))], ids=["STEP", "SRSTE", "STE", "ASP"])
def test_no_recipe_waits_for_a_device_between_readings(recipe: Any) -> None:
    extra = counted(recipe, fused=True).ops
    assert extra["_local_scalar_dense"] <= LAYERS + 1, extra  # step counts, on the host
    assert not any(extra[name] for name in WAITS[1:]), extra


def test_the_optimizer_of_phase_two_takes_five_operations_where_stock_takes_more() -> None:
    weights = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(LAYERS)]
    optimizer = torch.optim.AdamW(weights, foreach=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    with Counting() as stock:
        optimizer.step()
    from lightning_step.optim import adapter_for

    adapter = adapter_for(optimizer)
    adapter.freeze(optimizer, weights, "adam")
    with Counting() as ours:
        adapter.step(optimizer, {weight: weight.grad for weight in weights if weight.grad is not None}, None)
    kernels = Counter({name: count for name, count in ours.ops.items() if name.startswith("_foreach")})
    assert kernels == {
        "_foreach_add_": 2,  # step counts, weights
        "_foreach_lerp_": 1,
        "_foreach_div": 1,
        "_foreach_clamp_max_": 1,
        "_foreach_clamp_min_": 1,
        "_foreach_mul_": 1,  # weight decay
    }
    assert sum(kernels.values()) < sum(count for name, count in stock.ops.items() if name.startswith("_foreach"))
    assert ours.full == LAYERS  # updates of one portion
    assert ours.ops["_local_scalar_dense"] <= LAYERS + 1  # step counts, on the host
