"""Rates of single parameters: the same as groups of their own would give, and nothing of it is left after a step."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, MaskDecay, RateScale, Sparsifier, StructureDecay
from lightning_step.errors import ArgumentTypeError, ConfigurationError, OptimizerError
from lightning_step.rates import StepRates

OPTIMIZERS = {
    "SGD": lambda groups, lr: SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1),
    "AdamW, for-loop": lambda groups, lr: AdamW(groups, lr=lr, foreach=False),
    "AdamW, foreach": lambda groups, lr: AdamW(groups, lr=lr, foreach=True),
    "AdamW, fused": lambda groups, lr: AdamW(groups, lr=lr, fused=True),
    "AdamW, rate in a tensor": lambda groups, lr: AdamW(groups, lr=torch.tensor(lr), foreach=False),
    "Adam, amsgrad": lambda groups, lr: Adam(groups, lr=lr, amsgrad=True, weight_decay=0.1),
    "NAdam": lambda groups, lr: NAdam(groups, lr=lr),
    "RAdam": lambda groups, lr: RAdam(groups, lr=lr),
    "RMSprop": lambda groups, lr: RMSprop(groups, lr=lr),
    "Adagrad": lambda groups, lr: Adagrad(groups, lr=lr),
}
with_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def fit(model, optimizer, inputs, schedule=None):
    for x in inputs:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def trained(make, recipe, *, by_hand, lr=0.02, steps=12, n=2, m=4, factor=2.0):
    """The weights after a run in which masked tensors have ``factor`` times the rate, through groups or through a recipe."""
    model = network()
    masked = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    if by_hand:
        rate = torch.tensor(lr * factor) if "tensor" in str(make([torch.zeros(1)], lr).defaults["lr"]) else lr * factor
        groups = [{"params": masked, "lr": rate}, {"params": others}]
    else:
        groups = list(model.parameters())
    optimizer = make(groups, lr)
    Sparsifier(model, optimizer, n, m, recipe=recipe, total_steps=steps)
    fit(model, optimizer, batches(steps))
    return [p.detach().clone() for p in model.parameters()]


@with_optimizers
def test_a_recipe_trains_as_groups_made_by_hand_would(make):
    for own, theirs in zip(
        trained(make, RateScale(SRSTE(lam=1e-2), ramp=0), by_hand=False),
        trained(make, SRSTE(lam=1e-2), by_hand=True),
        strict=True,
    ):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "Adam" in name])
def test_a_frozen_second_moment_gets_the_same_rate(name):
    recipe = STEP(AtStep(6), lam=1e-2, masks_from=AtStep(0))
    own = trained(OPTIMIZERS[name], RateScale(recipe, ramp=0), by_hand=False)
    theirs = trained(OPTIMIZERS[name], recipe, by_hand=True)
    for one, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)  # a rate that is a tensor rounds


@with_optimizers
def test_it_makes_a_difference(make):
    scaled, plain = (trained(make, recipe, by_hand=False) for recipe in (RateScale(STE(), ramp=0), STE()))
    assert not torch.equal(scaled[0], plain[0])


def test_masks_that_are_off_leave_the_rate_alone():
    recipe = STEP(AtStep(12), lam=1e-2)
    own = trained(OPTIMIZERS["AdamW, fused"], RateScale(recipe, ramp=0), by_hand=False, steps=12)
    theirs = trained(OPTIMIZERS["AdamW, fused"], recipe, by_hand=False, steps=12)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


class Watched(SGD):
    """Notes its rates and counts its steps in a group, as some optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.rates, self.fails = [], False
        self.param_groups[0]["k"] = 0

    def step(self, closure=None):
        self.rates.append({round(group["lr"], 6): len(group["params"]) for group in self.param_groups})
        if self.fails:
            raise RuntimeError("out of memory")
        for group in self.param_groups:
            group["k"] += 1
        return super().step(closure)


def watched(recipe, total=8, n=1, m=4):
    model = network()
    optimizer = Watched(model.parameters(), lr=0.01)
    return model, optimizer, Sparsifier(model, optimizer, n, m, recipe=recipe, total_steps=total)


def test_rates_follow_the_pattern_and_how_far_masks_have_come_on():
    model, optimizer, _ = watched(RateScale(StructureDecay(STE(), end=4), ramp=0))
    fit(model, optimizer, batches(6))
    masked = [max(rates) for rates in optimizer.rates]
    assert masked == pytest.approx([0.01 * 4 / 3, 0.01 * 4 / 3, 0.02, 0.02, 0.04, 0.04], abs=1e-6)

    model, optimizer, _ = watched(RateScale(MaskDecay(STE(), end=4), ramp=0))
    fit(model, optimizer, batches(5))
    shares = [0.25 + 0.75 * leak for leak in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert [max(rates) for rates in optimizer.rates] == pytest.approx([0.01 / share for share in shares], abs=1e-6)


def test_the_rate_rises_from_when_masks_begin():
    model, optimizer, _ = watched(RateScale(ASP(AtStep(2)), power=0.5, ramp=4), total=10)
    fit(model, optimizer, batches(10))
    rises = [0.01 * 4 ** (0.5 * share) for share in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1)]
    assert [max(rates) for rates in optimizer.rates] == pytest.approx(rises, abs=1e-6)
    model, optimizer, _ = watched(RateScale(STE(), ramp=0.5), total=8)
    fit(model, optimizer, batches(6))
    assert [max(rates) for rates in optimizer.rates] == pytest.approx(
        [0.01 * 4**share for share in (0, 0.25, 0.5, 0.75, 1, 1)], abs=1e-6
    )


def test_a_ramp_that_is_a_fraction_of_nobody_knows_what_is_refused_at_once():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"because ramp=0.2 is a fraction of it, but got an unlimited run"):
        Sparsifier(model, optimizer, recipe=RateScale(STE()))
    assert type(model[0]) is nn.Linear
    Sparsifier(model, optimizer, recipe=RateScale(STE(), ramp=10))
    for ramp in (-1, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match="Expected `ramp` to be a step >= 0"):
            RateScale(STE(), ramp=ramp)
    with pytest.raises(ArgumentTypeError, match="Expected `ramp` to be an integer"):
        RateScale(STE(), ramp="10")


def test_what_an_optimizer_writes_into_its_groups_is_kept_and_the_groups_are_its_own_again():
    model, optimizer, _ = watched(RateScale(STE(), ramp=0))
    [group] = optimizer.param_groups
    fit(model, optimizer, batches(3))
    assert [group] == optimizer.param_groups
    assert optimizer.param_groups[0] is group
    assert group["k"] == 3
    assert group["lr"] == 0.01
    assert len(group["params"]) == 6


def test_after_a_step_that_failed_the_groups_come_back():
    model, optimizer, sparsifier = watched(RateScale(STE(), ramp=0))
    fit(model, optimizer, batches(1))
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(model, optimizer, batches(1))
    sparsifier.detach()
    assert len(optimizer.param_groups) == 1
    optimizer.fails = False
    model, optimizer, sparsifier = watched(RateScale(STE(), ramp=0))
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(model, optimizer, batches(1))
    optimizer.fails = False
    fit(model, optimizer, batches(1))  # without anybody's help, too
    assert optimizer.rates[-1] == {0.04: 3, 0.01: 3}
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "make",
    [lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), lambda o: OneCycleLR(o, 0.05, total_steps=8)],
    ids=["lambda", "1cycle"],
)
def test_schedulers_see_the_groups_and_rates_that_the_user_made(make):
    model, optimizer, _ = watched(RateScale(STE(), ramp=0))
    schedule = make(optimizer)
    other = SGD([torch.zeros(1)], lr=0.01, momentum=0.0)
    reference = make(other)
    for x in batches(6):
        fit(model, optimizer, [x], schedule)
        other.step()
        reference.step()
        assert schedule.get_last_lr() == reference.get_last_lr()
    assert len(set(map(str, optimizer.rates))) == 6


def test_checkpoints_do_not_know_of_it_and_a_resumed_run_goes_on_bit_for_bit():
    def start():
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.02)
        recipe = RateScale(STEP(AtStep(6), lam=1e-2, masks_from=AtStep(2)), ramp=4)
        return model, optimizer, Sparsifier(model, optimizer, 1, 4, recipe=recipe, total_steps=12)

    inputs = batches(12)
    whole, optimizer, _ = start()
    fit(whole, optimizer, inputs)
    for crash in (1, 4, 8):
        model, optimizer, sparsifier = start()
        fit(model, optimizer, inputs[:crash])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
        assert len(saved[1]["param_groups"]) == 1
        model, optimizer, sparsifier = start()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        sparsifier.load_state_dict(saved[2])
        fit(model, optimizer, inputs[crash:])
        for own, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            assert torch.equal(own, theirs)


def test_one_rate_for_all_is_refused_and_nothing_is_changed():
    model = network()
    optimizer = LBFGS(model.parameters())
    with pytest.raises(OptimizerError, match=r"^Expected an optimizer with a learning rate per .* group, but got LBFGS"):
        Sparsifier(model, optimizer, recipe=RateScale(STE(), ramp=0))
    assert type(model[0]) is nn.Linear


def test_without_factors_nothing_is_split():
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    groups = optimizer.param_groups
    rates = StepRates(optimizer)
    rates.begin({})
    assert optimizer.param_groups is groups
    rates.end()
    assert optimizer.param_groups is groups
