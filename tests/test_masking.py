"""All masks of one optimizer's tensors, against masks made by sorting Python lists."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_step import ASP, SRSTE, STE, AtStep, NMPattern, Recipe, Sparsifier, apply_nm_masks, masking, nm_masks
from lightning_step.errors import ConfigurationError
from lightning_step.functional import mask as masks_of_weights
from lightning_step.masking import MaskSet
from lightning_step.recipes import Plan

TWO_FOUR = NMPattern(2, 4)


def by_sorting(weight, n=2, m=4):
    """Boolean mask along the last dimension; the sort is stable, so equal magnitudes keep the lower place."""
    groups = weight.detach().reshape(-1, m).tolist()
    kept = [sorted(range(m), key=lambda i, group=group: -abs(group[i]))[:n] for group in groups]
    return torch.tensor([[i in places for i in range(m)] for places in kept]).reshape(weight.shape)


def two_layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))


def masks_of(recipe, pattern=TWO_FOUR, **selection):
    model = two_layers()
    targets = apply_nm_masks(model, pattern, enabled=False, **selection).masked
    return model, MaskSet(model, targets, nm_masks(model), recipe)


def latent(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_masks_are_off_until_they_begin_and_the_latent_weights_stay():
    model, masks = masks_of(STE())
    before = latent(model)
    assert not masks.enabled
    assert equal([layer.weight for layer in model], before)
    masks.begin(0)
    assert masks.enabled
    assert equal([layer.weight for layer in model], [w * by_sorting(w) for w in before])
    assert equal(latent(model), before)
    masks.enable(False, 0)
    assert equal([layer.weight for layer in model], before)


def test_a_fixed_mask_prunes_the_latent_weights_once():
    model, masks = masks_of(ASP())
    pruned = [w * by_sorting(w) for w in latent(model)]
    masks.enable(True, 0)  # what a resumed run does: the weights come from the checkpoint
    assert not equal(latent(model), pruned)
    masks.begin(0)
    assert equal(latent(model), pruned)


@pytest.mark.parametrize(("recipe", "through"), [(STE(), "straight_through"), (ASP(), "masked")])
def test_how_the_gradient_passes(recipe, through):
    model, masks = masks_of(recipe)
    masks.begin(0)
    model[0].weight.sum().backward()
    expected = torch.ones(8, 8) if through == "straight_through" else by_sorting(latent(model)[0]).float()
    assert torch.equal(next(model.parameters()).grad, expected)
    assert {mask.gradient for mask in nm_masks(model).values()} == {through}


def test_masks_left_over_from_an_earlier_run_are_switched_by_the_new_recipe():
    model = two_layers()
    targets = apply_nm_masks(model, TWO_FOUR, enabled=True).masked
    masks = MaskSet(model, targets, nm_masks(model), ASP())
    assert not masks.enabled
    assert equal([layer.weight for layer in model], latent(model))
    assert {mask.gradient for mask in nm_masks(model).values()} == {"masked"}


# The SR-STE term ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 1024.0])
@pytest.mark.parametrize("pattern", [TWO_FOUR, NMPattern(1, 4), NMPattern(4, 4)], ids=str)
def test_the_term_is_lam_times_what_the_mask_drops_in_the_scale_of_the_gradient(pattern, scale):
    model, masks = masks_of(SRSTE(lam=0.5), pattern)
    masks.begin(0)
    first, second = model.parameters()
    first.grad = torch.full_like(first, 2.0 * (scale or 1.0))  # the second has none and gets none
    masks.edit_gradients(None if scale is None else torch.tensor(scale))
    dropped = first.detach() * ~by_sorting(first, pattern.n)
    torch.testing.assert_close(first.grad / (scale or 1.0), 2.0 + 0.5 * dropped, rtol=1e-6, atol=0)
    assert second.grad is None


@pytest.mark.parametrize(
    ("recipe", "begin"), [(SRSTE(lam=0.5), False), (SRSTE(lam=0.0), True), (STE(), True), (ASP(), True)]
)
def test_without_masks_or_strength_gradients_are_left_alone(recipe, begin):
    model, masks = masks_of(recipe)
    if begin:
        masks.begin(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    masks.edit_gradients(None)
    assert equal([parameter.grad for parameter in model.parameters()], before)


# Around a step ------------------------------------------------------------------------------------------------------


def test_the_flip_rate_is_the_share_of_entries_that_changed():
    model, masks = masks_of(STE())
    masks.begin(0)
    before = [by_sorting(w) for w in latent(model)]
    masks.before_step(measure=True)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    changed = sum(int((b != by_sorting(w)).sum()) for b, w in zip(before, latent(model), strict=True))
    assert 0 < changed < 96
    assert masks.after_step(1) == changed / 96
    masks.before_step(measure=True)
    assert masks.after_step(2) == 0.0


@pytest.mark.parametrize("recipe", [STE(), SRSTE(lam=0.1), ASP(AtStep(4))], ids=["STE", "SRSTE", "ASP"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_flip_rate_of_a_run_is_that_of_the_masks_seen_from_outside(recipe, every):
    model, rate, seen = two_layers(), None, set()
    optimizer = AdamW(model.parameters(), lr=0.02)
    sparsifier = Sparsifier(model, optimizer, recipe=recipe, measure_every=every)
    for t in range(12):
        before, phase = [layer.weight != 0 for layer in model], sparsifier.phase
        (model(torch.randn(16, 8)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if phase == 2 and (t + 1) % every == 0:
            rate = sum(int((b != (layer.weight != 0)).sum()) for b, layer in zip(before, model, strict=True)) / 96
            seen.add(rate)
        assert sparsifier.gauges().get("flip_rate") == rate
    assert any(seen) == (not recipe.plan().gradient.fixed)


@pytest.mark.parametrize("recipe", [STE(), ASP()])
@pytest.mark.parametrize(("begin", "measure"), [(False, True), (True, False), (False, False)])
def test_nothing_is_measured_unasked_or_before_masks(recipe, begin, measure):
    model, masks = masks_of(recipe)
    if begin:
        masks.begin(0)
    masks.before_step(measure=measure)
    next(model.parameters()).data.neg_().add_(1.0)
    with torch.no_grad():
        assert masks.after_step(1) is None


def test_a_measured_step_says_of_every_tensor_what_flipped_and_what_is_kept():
    model, masks = masks_of(STE())
    assert masks.density == 1.0
    masks.begin(0)
    assert masks.density == sum(k.sum() for k in map(by_sorting, latent(model))) / sum(w.numel() for w in latent(model))
    before = [by_sorting(w) for w in latent(model)]
    for t, measure in ((1, True), (2, False)):
        masks.before_step(measure=measure)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn_like(parameter))
        with torch.no_grad():
            masks.after_step(t)
        after = [by_sorting(w) for w in latent(model)]
        if measure:
            rates = [float((one != other).double().mean()) for one, other in zip(before, after, strict=True)]
            assert list(masks.flip_rates.values()) == pytest.approx(rates)
        for name, weight, kept in zip(masks.parameters, latent(model), after, strict=True):
            pair = [float(weight[kept].abs().sum()), float(weight.abs().sum())]
            assert masks.kept_magnitude(name).tolist() == pytest.approx(pair, rel=1e-5), (t, name)


def test_masks_that_begin_within_a_step_are_not_compared_with_none():
    _, masks = masks_of(STE())
    masks.before_step(measure=True)
    masks.begin(1)
    assert masks.after_step(1) is None


def test_a_fixed_mask_is_held_whatever_the_step_does():
    model, masks = masks_of(ASP())
    masks.begin(0)
    kept = [by_sorting(w) for w in latent(model)]
    masks.before_step(measure=True)
    stepped = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), stepped, strict=True):
        parameter.data.copy_(value)
    with torch.no_grad():
        assert masks.after_step(1) == 0.0
    assert equal(latent(model), [value * k for value, k in zip(stepped, kept, strict=True)])


# A recipe whose pattern changes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Narrowing(Recipe):
    """3:4 at first, then what the tensor is to end with."""

    def plan(self):
        return Plan(AtStep(2), pattern=self.narrow)

    def narrow(self, name, pattern, moment):
        return NMPattern(3, 4) if moment.t < 4 and name == "0.weight" else pattern


def kept_per_group(model):
    return [int((layer.weight.reshape(-1, 4) != 0).sum(1).max()) for layer in model]


def test_the_pattern_of_every_tensor_follows_the_recipe_step_by_step():
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, 1, 4, recipe=Narrowing())
    for expected in ([4, 4], [4, 4], [3, 1], [3, 1], [1, 1], [1, 1]):
        assert kept_per_group(model) == expected
        resumed = two_layers()
        Sparsifier(resumed, SGD(resumed.parameters()), 1, 4, recipe=Narrowing()).load_state_dict(sparsifier.state_dict())
        assert kept_per_group(resumed) == expected
        model(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# A fixed mask and exact zeros ---------------------------------------------------------------------------------------


class Clamping(SGD):
    """A proximal optimizer: its step ends with many exact zeros."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(min=0.0)
        return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fixed_mask_survives_kept_weights_that_become_exactly_zero(dtype):
    model = two_layers().to(dtype)
    optimizer = Clamping(model.parameters(), lr=0.5)
    sparsifier = Sparsifier(model, optimizer, recipe=ASP(AtStep(2)))
    masks, zeros = [], 0
    for _ in range(8):
        model(torch.randn(4, 8, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if sparsifier.phase == 2:
            masks.append([mask.mask(w) for mask, w in zip(nm_masks(model).values(), latent(model), strict=True)])
            assert all(equal([kept], [weight != 0]) for kept, weight in zip(masks[-1], latent(model), strict=True))
            zeros = sum(int((w == torch.finfo(dtype).smallest_normal).sum()) for w in latent(model))
    assert zeros
    assert all(equal(masks[0], later) for later in masks)


def test_pruning_a_tensor_of_zeros_keeps_the_places_of_lowest_index():
    model = two_layers()
    nn.init.zeros_(model[0].weight)
    _, masks = model, MaskSet(model, apply_nm_masks(model, TWO_FOUR, enabled=False).masked, nm_masks(model), ASP())
    masks.begin(0)
    kept = model[0].weight != 0
    assert torch.equal(kept, torch.tensor([True, True, False, False] * 2).expand(8, 8))
    assert float(model[0].weight.detach().max()) < 1e-37


# A model that was left in the middle --------------------------------------------------------------------------------


def test_a_model_left_in_the_middle_of_a_changing_pattern_starts_anew_or_goes_on():
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = Sparsifier(model, optimizer, 1, 4, recipe=Narrowing())
    for _ in range(3):
        model(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    first.detach()
    state = first.state_dict()
    assert kept_per_group(model) == [3, 1]
    assert apply_nm_masks(model, NMPattern(1, 4)).masked  # the same masks: they stay as they are
    assert kept_per_group(model) == [3, 1]
    second = Sparsifier(model, optimizer, 1, 4, recipe=Narrowing())
    assert kept_per_group(model) == [4, 4]
    second.load_state_dict(state)
    assert kept_per_group(model) == [3, 1]


def test_a_model_left_in_the_middle_is_refused_under_another_final_pattern():
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, 3, 4, recipe=STE()).detach()
    nm_masks(model)["0.weight"].pattern = NMPattern(4, 4)
    with pytest.raises(ConfigurationError, match=r"'0.weight' .*the pattern 2:4 along dim 1, but got 3:4 .*Call `strip"):
        Sparsifier(model, optimizer, 2, 4, recipe=STE())


@pytest.mark.parametrize(("shapes", "calls"), [([(8, 8)] * 4, 0), ([(8, 8), (8, 4), (4, 8), (8, 4), (4, 8)], 1)])
def test_a_mask_that_is_made_by_itself_has_no_other_weight_looked_at(shapes, calls, monkeypatch):
    monkeypatch.setitem(masks_of_weights.SMALL, "cpu", 32)
    prepare, seen = masking.prepare_masks, []
    monkeypatch.setattr(masking, "prepare_masks", lambda pairs: seen.append(len(pairs)) or prepare(pairs))
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes))
    Sparsifier(model, AdamW(model.parameters()), recipe=SRSTE(), total_steps=10)
    model(torch.ones(1, 8))
    assert seen == [len(shapes)] * calls
