"""Readings in a plain loop; every scalar of a Lightning run is compared in tests/callbacks/test_monitor.py."""

import pytest
import torch

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, Sparsifier
from lightning_step.monitoring.measure import looks, measure

RECIPES = [Dense(), ASP(AtStep(2)), STE(), SRSTE(), STEP(AtStep(2))]


def train(sparsifier, model, steps, batch=4):
    for _ in range(steps):
        model(torch.randn(batch, 8)).square().sum().backward()
        sparsifier.optimizer.step()
        sparsifier.optimizer.zero_grad()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_measuring_changes_nothing(recipe):
    def weights(watched):
        torch.manual_seed(3)
        model = torch.nn.Linear(8, 4)
        sparsifier = Sparsifier(model, torch.optim.Adam(model.parameters()), recipe=recipe, measure_every=1)
        for _ in range(4):
            train(sparsifier, model, 1)
            if watched:
                measure([sparsifier])
        return [*model.parameters(), *(s["exp_avg_sq"] for s in sparsifier.optimizer.state.values())]

    assert all(torch.equal(one, other) for one, other in zip(weights(True), weights(False), strict=True))


@pytest.mark.parametrize("recipe", [ASP(AtStep(1)), STE(), SRSTE()], ids=lambda recipe: type(recipe).__name__)
def test_an_optimizer_whose_second_moment_nobody_reads_has_no_norms(recipe):
    model = torch.nn.Linear(8, 4)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=recipe, measure_every=1)
    train(sparsifier, model, 3)
    (reading,) = measure([sparsifier])
    assert list(reading.scalars) == ["phase", "flip_rate", "density", "kept_magnitude", "lr"]
    assert list(reading.layers["weight"]) == ["flip_rate", "kept_magnitude"]


def test_measured_steps_share_their_masks_and_others_make_their_own():
    """Between two measured steps a reading must not be that of the last one."""
    model = torch.nn.Linear(8, 4)
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters(), lr=0.1), recipe=SRSTE(), measure_every=2)
    for t in range(1, 6):
        train(sparsifier, model, 1)
        weight = dict(model.named_parameters())["weight"].detach().abs()
        expected = weight.reshape(-1, 4).topk(2, dim=1).values.sum() / weight.sum()
        assert measure([sparsifier])[0].scalars["kept_magnitude"] == pytest.approx(float(expected), rel=1e-5), t


def test_a_tensor_without_any_gradient_counts_as_zeros():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 4), torch.nn.Linear(8, 12)

        def forward(self, x):
            return self.used(x)

    model = Two()
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), recipe=SRSTE())
    train(sparsifier, model, 2)
    (reading,) = measure([sparsifier])
    assert reading.layers["unused.weight"]["v_l1"] == 0
    assert reading.scalars["v_near_zero"] == 0.75


def test_the_norm_of_a_tiny_moment_does_not_vanish():
    model = torch.nn.Linear(8, 4)
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), recipe=SRSTE())
    train(sparsifier, model, 1)
    sparsifier.optimizer.state[dict(model.named_parameters())["weight"]]["exp_avg_sq"].fill_(1e-30)
    assert measure([sparsifier])[0].scalars["v_l2"] == pytest.approx(32**0.5 * 1e-30, rel=1e-4)


def test_the_rate_is_that_of_the_group_that_holds_masked_tensors_tensor_or_not():
    model = torch.nn.Linear(8, 4)
    groups = [{"params": [model.bias], "lr": 5.0}, {"params": [model.weight], "lr": torch.tensor(0.25)}]
    sparsifier = Sparsifier(model, torch.optim.AdamW(groups), recipe=SRSTE())
    assert measure([sparsifier])[0].scalars["lr"] == 0.25


def test_what_is_looked_at_lies_in_the_optimizer_and_the_model():
    model = torch.nn.Linear(8, 4)
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), recipe=STEP(AtStep(2)), total_steps=9)
    train(sparsifier, model, 1)
    weight = dict(model.named_parameters())["weight"]
    (look,) = looks(sparsifier)
    assert look.weight.data_ptr() == weight.data_ptr()
    assert look.v is sparsifier.optimizer.state[weight]["exp_avg_sq"]
    assert look.near_zero == pytest.approx(1e-8**2 * 0.001)
    before = look.v.clone()
    train(sparsifier, model, 1)
    (frozen,) = looks(sparsifier)
    assert frozen.near_zero is None
    assert frozen.v.mean() == pytest.approx(float(before.mean()), rel=10), "v, not its root"
