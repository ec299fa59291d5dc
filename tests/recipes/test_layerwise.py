"""Layer-wise n: chosen when masks begin, from the weights there are then, and never again."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Layerwise,
    NMPattern,
    Sparsifier,
    StructureDecay,
    export_model,
    nm_masks,
)
from lightning_step.errors import ArgumentTypeError, ConfigurationError, ResumeError
from lightning_step.export import accelerations, read_manifest
from lightning_step.functional import choices_of
from lightning_step.summary import format_targets

NAMES = ("0.weight", "2.weight", "4.weight")
FORMS = ["search", "magnitude", "erk"]
every_form = pytest.mark.parametrize("by", FORMS)


def deep_net():
    """Three layers whose groups of eight differ: one flat, one with one large weight in each, one between."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.sign_()
        model[2].weight.reshape(-1, 8)[:, 3].mul_(40)
    return model


def batch(t):
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(t))
    return x, x[:, :8].sin()


def train(model, stock, steps, start=0):
    for t in range(start, steps):
        x, y = batch(t)
        nn.functional.mse_loss(model(x), y).backward()
        stock.step()
        stock.zero_grad()


def run(recipe, n=2, m=8, model=None, **arguments):
    model = deep_net() if model is None else model
    stock = AdamW(model.parameters(), lr=0.01)
    return model, stock, Sparsifier(model, stock, n, m, recipe=recipe, total_steps=20, **arguments)


def chosen(sparsifier):
    return [target.pattern.n for target in sparsifier.targets.masked]


def kept(model, names=NAMES):
    weights = {f"{i}.weight": model[i].weight.detach() for i in (0, 2, 4)}
    return sum(int((weights[name] != 0).sum()) for name in names)


def loss_of_magnitude(model, patterns):
    """The objective of the search, by sorting."""
    total = 0.0
    for i, n in zip((0, 2, 4), patterns, strict=True):
        squares = model[i].weight.detach().double().square().reshape(-1, 8).sort(1, descending=True).values
        total += float(squares[:, n:].sum() / squares.sum())
    return total


# What is chosen -----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_budget_is_that_of_the_given_pattern(by, n):
    model, _, sparsifier = run(Layerwise(STE(), by=by), n)
    assert kept(model) <= (512 + 512 + 128) * n / 8
    assert kept(model) == sum(size * k // 8 for size, k in zip((512, 512, 128), chosen(sparsifier), strict=True))
    assert len(set(chosen(sparsifier))) > 1 or n == 1 or by == "erk"
    assert set(chosen(sparsifier)) <= set(choices_of(NMPattern(n, 8)))


@every_form
@pytest.mark.parametrize("budget", [1 / 8, 0.3, 0.7, 1.0])
def test_a_budget_of_its_own(by, budget):
    model, _, sparsifier = run(Layerwise(STE(), by=by, budget=budget))
    assert kept(model) <= budget * 1152 + 1e-6
    assert {1 / 8: [1, 1, 1], 1.0: [8, 8, 8]}.get(budget, chosen(sparsifier)) == chosen(sparsifier)


def test_the_search_finds_the_best_there_is():
    dense = deep_net()
    _, _, sparsifier = run(Layerwise(STE()))
    allowed = [
        patterns
        for patterns in itertools.product((1, 2, 4, 8), repeat=3)
        if sum(size * n // 8 for size, n in zip((512, 512, 128), patterns, strict=True)) <= 1152 * 2 / 8
    ]
    best = min(allowed, key=lambda patterns: loss_of_magnitude(dense, patterns))
    assert chosen(sparsifier) == list(best)
    assert chosen(sparsifier)[1] == 1  # one large weight in every group is all it needs


def test_what_counts_is_the_weight_when_masks_begin():
    at_once = run(Layerwise(STE(), by="magnitude"))[2]
    model, stock, later = run(Layerwise(STEP(AtStep(3)), by="magnitude"))
    train(model, stock, 2)
    assert chosen(later) == [2, 2, 2]  # not chosen yet: what the user gave
    with torch.no_grad():
        model[0].weight.copy_(deep_net()[2].weight.T.reshape(32, 16))  # now the first layer is the peaked one
        model[0].weight.reshape(-1, 8)[:, 1].mul_(1000)
        model[2].weight.sign_()
    train(model, stock, 5, 2)
    assert chosen(later)[:2] == [1, 2]
    assert chosen(at_once)[:2] == [2, 1]


def test_once_chosen_it_stays_whatever_weights_do():
    model, stock, sparsifier = run(Layerwise(SRSTE()))
    before = chosen(sparsifier)
    with torch.no_grad():
        model[0]._parameters["weight"].reshape(-1, 8)[:, 1].mul_(1000)
    train(model, stock, 4)
    assert chosen(sparsifier) == before == [mask.pattern.n for mask in nm_masks(model).values()]


def test_uses_shift_the_budget_to_where_weights_are_cheap():
    """The budget is of multiplications: counted here in the plainest way."""
    uses = {"*": 1, "0.*": 50}
    _, _, sparsifier = run(Layerwise(STE(), by="magnitude", uses=uses))
    spent = sum(size * u * n / 8 for size, u, n in zip((512, 512, 128), (50, 1, 1), chosen(sparsifier), strict=True))
    assert spent <= (512 * 50 + 512 + 128) * 2 / 8
    assert chosen(sparsifier)[0] <= 2
    assert chosen(sparsifier)[1:] == [8, 8]


def test_overrides_keep_their_m_and_share_the_budget():
    _, _, sparsifier = run(Layerwise(STE(), by="erk"), overrides={"4": (2, 4), "0": (3, 16)})
    assert [target.pattern.m for target in sparsifier.targets.masked] == [16, 8, 4]


@every_form
def test_tensors_of_zeros_and_tensors_that_are_no_numbers_are_no_obstacle(by):
    model = deep_net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[4].weight[0, 0] = math.nan
    _, _, sparsifier = run(Layerwise(STE(), by=by), model=model)
    assert kept(model) >= 0
    assert sum(s * n // 8 for s, n in zip((512, 512, 128), chosen(sparsifier), strict=True)) <= 1152 * 2 / 8


# What is told -------------------------------------------------------------------------------------------------------


def test_event_table_report_and_file_say_what_was_chosen(tmp_path):
    model, _, sparsifier = run(Layerwise(STE(), by="erk", budget=0.4), m=4)
    ns = chosen(sparsifier)
    (event,) = sparsifier.events
    counts = ", ".join(f"{ns.count(n)} of {n}:4" for n in sorted(set(ns)))
    assert event.what == f"3 tensors: {counts}"
    table = format_targets(sparsifier.targets)
    assert all(f"{n}:4" in table for n in ns)
    assert [row.pattern.n for row in accelerations(model)] == ns
    export_model(model, tmp_path / "a.safetensors")
    assert [entry.n for entry in read_manifest(tmp_path / "a.safetensors").sparse.values()] == ns


def test_an_event_that_is_not_about_masks_says_nothing_of_patterns():
    model, stock, sparsifier = run(Layerwise(STEP(AtStep(4), masks_from=AtStep(2)), by="erk"))
    train(model, stock, 5)
    masks, freeze = sparsifier.events
    assert ": " in masks.what
    assert freeze.what == "3 tensors"


# Resume -------------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize(
    "inner", [STE(), STEP(AtStep(4)), ASP(AtStep(4)), StructureDecay(STEP(AtStep(4)), end=12)], ids=repr
)
@pytest.mark.parametrize("crash", [2, 4, 7])
def test_a_resumed_run_keeps_what_was_chosen(by, inner, crash):
    recipe = Layerwise(inner, by=by)
    model, stock, sparsifier = run(recipe)
    train(model, stock, crash)
    states = copy.deepcopy([json.loads(json.dumps(sparsifier.state_dict())), model.state_dict(), stock.state_dict()])
    again, again_stock, resumed = run(recipe, model=other_net())  # from weights that would choose otherwise
    again.load_state_dict(states[1])
    again_stock.load_state_dict(states[2])
    resumed.load_state_dict(states[0])
    assert resumed.state_dict() == sparsifier.state_dict()
    for each in ((model, stock), (again, again_stock)):
        train(*each, 15, crash)
    assert chosen(resumed) == chosen(sparsifier)
    assert repr(nm_masks(again)) == repr(nm_masks(model))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def other_net():
    model = deep_net()
    with torch.no_grad():
        model[0].weight.reshape(-1, 8)[:, 1].mul_(1000)
        model[2].weight.sign_()
    return model


def test_a_second_run_on_the_same_model_chooses_anew():
    model, _, first = run(Layerwise(STE()))
    first.detach()
    assert len({mask.final for mask in nm_masks(model).values()}) > 1
    second = Sparsifier(model, SGD(model.parameters()), 2, 8, recipe=STE())
    assert {str(mask.final) for mask in nm_masks(model).values()} == {"2:8"}
    assert chosen(second) == [2, 2, 2]


def test_another_budget_is_another_recipe():
    state = run(Layerwise(STE(), budget=0.3))[2].state_dict()
    with pytest.raises(ResumeError, match=r"Layerwise\(.*budget=0\.3.*but got Layerwise\(.*budget=0\.4"):
        run(Layerwise(STE(), budget=0.4))[2].load_state_dict(state)


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_budget_below_one_weight_a_group_is_refused_before_the_model_is_touched():
    model = deep_net()
    message = (
        r"^Expected `budget` of Layerwise to leave every group one weight, 0\.125 of the dense cost .* but got 0\.1\. Raise"
    )
    with pytest.raises(ConfigurationError, match=message):
        run(Layerwise(STE(), budget=0.1), model=model)
    assert nm_masks(model) == {}


def test_a_tensor_without_uses_is_refused_by_name():
    with pytest.raises(
        ConfigurationError, match=r"name every masked tensor, but got none for '4\.weight' among \['0\.\*', '2"
    ):
        run(Layerwise(STE(), uses={"0.*": 1, "2.*": 1}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"by": "random"},
            ConfigurationError,
            r"Expected `by` to be one of \['search', 'magnitude', 'erk'\], but got 'random'",
        ),
        ({"budget": 0.0}, ConfigurationError, r"Expected 0 < `budget` <= 1, .* but got 0\.0"),
        ({"budget": 1.5}, ConfigurationError, r"Expected 0 < `budget` <= 1, .* but got 1\.5"),
        ({"budget": math.nan}, ConfigurationError, "Expected 0 < `budget` <= 1, .* but got nan"),
        ({"uses": [1.0]}, ArgumentTypeError, r"Expected `uses` to map globs to numbers, but got \[1\.0\]"),
        ({"uses": {"*": 0}}, ConfigurationError, r"Expected `uses\['\*'\]` > 0, .* but got 0"),
        ({"uses": {"*": "2"}}, ConfigurationError, r"Expected `uses\['\*'\]` > 0, .* but got '2'"),
    ],
)
def test_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Layerwise(STE(), **arguments)
