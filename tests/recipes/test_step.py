"""STEP against the algorithm written down a second time, and against stock Adam where the two must agree."""

import math

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from lightning_step import STEP, AtStep, AutoSwitch, Sparsifier, strip
from lightning_step.errors import ConfigurationError
from lightning_step.functional import adam_bound, preconditioned_step, preconditioner
from lightning_step.recipes import Freeze, GradientRule

IMPLEMENTATIONS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
MASKED = ["0.weight", "2.weight"]
ALL = ["0.weight", "0.bias", "2.weight", "2.bias"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


# The algorithm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", [Adam, AdamW])
@pytest.mark.parametrize("n", [1, 2])
def test_forty_steps_equal_the_algorithm_by_hand(net, train, by_hand, n, optimizer, implementation):
    model = net()
    decay = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    expected = by_hand.train(
        model, by_hand.adam(**decay, decoupled=optimizer is AdamW), 40, n, 4, masks_at=15, freeze_at=15, lam=0.03
    )
    stock = optimizer(model.parameters(), **decay, **implementation)
    sparsifier = Sparsifier(model, stock, n, 4, recipe=STEP(AtStep(15), lam=0.03))
    for t in range(40):
        train(model, stock, t + 1, t)
        assert_close(weights(model), expected[t])
    assert [str(event) for event in sparsifier.events] == [
        "optimizer step 15: masks on, second moment frozen (2 tensors); fixed step reached: step 15"
    ]


@pytest.mark.parametrize(
    ("recipe", "events", "by_hand_as"),
    [
        (STEP(AtStep(15), lam=0.0), [(15, 1, 1)], {"masks_at": 15, "freeze_at": 15}),
        (STEP(AtStep(15), lam=0.0, scope="all"), [(15, 1, 1)], {"masks_at": 15, "freeze_at": 15, "frozen": ALL}),
        (
            STEP(AtStep(12), lam=0.1, masks_from=AtStep(0)),
            [(0, 1, 0), (12, 0, 1)],
            {"masks_at": 0, "freeze_at": 12, "lam": 0.1},
        ),
        (
            STEP(AtStep(6), lam=0.1, masks_from=AtStep(9)),
            [(6, 0, 1), (9, 1, 0)],
            {"masks_at": 9, "freeze_at": 6, "lam": 0.1},
        ),
        (STEP(AtStep(0), lam=0.0), [(1, 1, 1)], {"masks_at": 1, "freeze_at": 1}),  # not before there is a v
    ],
    ids=["lam=0", "scope=all", "masks first", "freeze first", "at 0"],
)
def test_every_option_equals_the_algorithm_by_hand(net, train, by_hand, recipe, events, by_hand_as):
    model = net()
    expected = by_hand.train(model, by_hand.adam(), 25, **by_hand_as)
    stock = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    sparsifier = Sparsifier(model, stock, recipe=recipe)
    for t in range(25):
        train(model, stock, t + 1, t)
        assert_close(weights(model), expected[t])
    assert [(e.step, e.masks, e.freeze) for e in sparsifier.events] == events


@pytest.mark.parametrize("optimizer", [Adam, AdamW])
def test_the_step_after_the_switch_is_the_stock_one_with_v_held(net, batch, train, optimizer):
    (model, stock), (twin, live) = ((m, optimizer(m.parameters(), lr=0.01, weight_decay=0.1)) for m in (net(), net()))
    Sparsifier(model, stock, 4, 4, recipe=STEP(AtStep(7)))
    train(model, stock, 8)
    train(twin, live, 7)
    before = weights(twin)
    nn.functional.mse_loss(twin(batch(7)[0]), batch(7)[1]).backward()
    for parameter in twin.parameters():  # choose v so that the stock update brings its corrected value back to what it is
        grad = parameter.grad + (0.1 * parameter.detach() if optimizer is Adam else 0)
        held = live.state[parameter]["exp_avg_sq"] / (1 - 0.999**7) * (1 - 0.999**8)
        live.state[parameter]["exp_avg_sq"] = (held - 0.001 * grad**2) / 0.999
    live.step()
    for name in MASKED:
        assert_close(weights(model)[name], weights(twin)[name])
        assert (weights(model)[name] != before[name]).all()


def test_every_frozen_step_is_the_reference_step_under_a_schedule_of_rate_and_beta1(net, batch, train):
    (model, stock), (twin, live) = ((m, AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.95))) for m in (net(), net()))
    Sparsifier(model, stock, recipe=STEP(AtStep(5), lam=0.0))
    train(model, stock, 5)
    train(twin, live, 5)
    v = {name: live.state[p]["exp_avg_sq"] for name, p in twin.named_parameters()}
    schedule = torch.optim.lr_scheduler.OneCycleLR(stock, 0.05, total_steps=8)
    for t in range(5, 12):
        nn.functional.mse_loss(model(batch(t)[0]), batch(t)[1]).backward()
        (beta1, _), lr = stock.param_groups[0]["betas"], stock.param_groups[0]["lr"]
        expected = {
            name: preconditioned_step(
                p.detach(), p.grad, stock.state[p]["exp_avg"], preconditioner(v[name], 5, beta2=0.95), t,
                lr=lr, beta1=beta1, weight_decay=0.01, decoupled=True, max_step=adam_bound((beta1, 0.95)),
            )[0]
            for name, p in model.named_parameters() if name in MASKED
        }  # fmt: skip
        stock.step()
        stock.zero_grad()
        schedule.step()
        for name in MASKED:
            assert_close(weights(model)[name], expected[name])


def test_n_equal_to_m_is_adam_with_v_frozen(net, train, by_hand):
    model = net()
    expected = by_hand.train(model, by_hand.adam(), 30, 4, 4, freeze_at=10)  # no mask at all
    stock = Adam(model.parameters(), lr=0.01)
    Sparsifier(model, stock, 4, 4, recipe=STEP(AtStep(10), lam=0.5))
    train(model, stock, 30)
    assert_close(weights(model), expected[-1])


def test_a_switch_at_the_last_step_is_dense_training_and_one_shot_pruning(net, train, by_sorting):
    dense, model = net(torch.float32), net(torch.float32)
    train(dense, AdamW(dense.parameters(), lr=0.01), 10)
    stock = AdamW(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, stock, 1, 4, recipe=STEP(AtStep(1.0)), total_steps=10)
    train(model, stock, 9)
    assert sparsifier.phase == 1
    train(model, stock, 10, 9)
    assert sparsifier.phase == 2
    strip(model)
    for name, weight in weights(dense).items():
        expected = weight * by_sorting(weight, 1, 4) if name in MASKED else weight
        assert torch.equal(weights(model)[name], expected), name


# The preconditioner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "frozen"), [("masked", MASKED), ("all", ALL)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_what_is_frozen_never_changes_and_the_rest_lives(net, train, scope, frozen, implementation):
    model = net(torch.float32)
    stock = AdamW(model.parameters(), lr=0.01, **implementation)
    sparsifier = Sparsifier(model, stock, recipe=STEP(AtStep(5), scope=scope))

    def second_moments():
        return {name: stock.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}

    train(model, stock, 4)
    live = second_moments()
    train(model, stock, 5, 4)
    at_switch = second_moments()
    assert not any(torch.equal(at_switch[name], live[name]) for name in ALL)
    train(model, stock, 15, 5)
    assert sorted(sparsifier.frozen) == sorted(frozen)
    for name, now in second_moments().items():
        assert torch.equal(now, at_switch[name]) == (name in frozen), name
    assert {int(stock.state[p]["step"]) for p in model.parameters()} == {15}  # the counter goes on


@pytest.mark.parametrize(("form", "formula"), [("adam", lambda v, t: (v / (1 - 0.999**t)).sqrt() + 1e-8),
                                              ("paper", lambda v, t: (v + 1e-8).sqrt())])  # fmt: skip
def test_the_form_of_the_preconditioner(net, train, form, formula):
    model, twin = net(), net()
    stock, live = AdamW(model.parameters(), lr=0.01), AdamW(twin.parameters(), lr=0.01)
    Sparsifier(model, stock, recipe=STEP(AtStep(6), form=form))
    train(model, stock, 6)
    train(twin, live, 6)
    for name in ("0", "2"):
        parameter, other = model.get_submodule(name)._parameters["weight"], twin.get_submodule(name).weight
        assert_close(stock.state[parameter]["exp_avg_sq"], formula(live.state[other]["exp_avg_sq"], 6))


class Stream:
    """A linear map whose input column 0 is ``before`` until the switch and ``after`` from then on."""

    def __init__(self, recipe, before, after, **arguments):
        torch.manual_seed(0)
        self.model = nn.Linear(8, 4).double()
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, **arguments)
        self.sparsifier = Sparsifier(self.model, self.optimizer, 4, 4, recipe=recipe)
        self.largest_move = 0.0
        for t in range(30):
            x = torch.randn(16, 8, dtype=torch.float64)
            x[:, 0] *= before if t < 10 else after
            weight = self.model._parameters["weight"].detach().clone()
            (self.model(x) - x[:, :4].sin()).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if t >= 10:
                move = (self.model._parameters["weight"] - weight)[:, 0].abs().max()
                self.largest_move = max(self.largest_move, move.item())


STREAMS = {"no gradient before": (0.0, 1.0), "a tiny v before": (1e-5, 1.0), "1e4 times larger": (1e-2, 1e2)}


@pytest.mark.parametrize(("before", "after"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("max_step", [None, 0.5])
def test_a_coordinate_that_wakes_up_after_the_switch_moves_by_learning_rates(before, after, max_step):
    moved = Stream(STEP(AtStep(10), max_step=max_step), before, after).largest_move
    bound = 1e-3 * (adam_bound((0.9, 0.999)) if max_step is None else max_step)
    assert 0 < moved <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("before", "after"), STREAMS.values(), ids=STREAMS)
def test_without_bound_and_in_the_form_of_the_paper_it_blows_up(before, after):
    moved = Stream(STEP(AtStep(10), form="paper", max_step=math.inf), before, after).largest_move
    assert moved > 1e-3 * 100 * adam_bound((0.9, 0.999))


# The configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1e-9}, r"^Expected `lam` >= 0, but got -1e-09\. It pulls"),
        ({"lam": math.nan}, "^Expected `lam` >= 0, but got nan"),
        ({"scope": "some"}, r"^Expected `scope` to be one of \('masked', 'all'\), but got 'some'\.$"),
        ({"form": "mine"}, r"^Expected `form` to be one of \('adam', 'paper'\), but got 'mine'\.$"),
        ({"max_step": 0}, r"^Expected `max_step` > 0 \(learning rates\) or None, but got 0\.$"),
        ({"max_step": math.nan}, r"^Expected `max_step` > 0 \(learning rates\) or None, but got nan\.$"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        STEP(**arguments)


def test_the_three_answers():
    recipe = STEP(AtStep(3), lam=0.5, scope="all", form="paper", max_step=2.0)
    assert recipe.plan().masks == AtStep(3)
    assert recipe.plan().freeze == Freeze(AtStep(3), "all", "paper", 2.0)
    assert recipe.plan().gradient == GradientRule("straight_through", lam=0.5, fixed=False)
    assert STEP(AtStep(3), masks_from=AtStep(0)).plan().masks == AtStep(0)
    assert STEP() == STEP(AutoSwitch("arithmetic", None, None, 0.1, 0.5), 4e-3, None, "masked", "adam", None)
