"""What a driver needs to know before the first step."""

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
    AutoSwitch,
    Dense,
    NMPattern,
    RelativeNorm,
    Sparsifier,
    Staleness,
    apply_nm_masks,
    find_targets,
)
from lightning_step.errors import OptimizerError, TargetError
from lightning_step.masking import MaskSet, parameter_of
from lightning_step.optim import adapter_for
from lightning_step.parametrization import nm_masks
from lightning_step.recipes import Clock
from lightning_step.wiring import clock_of, frozen_step, held_by, needs_adapter, switches


def two_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (Dense(), False),
        (STE(), False),
        (SRSTE(), False),
        (ASP(AtStep(3)), False),
        (ASP(AutoSwitch()), True),
        (ASP(RelativeNorm()), True),
        (ASP(Staleness()), True),
        (STEP(AtStep(3)), True),
        (STEP(), True),
        (STEP(AtStep(3), masks_from=AtStep(0)), True),
    ],
    ids=str,
)
def test_who_needs_to_read_the_second_moment(recipe, needs):
    assert needs_adapter(recipe) == needs
    model = two_layers()
    if needs:
        with pytest.raises(OptimizerError, match="STEP has to read and freeze Adam's second moment"):
            Sparsifier(model, SGD(model.parameters(), lr=0.1), recipe=recipe, total_steps=9)
    else:
        assert Sparsifier(model, SGD(model.parameters(), lr=0.1), recipe=recipe).frozen == []


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Dense(), {}),
        (SRSTE(), {"masks": AtStep(0)}),
        (ASP(AtStep(3)), {"masks": AtStep(3)}),
        (STEP(AtStep(3)), {"masks": AtStep(3), "freeze": AtStep(3)}),
        (STEP(AtStep(3), masks_from=AtStep(0)), {"masks": AtStep(0), "freeze": AtStep(3)}),
    ],
    ids=str,
)
def test_what_each_switch_begins(recipe, expected):
    assert switches(recipe) == expected


# Tensors and optimizers ---------------------------------------------------------------------------------------------


def test_an_optimizer_that_holds_nothing_to_mask_is_refused():
    model = two_layers()
    message = r"^Expected the optimizer to hold at least one tensor to mask, but got none of 2 \(the first is '0\.weight'\)"
    for parameters in ([model[0].bias], two_layers().parameters()):
        with pytest.raises(TargetError, match=message):
            Sparsifier(model, AdamW(parameters))
    assert [type(module) for module in model] == [nn.Linear] * 2
    with pytest.raises(TargetError, match=r"all 4 parameters are left out"):
        Sparsifier(model, AdamW(model.parameters()), 2, 3)


def test_what_another_optimizer_holds_is_left_out_with_the_reason():
    model = two_layers()
    optimizer = SGD(model[1].parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, recipe=SRSTE())
    assert [target.name for target in sparsifier.targets.masked] == ["1.weight"]
    reasons = {entry.name: entry.reason for entry in sparsifier.targets.left_out}
    assert reasons.pop("0.weight") == "the optimizer does not hold it"
    assert set(reasons.values()) == {"1-D (a bias or a scale)"}
    assert {name: mask.enabled for name, mask in nm_masks(model).items()} == {"1.weight": True}
    assert int((model[0].weight != 0).sum()) == 64
    assert int((model[1].weight != 0).sum()) == 16


def test_two_optimizers_hold_one_half_each():
    model = two_layers()
    targets = find_targets(model, NMPattern(2, 4))
    halves = [held_by(SGD(module.parameters(), lr=0.1), model, targets) for module in model]
    assert [[target.name for target in half.masked] for half in halves] == [["0.weight"], ["1.weight"]]
    whole = held_by(SGD([{"params": [p]} for p in model.parameters()], lr=0.1), model, targets)
    assert whole == targets


def test_a_tied_tensor_is_held_once():
    model = two_layers()
    model.append(nn.Linear(8, 8))
    model[2].weight = model[0].weight
    targets = find_targets(model, NMPattern(2, 4))
    held = held_by(SGD(model[2].parameters(), lr=0.1), model, targets)
    assert [target.name for target in held.masked] == ["0.weight"]
    assert parameter_of(model, held.masked[0]) is model[2]._parameters["weight"]


def test_the_parameter_behind_a_target_is_the_latent_one():
    model = two_layers()
    parameters = dict(model.named_parameters())
    targets = apply_nm_masks(model, NMPattern(1, 4))
    for target in targets.masked:
        assert parameter_of(model, target) is parameters[target.name]
        assert (parameter_of(model, target) != 0).all()


# Clocks and frozen steps --------------------------------------------------------------------------------------------


def test_the_clock_takes_the_longest_memory_and_the_smallest_eps():
    model = two_layers()
    groups = [
        {"params": model[0].parameters(), "betas": (0.5, 0.99), "eps": 1e-6},
        {"params": model[1].parameters(), "betas": (0.9, 0.95), "eps": 1e-9},
    ]
    optimizer = AdamW(groups)
    assert clock_of(adapter_for(optimizer), optimizer, 70) == Clock(70, beta2=0.99, eps=1e-9)
    assert clock_of(None, optimizer, None) == Clock(None, None, None)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("masked", {"0.weight", "1.weight"}), ("all", {"0.weight", "0.bias", "1.weight", "1.bias", "param_groups[4]"})],
)
def test_the_scope_of_a_freeze(scope, expected):
    model, stranger = two_layers(), nn.Parameter(torch.ones(1))
    optimizer = AdamW([*model.parameters(), stranger])
    targets = apply_nm_masks(model, NMPattern(2, 4), enabled=False).masked
    masks = MaskSet(model, targets, nm_masks(model), STE())
    frozen = frozen_step(STEP(scope=scope), adapter_for(optimizer), optimizer, model, masks)
    assert frozen.names == []  # nothing yet
    (model(torch.ones(2, 8)).sum() + stranger).sum().backward()
    optimizer.step()
    assert set(frozen.freeze()) == set(frozen.names) == expected


def test_a_recipe_that_never_freezes_takes_no_frozen_steps():
    model = two_layers()
    optimizer = AdamW(model.parameters())
    assert frozen_step(STE(), adapter_for(optimizer), optimizer, model, None) is None
    assert frozen_step(STEP(), None, optimizer, model, None) is None


def test_a_wrapped_optimizer_is_refused_before_the_model_is_touched():
    model = two_layers()
    optimizer = AdamW(model.parameters())
    optimizer.optimizer = AdamW(model.parameters())
    with pytest.raises(OptimizerError, match="Expected the optimizer that steps, but got AdamW, a wrapper around AdamW"):
        Sparsifier(model, optimizer, recipe=SRSTE())
    assert nm_masks(model) == {}
