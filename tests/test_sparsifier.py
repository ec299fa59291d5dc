"""The driver in loops as people write them: loss scaling, accumulation, closures, schedules, clipping."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from lightning_step import (
    ASP,
    SRSTE,
    STEP,
    AtStep,
    AutoSwitch,
    Concentration,
    Dense,
    MaskDecay,
    RateScale,
    Sparsifier,
    StructureDecay,
    SwitchEvent,
    default_recipe,
    nm_masks,
)
from lightning_step.errors import ResumeError

SWITCH = 5
STEPS = 11
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "SRSTE": SRSTE(lam=0.1),
    "STEP": STEP(AutoSwitch(window=4, threshold=1e-30, t_min=0, t_max=SWITCH), lam=0.1),
    "STEP for all": STEP(AtStep(SWITCH), scope="all"),
    "STEP that waits": STEP(AutoSwitch(window=99, threshold=1e-30, t_min=0, t_max=99), masks_from=AtStep(SWITCH)),
    "STEP that waits for drift": STEP(Concentration(1e-30, window=3, t_min=0, t_max=99), masks_from=AtStep(SWITCH)),
    "decays": StructureDecay(MaskDecay(SRSTE(lam=0.1), end=9), end=8),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
IMPLEMENTATIONS = {
    f"{cls.__name__}-{name}": (lambda p, cls=cls, how=how: cls(p, lr=0.01, weight_decay=0.1, **how))
    for cls in (Adam, AdamW)
    for name, how in {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items()
}
every_adam = pytest.mark.parametrize("make", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def make_net(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def loss_of(model, t, rows=slice(None)):
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(t), dtype=torch.float64)[rows]
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs(), x[:, 4]], dim=1)
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))


class Run:
    """A model, its optimizer and a recipe at work on them."""

    def __init__(self, recipe, make=IMPLEMENTATIONS["AdamW-foreach"], dtype=torch.float32, schedule=None, **arguments):
        self.model = make_net(dtype)
        self.optimizer = make(self.model.parameters())
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.sparsifier = Sparsifier(self.model, self.optimizer, recipe=recipe, read_every=1, **arguments)

    def train(self, steps, start=0):
        for t in range(start, steps):
            loss_of(self.model, t).backward()
            self.step()
        return self

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def masks(self):
        return torch.cat([(layer.weight != 0).flatten() for layer in (self.model[0], self.model[2])])


def assert_same(a, b, rtol=0.0, atol=0.0):
    """Weights, moments, samples, flips and events of two runs."""
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(dict(a.model.state_dict()), dict(b.model.state_dict()), **close)
    torch.testing.assert_close(a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"], **close)
    states = a.sparsifier.state_dict(), b.sparsifier.state_dict()
    torch.testing.assert_close(*(state["open"] for state in states), **close)
    assert (states[0]["flip_rate"], states[0]["t"]) == (states[1]["flip_rate"], states[1]["t"])
    events, others = ([(e["step"], e["masks"], e["freeze"], e["rule"]) for e in state["events"]] for state in states)
    assert events == others


# Loss scaling -------------------------------------------------------------------------------------------------------


def train_scaled(run, bad=(), unscale=False):
    """The data of the plain loop, with a bad batch before each step in ``bad``."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for t in range(STEPS):
        for poison in (*[True] * bad.count(t), False):
            scaler.scale(loss_of(run.model, t)).backward()
            if poison:
                run.model[2]._parameters["weight"].grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(run.optimizer)
            flip_rate = run.sparsifier.gauges().get("flip_rate")
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            assert not poison or run.sparsifier.gauges().get("flip_rate") == flip_rate
    assert scaler.get_scale() != 2.0**12  # it was at work
    return run


@every_recipe
@every_adam
@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scaling_changes_nothing_and_skipped_steps_are_none(recipe, make, unscale):
    plain = Run(recipe, make, measure_every=2).train(STEPS)
    assert plain.sparsifier.t == STEPS
    scaled = train_scaled(Run(recipe, make, measure_every=2), bad=(0, 2, 2, SWITCH - 1, SWITCH, 8), unscale=unscale)
    assert_same(plain, scaled)  # to the bit: scales are powers of two


# Accumulation, closures ---------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("k", [2, 4])
def test_accumulating_k_micro_batches_equals_one_batch(recipe, k):
    whole, parts = (Run(recipe, dtype=torch.float64, measure_every=1) for _ in range(2))
    for t in range(STEPS):
        loss_of(whole.model, t).backward()
        for i in range(k):
            (loss_of(parts.model, t, slice(i * 12 // k, (i + 1) * 12 // k)) / k).backward()
        whole.step()
        parts.step()
        assert_same(whole, parts, rtol=1e-5, atol=1e-13)
        assert torch.equal(whole.masks(), parts.masks())


@every_recipe
@every_adam
@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_equals_the_loop_without(recipe, make, as_keyword):
    loop, closures = Run(recipe, make, measure_every=1).train(STEPS), Run(recipe, make, measure_every=1)
    for t in range(STEPS):

        def closure(t=t):
            closures.optimizer.zero_grad()
            loss = loss_of(closures.model, t)
            loss.backward()
            return loss

        expected = loss_of(closures.model, t).item()
        loss = closures.optimizer.step(closure=closure) if as_keyword else closures.optimizer.step(closure)
        assert loss.item() == expected
    assert_same(loop, closures)


def test_a_step_without_any_gradient_is_none():
    run = Run(SRSTE(lam=0.1))
    before = copy.deepcopy(run.model.state_dict())
    run.optimizer.step()
    assert run.sparsifier.t == 0
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    run.model[2].bias.grad = torch.ones(4)  # one tensor has a gradient, and it is not a masked one
    run.optimizer.step()
    assert run.sparsifier.t == 1
    assert torch.equal(before["0.weight"], run.model.state_dict()["0.weight"])


# Schedules and clipping ---------------------------------------------------------------------------------------------


SCHEDULES = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=STEPS + 1
    ),  # beta1, too
}


@every_recipe
@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("first", ["schedule", "sparsifier"])
def test_a_schedule_and_clipping_equal_rates_and_gradients_set_by_hand(recipe, make_schedule, first):
    by_hand = Run(recipe, dtype=torch.float64)
    scheduled = Run(recipe, dtype=torch.float64, schedule=make_schedule if first == "schedule" else None)
    schedule = scheduled.schedule or make_schedule(scheduled.optimizer)
    other = AdamW([torch.zeros(1, requires_grad=True)], lr=0.01)
    other_schedule = make_schedule(other)
    for t in range(STEPS):
        loss_of(by_hand.model, t).backward()
        by_hand.optimizer.param_groups[0].update({key: other.param_groups[0][key] for key in ("lr", "betas")})
        norm = torch.cat([p.grad.flatten() for p in by_hand.model.parameters()]).norm()
        assert norm > 0.05
        for parameter in by_hand.model.parameters():
            parameter.grad *= 0.05 / (norm + 1e-6)
        by_hand.step()
        other.step()
        other_schedule.step()
        loss_of(scheduled.model, t).backward()
        torch.nn.utils.clip_grad_norm_(scheduled.model.parameters(), 0.05)
        scheduled.step()
        schedule.step()
    assert_same(by_hand, scheduled, rtol=1e-5, atol=1e-13)


@every_recipe
def test_gradients_are_still_there_after_the_step(recipe):
    run = Run(recipe)
    for t in range(STEPS):
        loss_of(run.model, t).backward()
        lam = recipe.plan().gradient.lam if run.sparsifier.phase == 2 else 0.0
        before = {name: (p.grad, p.grad.clone()) for name, p in run.model.named_parameters()}
        for name in ("0", "2"):
            latent = run.model.get_submodule(name)._parameters["weight"].detach()
            before[f"{name}.weight"][1].add_(lam * latent * ~nm_masks(run.model)[f"{name}.weight"].mask(latent))
        run.optimizer.step()
        for name, parameter in run.model.named_parameters():
            assert parameter.grad is before[name][0]
            torch.testing.assert_close(parameter.grad, before[name][1])
        run.optimizer.zero_grad()


# What it says and when it stops -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "in_phase_one", "in_phase_two"),
    [
        ("STEP", {"phase", "threshold", "variance_change"}, {"phase", "flip_rate"}),
        (
            "STEP that waits",
            {"phase", "threshold", "variance_change"},
            {"phase", "threshold", "variance_change", "flip_rate"},
        ),
        ("STEP for all", {"phase"}, {"phase", "flip_rate"}),
        ("ASP", {"phase"}, {"phase", "flip_rate"}),
    ],
)
def test_what_the_gauges_show_in_each_phase(name, in_phase_one, in_phase_two):
    run = Run(RECIPES[name], measure_every=1).train(2)
    assert (run.sparsifier.gauges().keys(), run.sparsifier.gauges()["phase"]) == (in_phase_one, 1.0)
    run.train(STEPS, 2)
    assert (run.sparsifier.gauges().keys(), run.sparsifier.gauges()["phase"]) == (in_phase_two, 2.0)


def test_detached_the_optimizer_is_the_stock_one_and_masks_stay():
    run = Run(SRSTE(lam=0.1), AdamW).train(3)
    run.sparsifier.detach()
    state = run.sparsifier.state_dict()
    loss_of(run.model, 0).backward()
    grad = run.model[0]._parameters["weight"].grad.clone()
    run.optimizer.step()
    assert torch.equal(run.model[0]._parameters["weight"].grad, grad)  # no term was added
    assert run.sparsifier.state_dict() == state
    assert int(run.masks().sum()) == 96


def test_without_a_recipe_it_is_the_default_with_masks_from_the_start_and_v_frozen_in_the_second_part():
    model = make_net()
    sparsifier = Sparsifier(model, AdamW(model.parameters()), total_steps=9)
    assert sparsifier.recipe == default_recipe() == RateScale(STEP(AutoSwitch(t_min=0.4), masks_from=AtStep(0)))
    assert (sparsifier.phase, sparsifier.frozen) == (2, [])


# Coming back to an earlier state ------------------------------------------------------------------------------------


def taken(run):
    """All that a resumed run needs, as three copies."""
    return [copy.deepcopy(part.state_dict()) for part in (run.model, run.optimizer, run.sparsifier)]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


def give_back(run, states):
    for part, state in zip((run.model, run.optimizer, run.sparsifier), states, strict=True):
        part.load_state_dict(copy.deepcopy(state))


@every_recipe
@pytest.mark.parametrize("steps", [2, SWITCH, 7])
def test_a_run_that_goes_back_to_an_earlier_state_repeats_itself(recipe, steps):
    run = Run(recipe, measure_every=1).train(steps)
    states = taken(run)
    expected = taken(run.train(STEPS, steps))
    give_back(run, states)
    assert run.sparsifier.phase == (2 if states[2]["masks"] else 1)
    assert run.sparsifier.events == [SwitchEvent(**event) for event in states[2]["events"]]
    assert same(taken(run.train(STEPS, steps)), expected)


@pytest.mark.parametrize("recipe", [RECIPES["STEP"], RECIPES["STEP for all"]], ids=["masked", "all"])
def test_a_loop_that_forgets_the_optimizers_state_is_stopped_before_the_first_resumed_step(recipe):
    weights, moments, state = taken(Run(recipe).train(STEPS))
    run = Run(recipe)
    run.model.load_state_dict(weights)
    run.sparsifier.load_state_dict(state)
    for _ in range(2):  # not only once
        with pytest.raises(ResumeError, match="Expected the optimizer to hold the preconditioner of '0"):
            run.train(1)
        assert all(torch.equal(weights[name], value) for name, value in run.model.state_dict().items())
    run.optimizer.load_state_dict(moments)
    assert run.train(1).sparsifier.t == STEPS + 1


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda state: state.update(version=99), ResumeError),
        (lambda state: state["config"].update(recipe={"type": "Dense"}), ResumeError),
        (lambda state: state["frozen"].append("lost.weight"), ResumeError),
        (lambda state: state["open"].update(freeze={}), KeyError),
        (lambda state: state["events"].append({"step": 3}), TypeError),
        (lambda state: state.update(t="many"), ValueError),
    ],
    ids=["version", "config", "frozen", "open", "events", "t"],
)
def test_a_state_that_cannot_be_loaded_changes_nothing(spoil, error):
    recipe = RECIPES["STEP that waits"]
    *_, state = taken(Run(recipe).train(STEPS))
    run = Run(recipe).train(2)
    before, masks = taken(run), repr(nm_masks(run.model))
    spoil(state)
    with pytest.raises(error):
        run.sparsifier.load_state_dict(state)
    assert (taken(run)[2], repr(nm_masks(run.model))) == (before[2], masks)
    expected = taken(Run(recipe).train(STEPS))
    assert same(taken(run.train(STEPS, 2)), expected)


# A switch that has nothing to freeze ----------------------------------------------------------------------------------


def blind(run):
    """A loss that the masked tensors do not reach; their gradients are zeros."""
    return sum((parameter * (parameter.ndim == 1)).sum() for parameter in run.model.parameters())


@pytest.mark.parametrize(("scope", "bias"), [("masked", True), ("all", False)])
def test_without_any_gradient_the_switch_waits_and_says_so_once(scope, bias):
    run = Run(STEP(AtStep(2), scope=scope), lambda p: AdamW(p, weight_decay=0.0))
    for parameter in run.model.parameters() if not bias else ():
        parameter.requires_grad_(parameter.ndim == 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            blind(run).backward()
            run.step()
    (warning,) = caught
    assert str(warning.message).startswith(
        "Expected a second moment above zero at the switch, but got zeros in all "
        f"{2 if scope == 'masked' else 4} tensors to freeze (the first is '0.weight') after optimizer step 2: "
    )
    assert "The switch waits" in str(warning.message)
    assert (run.sparsifier.phase, run.sparsifier.events) == (1, [])
    for parameter in run.model.parameters():
        parameter.requires_grad_(True)
    run.train(6, 4)
    assert [event.step for event in run.sparsifier.events] == [5]


def test_one_tensor_with_a_gradient_is_enough_for_the_switch_and_no_warning():
    run = Run(STEP(AtStep(2)))
    run.model[0]._parameters["weight"].requires_grad_(False)
    run.train(4)
    assert run.sparsifier.frozen == ["2.weight"]
    assert run.sparsifier.phase == 2


def test_a_driver_made_after_the_optimizer_was_restored_freezes_nothing_twice():
    recipe = STEP(AtStep(0))
    run = Run(recipe).train(4)
    assert run.sparsifier.events[0].step == 1  # the first step is needed: before it there is nothing to freeze
    weights, moments, state = taken(run)
    expected = taken(run.train(STEPS, 4))

    class Restored(Run):
        def __init__(self):
            self.model, self.schedule = make_net(), None
            self.model.load_state_dict(weights)
            self.optimizer = IMPLEMENTATIONS["AdamW-foreach"](self.model.parameters())
            self.optimizer.load_state_dict(moments)
            self.sparsifier = Sparsifier(self.model, self.optimizer, recipe=recipe, read_every=1)
            self.sparsifier.load_state_dict(state)

    assert same(taken(Restored().train(STEPS, 4)), expected)
