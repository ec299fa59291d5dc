"""What is saved, and what does not fit. That a resumed run equals the undisturbed one is in recipes/test_contract.py."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_step import ASP, SRSTE, STEP, AtStep, AutoSwitch, Dense, NMPattern, Sparsifier, SwitchEvent, find_targets
from lightning_step.errors import ResumeError
from lightning_step.recipes import describe
from lightning_step.resume import STATE_VERSION, brief, check_config, check_version, config_of


def start(recipe, n=2, m=4, **arguments):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = AdamW(model.parameters(), lr=0.01)
    return model, optimizer, Sparsifier(model, optimizer, n, m, recipe=recipe, total_steps=20, **arguments)


def train(model, optimizer, steps, begin=0):
    for t in range(begin, steps):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(t))
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_after(steps, recipe, **arguments):
    model, optimizer, sparsifier = start(recipe, **arguments)
    train(model, optimizer, steps)
    return model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()


RECIPES = [Dense(), SRSTE(), ASP(AtStep(6)), STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=6))]
DECIDED = STEP(AtStep(4))


# What is saved ------------------------------------------------------------------------------------------------------


def is_plain(value):
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return all(map(is_plain, value)) if type(value) is list else type(value) in (int, float, str, bool, type(None))


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 9])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_a_state_is_never_empty_plain_and_comes_back_from_a_file(recipe, steps):
    *_, state = state_after(steps, recipe, measure_every=1)
    assert is_plain(state)
    assert (state["version"], state["t"]) == (1, steps)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state


def test_what_a_state_says():
    *_, dense = state_after(2, DECIDED)
    *_, sparse = state_after(6, DECIDED, measure_every=3)
    config = {"recipe": describe(DECIDED), "patterns": {"0.weight": [2, 4, 1], "2.weight": [2, 4, 1]}}
    patterns = {"0.weight": [2, 4], "2.weight": [2, 4]}
    assert dense == {
        "version": 1, "config": config, "t": 2, "masks": False, "frozen": [], "events": [], "flip_rate": None,
        "open": {role: {"samples": [], "taken": 0} for role in ("masks", "freeze")},
        "patterns": {"began": None, "now": patterns, "final": patterns, "leak": 0.0},
    }  # fmt: skip
    event = {
        "step": 4,
        "masks": True,
        "freeze": True,
        "rule": "fixed step reached",
        "numbers": "step 4",
        "what": "2 tensors",
    }
    flip_rate = sparse.pop("flip_rate")
    assert 0 <= flip_rate < 0.2
    assert sparse == {
        "version": 1, "config": config, "t": 6, "masks": True, "open": {},
        "frozen": ["0.weight", "2.weight"], "events": [event],
        "patterns": {"began": 4, "now": patterns, "final": patterns, "leak": 0.0},
    }  # fmt: skip
    assert SwitchEvent(**event) == SwitchEvent(4, True, True, "fixed step reached", "step 4", "2 tensors")


def test_saving_does_not_change_what_is_saved():
    model, optimizer, sparsifier = start(RECIPES[-1])
    train(model, optimizer, 5)
    first = copy.deepcopy(sparsifier.state_dict())
    second = sparsifier.state_dict()
    assert first == second
    second["open"]["freeze"]["samples"].clear()  # a copy, not the watcher's own list
    assert sparsifier.state_dict() == first


# What does not fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [STATE_VERSION + 1, 0, None, "1"])
def test_another_version_is_refused(version):
    *_, state = state_after(1, DECIDED)
    state["version"] = version
    message = rf"^Expected a state of version 1, but got version {version!r}\. Resume with the lightning-step that wrote"
    with pytest.raises(ResumeError, match=message):
        start(DECIDED)[2].load_state_dict(state)
    with pytest.raises(ResumeError, match=r"but got version None\. "):
        check_version({})


def test_another_recipe_is_refused_and_both_are_shown():
    *_, state = state_after(1, SRSTE(lam=0.5))
    message = r"^Expected the recipe of the checkpoint, SRSTE\(lam=0\.5\), but got ASP\(at=AtStep\(step=3\)\)\. Resume"
    with pytest.raises(ResumeError, match=message):
        start(ASP(AtStep(3)))[2].load_state_dict(state)
    with pytest.raises(ResumeError, match=r"SRSTE\(lam=0\.5\), but got SRSTE\(lam=0\.25\)"):
        start(SRSTE(lam=0.25))[2].load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (
            {"n": 1},
            r"0\.weight was 2:4 along dim 1, is 1:4 along dim 1; 2\.weight was 2:4 along dim 1, is 1:4 along dim 1\. ",
        ),
        ({"m": 8}, r"0\.weight was 2:4 along dim 1, is 2:8 along dim 1; 2\.weight"),
        (
            {"exclude": ["0"]},
            r"others: 0\.weight was 2:4 along dim 1, is dense\. Resume with the same n, m, include, exclude",
        ),
        ({"overrides": {"2": (1, 4)}}, r"others: 2\.weight was 2:4 along dim 1, is 1:4 along dim 1\. Resume"),
    ],
    ids=str,
)
def test_another_pattern_is_refused_and_both_are_shown(arguments, difference):
    *_, state = state_after(1, Dense())
    with pytest.raises(ResumeError, match=rf"^Expected the patterns of the checkpoint, but got .*{difference}"):
        start(Dense(), **arguments)[2].load_state_dict(state)


def test_a_tensor_that_was_dense_is_shown_and_long_lists_are_cut():
    *_, state = state_after(1, Dense(), exclude=["0"])
    with pytest.raises(ResumeError, match=r"0\.weight was dense, is 2:4 along dim 1\. "):
        start(Dense())[2].load_state_dict(state)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    saved, current = (config_of(Dense(), find_targets(model, NMPattern(n, 4)).masked) for n in (1, 2))
    with pytest.raises(ResumeError, match=r"2\.weight was 1:4 along dim 1, is 2:4 along dim 1; and 2 more\. Resume"):
        check_config(saved, current)


def test_a_refused_state_changes_nothing():
    *_, state = state_after(6, DECIDED)
    sparsifier = start(STEP(AtStep(3)))[2]
    before = sparsifier.state_dict()
    with pytest.raises(ResumeError, match="Expected the recipe"):
        sparsifier.load_state_dict(state)
    assert sparsifier.state_dict() == before


def test_phase_two_without_the_optimizer_state_is_refused():
    weights, moments, state = state_after(6, DECIDED)
    model, optimizer, sparsifier = start(DECIDED)
    model.load_state_dict(weights)
    sparsifier.load_state_dict(state)
    message = (
        r"^Expected the optimizer to hold the preconditioner of '0\.weight' \(and 1 more\), .* written in phase II.*Load the"
    )
    with pytest.raises(ResumeError, match=message):
        sparsifier.check_restored()
    optimizer.load_state_dict(moments)
    sparsifier.check_restored()
    assert sparsifier.frozen == ["0.weight", "2.weight"]


@pytest.mark.parametrize(("recipe", "steps"), [(DECIDED, 2), (SRSTE(), 6), (ASP(AtStep(3)), 6), (Dense(), 6)], ids=str)
def test_without_a_frozen_moment_the_optimizer_state_is_not_missed(recipe, steps):
    *_, state = state_after(steps, recipe)
    sparsifier = start(recipe)[2]
    sparsifier.load_state_dict(state)
    sparsifier.check_restored()
    assert sparsifier.t == steps


def test_a_frozen_parameter_that_is_not_there_is_refused():
    *_, state = state_after(6, DECIDED)
    state["frozen"].append("lost.weight")
    with pytest.raises(
        ResumeError, match=r"^Expected the frozen parameters of the checkpoint .* got none named \['lost\.weight'\]"
    ):
        start(DECIDED)[2].load_state_dict(state)


# Descriptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, DECIDED, STEP(masks_from=AtStep(0), scope="all", max_step=0.5)], ids=str)
def test_a_recipe_is_shown_as_one_would_write_it(recipe):
    assert brief(describe(recipe)) == repr(recipe)


@pytest.mark.parametrize("value", [None, 1, "SRSTE", [1, 2]])
def test_what_is_no_recipe_is_shown_as_it_is(value):
    assert brief(value) == repr(value)
