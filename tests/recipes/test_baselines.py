"""Dense, ASP, STE and SR-STE against the same written down a second time, under any torch optimizer."""

import math

import pytest
import torch
from torch import nn
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense, Sparsifier, nm_masks, strip
from lightning_step.errors import ArgumentTypeError, ConfigurationError, OptimizerError
from lightning_step.recipes import GradientRule

IMPLEMENTATIONS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
ADAM = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
MASKED = ("0.weight", "2.weight")
every_implementation = pytest.mark.parametrize("how", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def assert_follows(model, stock, train, expected):
    for t, after in enumerate(expected):
        train(model, stock, t + 1, t)
        assert_close(weights(model), after)


# The recipes --------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("optimizer", [Adam, AdamW])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("recipe", "lam"), [(STE(), 0.0), (SRSTE(lam=0.05), 0.05)], ids=["STE", "SRSTE"])
def test_forty_steps_of_ste_under_adam(net, train, by_hand, recipe, lam, n, optimizer, how):
    model = net()
    adam = by_hand.adam(**ADAM, decoupled=optimizer is AdamW)
    expected = by_hand.train(model, adam, 40, n, 4, masks_at=0, lam=lam)
    stock = optimizer(model.parameters(), **ADAM, **how)
    Sparsifier(model, stock, n, 4, recipe=recipe)
    assert_follows(model, stock, train, expected)


@every_implementation
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_forty_steps_of_srste_under_momentum(net, train, by_hand, lam, how):
    model = net()
    expected = by_hand.train(model, by_hand.momentum(**MOMENTUM), 40, 2, 4, masks_at=0, lam=lam)
    stock = SGD(model.parameters(), **MOMENTUM, **how)
    Sparsifier(model, stock, recipe=SRSTE(lam=lam))
    assert_follows(model, stock, train, expected)


def test_srste_without_a_pull_is_ste(net, train):
    outcomes = []
    for recipe in (STE(), SRSTE(lam=0.0)):
        model = net()
        stock = AdamW(model.parameters(), lr=0.01)
        Sparsifier(model, stock, recipe=recipe)
        train(model, stock, 10)
        outcomes.append(weights(model))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in MASKED)


@every_implementation
@pytest.mark.parametrize("optimizer", [Adam, AdamW, SGD])
@pytest.mark.parametrize(("n", "at"), [(1, 15), (2, 15), (2, 0)])
def test_forty_steps_of_asp(net, train, by_hand, n, at, optimizer, how):
    model, arguments = net(), MOMENTUM if optimizer is SGD else ADAM
    by = by_hand.momentum(**MOMENTUM) if optimizer is SGD else by_hand.adam(**ADAM, decoupled=optimizer is AdamW)
    expected = by_hand.train(model, by, 40, n, 4, masks_at=at, fixed=True)
    stock = optimizer(model.parameters(), **arguments, **how)
    Sparsifier(model, stock, n, 4, recipe=ASP(AtStep(at)))
    for t in range(40):
        train(model, stock, t + 1, t)
        if t + 1 != at:  # right after the switch the package has pruned already, the oracle is about to
            assert_close(weights(model), expected[t])


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_asp_prunes_once_and_keeps_that_mask(net, train, by_sorting, optimizer):
    model, dense = net(torch.float32), net(torch.float32)
    arguments = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if optimizer is SGD else {})}
    train(dense, optimizer(dense.parameters(), **arguments), 6)
    stock = optimizer(model.parameters(), **arguments)
    Sparsifier(model, stock, recipe=ASP(AtStep(6)))
    train(model, stock, 6)
    kept = {name: by_sorting(weights(dense)[name], 2, 4).bool() for name in MASKED}
    for name in MASKED:
        assert torch.equal(weights(model)[name], weights(dense)[name] * kept[name])
    for t in range(6, 40):
        train(model, stock, t + 1, t)
        for name, mask in nm_masks(model).items():
            latent = weights(model)[name]
            assert torch.equal(latent != 0, kept[name]), t  # exact zeros, in the parameter itself
            assert torch.equal(mask.mask(latent), kept[name]), t


def test_ste_lets_pruned_weights_return(net, train):
    model = net()
    stock = AdamW(model.parameters(), lr=0.05)
    Sparsifier(model, stock, recipe=STE())
    first = (model[0].weight != 0).clone()
    train(model, stock, 20)
    assert ((model[0].weight != 0) & ~first).any()


# Any optimizer ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "Adagrad": lambda p: Adagrad(p, lr=0.05),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "ASGD": lambda p: ASGD(p, lr=0.05),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=2),
}


def fit_by_closure(model, stock, batch, steps):
    losses = []
    for _ in range(steps):

        def closure():
            stock.zero_grad()
            loss = nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1])
            loss.backward()
            return loss

        losses.append(stock.step(closure).item())
    return losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("recipe", [ASP(AtStep(3)), STE(), SRSTE(lam=0.01)], ids=["ASP", "STE", "SRSTE"])
def test_baselines_learn_under_any_optimizer(net, batch, recipe, make):
    model = net()
    stock = make(model.parameters())
    sparsifier = Sparsifier(model, stock, recipe=recipe)
    losses = fit_by_closure(model, stock, batch, 15)
    assert losses[-1] < 0.8 * losses[4]
    assert (sparsifier.t, sparsifier.phase) == (15, 2)
    assert sorted(strip(model)) == sorted(MASKED)
    assert all(((p.reshape(-1, 4) != 0).sum(1) == 2).all() for name, p in model.named_parameters() if name in MASKED)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_dense_is_the_stock_optimizer_whatever_it_is(net, batch, make):
    plain, model = net(), net()
    plain_losses = fit_by_closure(plain, make(plain.parameters()), batch, 8)
    stock = make(model.parameters())
    sparsifier = Sparsifier(model, stock, recipe=Dense())
    assert fit_by_closure(model, stock, batch, 8) == plain_losses
    assert all(torch.equal(weights(plain)[name], weights(model)[name]) for name in weights(plain))
    assert (sparsifier.phase, sparsifier.events, strip(model)) == (1, [], [])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("recipe", [STEP(AtStep(3)), ASP(AutoSwitch(t_max=9))], ids=["STEP", "ASP by samples"])
def test_who_reads_the_second_moment_refuses_strangers_by_name(net, recipe, make):
    model = net()
    stock = make(model.parameters())
    known = r"^Expected an optimizer with a registered second-moment adapter \(known: .*torch\.optim\.adamw\.AdamW"
    with pytest.raises(OptimizerError, match=rf"{known}.*\), but got torch\.optim\.\w+\.{type(stock).__name__}\..*SRSTE"):
        Sparsifier(model, stock, recipe=recipe, total_steps=9)
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]  # as it was


# The configuration --------------------------------------------------------------------------------------------------


def test_the_three_answers():
    assert [r.plan().masks for r in (Dense(), ASP(AtStep(7)), STE(), SRSTE())] == [None, AtStep(7), AtStep(0), AtStep(0)]
    assert [r.plan().freeze for r in (Dense(), ASP(), STE(), SRSTE())] == [None] * 4
    assert ASP().plan().gradient == GradientRule("masked", lam=0.0, fixed=True)
    assert STE().plan().gradient == Dense().plan().gradient == GradientRule("straight_through", lam=0.0, fixed=False)
    assert SRSTE(lam=0.5).plan().gradient == GradientRule("straight_through", lam=0.5, fixed=False)
    assert (ASP(), SRSTE()) == (ASP(AtStep(0.5)), SRSTE(2e-4))


@pytest.mark.parametrize("lam", [-1.0, math.nan])
def test_srste_refuses_a_push(lam):
    with pytest.raises(ConfigurationError, match=rf"^Expected `lam` >= 0, but got {lam}\. It pulls pruned weights"):
        SRSTE(lam=lam)


def test_half_of_an_unknown_number_of_steps_is_refused(net):
    model = net()
    with pytest.raises(ConfigurationError, match=r"because step=0\.5 is a fraction of it, but got an unlimited run"):
        Sparsifier(model, SGD(model.parameters(), lr=0.1), recipe=ASP())
    with pytest.raises(ArgumentTypeError, match=r"^Expected `step` to be an integer"):
        AtStep("half")
