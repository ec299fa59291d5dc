"""What every recipe must keep to. A new recipe is one more line in `RECIPES`."""

import dataclasses
import gc
import io
import json
import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Concentration,
    Dense,
    DenseTail,
    Layerwise,
    MaskDecay,
    NMPattern,
    RateScale,
    Sparsifier,
    StructureDecay,
    default_recipe,
    export_model,
    nm_masks,
    strip,
)
from lightning_step.export import read_manifest
from lightning_step.recipes import Moment, RelativeNorm, Staleness, Wrapper, describe
from lightning_step.wiring import needs_adapter

RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(6)),
    "ASP by samples": ASP(AutoSwitch(window=3, threshold=1e-30, t_min=4, t_max=7)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(0.5), lam=1e-2),
    "STEP by samples": STEP(AutoSwitch(window=3, threshold=1.0, t_min=4, t_max=9)),
    "STEP geometric": STEP(AutoSwitch("geometric", window=3, threshold=1e-30, t_min=4, t_max=7)),
    "STEP relative norm": STEP(RelativeNorm(threshold=0.2, t_max=9)),
    "STEP staleness": STEP(Staleness(threshold=0.5, window=4, t_max=9)),
    "STEP for all": STEP(AtStep(6), scope="all"),
    "STEP masks first": STEP(AtStep(6), masks_from=AtStep(0)),
    "STEP of the paper": STEP(AtStep(6), form="paper", max_step=math.inf),
    "STEP by drift": STEP(Concentration(threshold=1e30, window=4, t_min=0, t_max=9)),
    "StructureDecay(ASP)": StructureDecay(ASP(AtStep(4)), end=8),
    "StructureDecay(STE)": StructureDecay(STE(), end=0.75),
    "StructureDecay(SRSTE)": StructureDecay(SRSTE(lam=1e-2), end=9, start=3),
    "StructureDecay(STEP)": StructureDecay(STEP(AtStep(4), lam=1e-2), end=10),
    "MaskDecay(STE)": MaskDecay(STE(), end=0.5),
    "MaskDecay(SRSTE)": MaskDecay(SRSTE(lam=1e-2), end=8, start=3),
    "MaskDecay(STEP)": MaskDecay(STEP(AtStep(4), lam=1e-2), end=1.0, fading="exponential"),
    "Layerwise(ASP)": Layerwise(ASP(AtStep(6)), by="erk"),
    "Layerwise(STE)": Layerwise(STE(), by="erk", budget=0.4),
    "Layerwise(SRSTE)": Layerwise(SRSTE(lam=1e-2), by="magnitude"),
    "Layerwise(STEP)": Layerwise(STEP(AtStep(6), lam=1e-2), uses={"0.*": 2.0, "2.*": 3.0}, budget=0.6),
    "DenseTail(ASP)": DenseTail(ASP(AtStep(4)), start=8),
    "DenseTail(STE)": DenseTail(STE(), start=0.75),
    "DenseTail(SRSTE)": DenseTail(SRSTE(lam=1e-2), start=6),
    "DenseTail(STEP)": DenseTail(STEP(AtStep(4), lam=1e-2), start=9),
    "RateScale(ASP)": RateScale(ASP(AtStep(6))),
    "RateScale(SRSTE)": RateScale(SRSTE(lam=1e-2), power=0.5),
    "RateScale(STEP)": RateScale(STEP(AtStep(6), lam=1e-2)),
    "default": default_recipe(),
    "everything at once": DenseTail(MaskDecay(Layerwise(StructureDecay(STEP(AtStep(4)), end=9), by="erk"), end=8), start=10),
}
STEPS = 12
MASKED = ("0.weight", "2.weight")
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def begins_dense(recipe):
    return recipe.plan().masks != AtStep(0)


def layers_decide(recipe):
    """Whether n is chosen layer by layer, so that nobody knows it beforehand."""
    return isinstance(recipe, Wrapper) and (isinstance(recipe, Layerwise) or layers_decide(recipe.recipe))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.fixture
def start(net):
    """A net, its optimizer, and a recipe at work on them."""

    def start(recipe, optimizer=AdamW, n=2, **arguments):
        model = net(torch.float32)
        stock = optimizer(model.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **arguments})
        return model, stock, Sparsifier(model, stock, n, 4, recipe=recipe, total_steps=STEPS, read_every=2, measure_every=3)

    return start


@every_recipe
@pytest.mark.parametrize("n", [1, 2, 4])
def test_masked_tensors_hold_the_pattern_after_strip(start, train, recipe, n):
    model, stock, sparsifier = start(recipe, n=n)
    train(model, stock, STEPS)
    assert sparsifier.phase == (1 if recipe.plan().masks is None else 2)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    final = {target.name: target.pattern.n for target in sparsifier.targets.masked}
    assert layers_decide(recipe) or set(final.values()) == {n}
    assert all(torch.isfinite(p).all() for p in dense.values())
    assert strip(model) == (list(MASKED) if sparsifier.phase == 2 else [])
    for name, parameter in model.named_parameters():
        masked = name in MASKED and sparsifier.phase == 2
        nonzeros = (parameter.reshape(-1, 4) != 0).sum(1)
        assert (nonzeros == (final[name] if masked else 4)).all(), name
        assert torch.equal(parameter, torch.where(parameter != 0, dense[name], 0.0)), name


@every_recipe
def test_a_forward_pass_sees_the_pattern_from_the_event_on(start, train, recipe):
    model, stock, sparsifier = start(recipe)
    for t in range(STEPS + 1):
        on = any(event.masks for event in sparsifier.events)
        groups = [(model[i].weight.reshape(-1, 4) != 0).sum(1) for i in (0, 2)]
        if isinstance(recipe, Wrapper) and on:  # what it should be is tested with each wrapper
            shown = [4 if mask.leak else mask.pattern.n for mask in nm_masks(model).values()]
        else:
            shown = [2 if on else 4] * 2
        fixed = recipe.plan().gradient.fixed and isinstance(recipe, Wrapper)  # what was zero is zero until its next step
        assert all(((group == n) | (fixed & (group < n))).all() for group, n in zip(groups, shown, strict=True))
        assert {mask.enabled for mask in nm_masks(model).values()} == {on}
        train(model, stock, t + 1, t)
    assert [event for event in sparsifier.events if event.masks or event.freeze] == sparsifier.events
    assert sum(event.masks for event in sparsifier.events) == (recipe.plan().masks is not None)
    assert sum(event.freeze for event in sparsifier.events) == (recipe.plan().freeze is not None)


def dense_cases():
    for name, recipe in RECIPES.items():
        for optimizer in (Adam, AdamW, SGD):
            for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
                if begins_dense(recipe) and not (optimizer is SGD and needs_adapter(recipe)):
                    yield pytest.param(recipe, optimizer, how, id=f"{name}, {optimizer.__name__} {how}")


@pytest.mark.parametrize(("recipe", "optimizer", "how"), [*dense_cases()])
def test_the_dense_phase_is_the_stock_optimizer_bit_for_bit(net, start, train, recipe, optimizer, how):
    arguments = {**how, **({"momentum": 0.9} if optimizer is SGD else {"amsgrad": True})}
    model, stock, sparsifier = start(recipe, optimizer, **arguments)
    plain = net(torch.float32)
    plain_stock = optimizer(plain.parameters(), lr=0.01, weight_decay=0.1, **arguments)
    for t in range(STEPS):
        train(plain, plain_stock, t + 1, t)
        train(model, stock, t + 1, t)
        if sparsifier.phase == 2:
            break
        assert same(plain.state_dict(), model.state_dict())
        assert same(plain_stock.state_dict(), stock.state_dict())
    assert t >= 3
    if not recipe.plan().gradient.fixed:  # the last dense step, too: only pruning touches a weight at the switch
        assert same(plain.state_dict(), model.state_dict())


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_recipe
@pytest.mark.parametrize(("optimizer", "how"), [(Adam, {"foreach": True}), (AdamW, {"fused": True})])
def test_resumed_equals_uninterrupted_bit_for_bit(start, train, recipe, optimizer, how):
    run = start(recipe, optimizer, **how)
    states = []
    for t in range(STEPS + 1):
        states.append(through_a_file([part.state_dict() for part in run]))
        train(*run[:2], t + 1, t)
    for crash in (0, 1, 3, 5, 6, 7, 9, 12):  # before, in the window, right before, at, and after the switches
        resumed = start(recipe, optimizer, **how)
        for part, state in zip(resumed, states[crash], strict=True):
            part.load_state_dict(state)
            assert same(part.state_dict(), state)
        resumed[2].check_restored()
        train(*resumed[:2], STEPS + 1, crash)
        for part, uninterrupted in zip(resumed, run, strict=True):
            assert same(part.state_dict(), uninterrupted.state_dict()), (crash, type(part))
        assert repr(nm_masks(resumed[0])) == repr(nm_masks(run[0]))
        assert resumed[2].events == run[2].events


def bytes_held(model, optimizer):
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def alive():
    """Counts the tensors of a size that were made in this test and are still there."""
    gc.collect()
    gc.freeze()  # what was there before is not looked at

    def alive(numel):
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) and thing.numel() == numel for thing in gc.get_objects())

    yield alive
    gc.unfreeze()


@every_recipe
def test_no_full_size_tensor_is_added_in_any_phase(net, start, train, recipe, alive):
    plain = net(torch.float32)
    plain_stock = AdamW(plain.parameters(), lr=0.01)
    train(plain, plain_stock, 1)
    bytes_of_plain, tensors_of_plain = bytes_held(plain, plain_stock), alive(16 * 8)
    assert tensors_of_plain >= 3  # the weight and its two moments are seen
    del plain, plain_stock
    model, stock, _ = start(recipe)
    for t in range(STEPS):
        train(model, stock, t + 1, t)
        assert bytes_held(model, stock) == bytes_of_plain, t
        assert alive(16 * 8) == tensors_of_plain, t
    assert list(model.buffers()) == []


@every_recipe
def test_it_is_a_frozen_value(recipe):
    (twin,) = [dataclasses.replace(recipe)]
    assert twin is not recipe
    assert (twin, hash(twin)) == (recipe, hash(recipe))
    assert [name for name, other in RECIPES.items() if other == recipe] == [n for n, r in RECIPES.items() if r is recipe]
    for field in [*dataclasses.fields(recipe), "anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
            setattr(recipe, getattr(field, "name", field), 1)


@every_recipe
def test_its_description_is_json_and_tells_it_from_the_others(recipe):
    described = describe(recipe)
    assert json.loads(json.dumps(described)) == described
    assert described["type"] == type(recipe).__name__
    assert [describe(other) for other in RECIPES.values()].count(described) == 1


@every_recipe
def test_what_is_exported_is_what_the_masks_show(start, train, recipe, tmp_path):
    model, stock, sparsifier = start(recipe, n=1)
    train(model, stock, STEPS)
    if sparsifier.phase == 2:
        export_model(model, tmp_path / "a.safetensors")
        held = {name: entry.n for name, entry in read_manifest(tmp_path / "a.safetensors").sparse.items()}
        assert held == {target.name: target.pattern.n for target in sparsifier.targets.masked}


@every_recipe
@pytest.mark.parametrize("pattern", [NMPattern(1, 4), NMPattern(2, 4)], ids=str)
def test_in_the_end_every_tensor_has_its_own_pattern(recipe, pattern):
    moment = Moment(STEPS, began=4, total_steps=STEPS)
    assert recipe.plan().pattern("0.weight", pattern, moment) == pattern
    assert recipe.plan().fade(moment) == 0
