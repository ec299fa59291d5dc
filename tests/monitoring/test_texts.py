"""What the text page and the page of hyperparameters say of a run."""

import torch

from lightning_step import SRSTE, STEP, AtStep, Layerwise, Sparsifier
from lightning_step.monitoring.texts import hyperparameters, panel


def driver(recipe, **arguments):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    return Sparsifier(model, torch.optim.AdamW(model.parameters()), recipe=recipe, total_steps=10, **arguments)


def test_switches_of_several_optimizers_are_told_apart():
    text = panel([driver(SRSTE()), driver(SRSTE(), exclude=["1"])])
    assert "- optimizer 0, optimizer step 0: masks on (2 tensors); fixed step reached" in text
    assert "- optimizer 1, optimizer step 0: masks on (1 tensor); fixed step reached" in text
    assert "not yet" not in text


def test_a_window_that_cannot_fill_is_said():
    assert "- the switch averages 1000 optimizer steps but may wait for 5 at most" in panel([driver(STEP())])


def test_hyperparameters_are_numbers_and_strings_whatever_the_recipe_holds():
    values = hyperparameters([driver(Layerwise(STEP(AtStep(3))), overrides={"0": (1, 4)})])
    assert {type(value) for value in values.values()} <= {str, int, float}
    assert values["sparsity/pattern"] == "1:4, 2:4"
    assert values["sparsity/recipe"] == "Layerwise"
    assert values["sparsity/recipe/recipe"] == "STEP"
    assert values["sparsity/recipe/recipe/switch/step"] == 3
