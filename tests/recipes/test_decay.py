"""Structure decay, mask decay and the dense tail against the recipes written down a second time."""

import math
import re

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    DenseTail,
    MaskDecay,
    NMMask,
    NMPattern,
    Sparsifier,
    StructureDecay,
    nm_masks,
    strip,
)
from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.recipes import Moment, describe

STEPS, BEGIN, MASKED = 18, 4, ("0.weight", "2.weight")
WRAPPERS = [StructureDecay, MaskDecay, DenseTail]
INNER = {
    "STE": (STE(), {"masks_at": 0}),
    "SRSTE": (SRSTE(lam=0.05), {"masks_at": 0, "lam": 0.05}),
    "STEP": (STEP(AtStep(BEGIN), lam=0.05), {"masks_at": BEGIN, "freeze_at": BEGIN, "lam": 0.05}),
    "STEP, two events": (STEP(AtStep(7), lam=0.0, masks_from=AtStep(2)), {"masks_at": 2, "freeze_at": 7}),
    "ASP": (ASP(AtStep(BEGIN)), {"masks_at": BEGIN, "fixed": True}),
}
every_inner = pytest.mark.parametrize(("inner", "by_hand_of"), INNER.values(), ids=INNER)
alive = pytest.mark.parametrize(("inner", "by_hand_of"), [*INNER.values()][:4], ids=[*INNER][:4])


def check(net, train, by_hand, recipe, n=1, **written):
    """Every weight after every step, in float64."""
    model = net()
    stock = AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    sparsifier = Sparsifier(model, stock, 1, 4, recipe=recipe, total_steps=STEPS)
    expected = by_hand.train(net(), by_hand.adam(lr=0.02), STEPS, n=n, **written)
    for t in range(STEPS):
        train(model, stock, t + 1, t)
        if written.get("fixed") and t + 1 == written["masks_at"]:
            continue  # pruned at once, and by hand at the beginning of the next step
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[t][name], rtol=1e-8, atol=1e-10, msg=f"{name} at {t}")
    return model, sparsifier


# Against the recipe by hand -----------------------------------------------------------------------------------------


@every_inner
def test_structure_decay_equals_the_one_by_hand(net, train, by_hand, inner, by_hand_of):
    begin = by_hand_of["masks_at"]

    def n(t):
        """3:4, 2:4 and then 1:4, in two frames from the first mask to step 14."""
        return 3 if t < begin + (14 - begin) / 2 else 2 if t < 14 else 1

    model, _ = check(net, train, by_hand, StructureDecay(inner, end=14), n, **by_hand_of)
    assert {str(mask.pattern) for mask in nm_masks(model).values()} == {"1:4"}


@alive
@pytest.mark.parametrize("fading", ["linear", "exponential"])
def test_mask_decay_equals_the_one_by_hand(net, train, by_hand, inner, by_hand_of, fading):
    begin = by_hand_of["masks_at"]

    def leak(t):
        share = (t - begin) / (13 - begin)
        return 0.0 if share >= 1 else 1 - share if fading == "linear" else 0.01**share

    recipe = MaskDecay(inner, end=13, fading=fading, last=0.01)
    check(net, train, by_hand, recipe, leak=leak, **by_hand_of)


@alive
def test_a_dense_tail_equals_the_one_by_hand(net, train, by_hand, inner, by_hand_of):
    model, _ = check(net, train, by_hand, DenseTail(inner, start=12), lambda t: 4 if t >= 12 else 1, **by_hand_of)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {str(mask.pattern) for mask in nm_masks(model).values()} == {"1:4"}
    assert strip(model) == list(MASKED)
    for name in MASKED:
        largest = torch.zeros(dense[name].numel() // 4, 4).scatter_(
            1, dense[name].reshape(-1, 4).abs().argmax(1)[:, None], 1
        )
        assert torch.equal(dict(model.named_parameters())[name], dense[name] * largest.reshape(dense[name].shape))


@alive
def test_all_of_them_at_once_equal_the_one_by_hand(net, train, by_hand, inner, by_hand_of):
    def n(t):
        return 4 if t >= 15 else 3 if t < 8 else 2 if t < 10 else 1

    def leak(t):
        return 1.0 if t < 5 else max(0.0, 1 - (t - 5) / 8)

    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        kinds = [
            lambda recipe: StructureDecay(recipe, start=6, end=10),
            lambda recipe: MaskDecay(recipe, start=5, end=13),
            lambda recipe: DenseTail(recipe, start=15),
        ]
        recipe = inner
        for place in order:
            recipe = kinds[place](recipe)
        check(net, train, by_hand, recipe, n, leak=leak, **by_hand_of)


def test_a_weight_of_infinite_size_that_is_pruned_does_no_harm():
    """A product with the mask would make NaN of it."""
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, math.inf, 3.0, 2.0]])
    sparsifier = Sparsifier(model, SGD(model.parameters()), 1, 4, recipe=MaskDecay(STE(), end=4))
    (mask,) = nm_masks(model).values()
    assert mask.leak == 1
    assert torch.equal(model.weight, torch.tensor([[1.0, math.inf, 3.0, 2.0]]))
    mask.leak = 0.5
    assert torch.equal(model.weight, torch.tensor([[0.5, math.inf, 1.5, 1.0]]))
    sparsifier.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["straight_through", "masked"])
def test_a_fading_mask_rounds_once_and_leaves_what_it_keeps(dtype, gradient):
    mask = NMMask(NMPattern(2, 4), gradient=gradient)
    mask.leak = 0.3
    weight = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    shown, kept = mask(weight), mask.mask(weight)
    assert shown.dtype == dtype
    assert torch.equal(shown[kept], weight[kept])
    assert torch.equal(shown[~kept], (weight * 0.3)[~kept])
    shown.sum().backward()
    share = torch.ones_like(weight).masked_fill(~kept, 0.3 if gradient == "masked" else 1.0)
    assert torch.equal(weight.grad, share)


# When ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.75, 30])
def test_frames_begin_when_masks_do_whenever_that_is(end):
    rule = StructureDecay(STE(), end=end).plan().pattern
    for began in (0, 6, 12):
        shown = [rule("a", NMPattern(1, 8), Moment(t, began, 40)).n for t in range(began, 40)]
        length = 30 - began
        assert shown == [7] * (length // 3) + [4] * (length // 3) + [2] * (length // 3) + [1] * 10


def test_masks_that_begin_behind_the_end_have_their_own_pattern_at_once():
    for recipe in (StructureDecay(STE(), end=10), StructureDecay(STE(), end=0.25)):
        assert recipe.plan().pattern("a", NMPattern(1, 8), Moment(11, 11, 40)) == NMPattern(1, 8)
    assert MaskDecay(STE(), end=10).plan().fade(Moment(11, 11, 40)) == 0


def test_every_tensor_has_frames_of_its_own(train, net):
    model = net(torch.float32)
    stock = SGD(model.parameters(), lr=0.1)
    recipe = StructureDecay(STE(), end=8)
    Sparsifier(model, stock, 1, 8, recipe=recipe, overrides={"2": (2, 4)})
    seen = []
    for t in range(9):
        seen.append([str(mask.pattern) for mask in nm_masks(model).values()])
        train(model, stock, t + 1, t)
    assert seen == [["7:8", "3:4"]] * 3 + [["4:8", "3:4"]] * 3 + [["2:8", "3:4"]] * 2 + [["1:8", "2:4"]]


def test_masks_that_are_off_stand_for_the_pattern_to_come(net):
    """So that a one-shot export before masks begin prunes to n:m, not to the first frame."""
    model = net(torch.float32)
    Sparsifier(
        model, SGD(model.parameters(), lr=0.1), 1, 4, recipe=StructureDecay(MaskDecay(SRSTE(), end=9), end=9)
    ).detach()
    assert {str(mask.pattern) for mask in nm_masks(model).values()} == {"3:4"}
    model = net(torch.float32)
    stock = SGD(model.parameters(), lr=0.1)
    Sparsifier(model, stock, 1, 4, recipe=StructureDecay(ASP(AtStep(5)), end=9)).detach()
    assert {(str(mask.pattern), mask.enabled) for mask in nm_masks(model).values()} == {("1:4", False)}


def test_strip_leaves_what_the_model_computes_while_masks_come_on(net, train, batch):
    model = net(torch.float32)
    stock = SGD(model.parameters(), lr=0.1)
    Sparsifier(model, stock, 1, 4, recipe=MaskDecay(STE(), end=10))
    train(model, stock, 6)
    assert {mask.leak for mask in nm_masks(model).values()} == {0.4}
    assert "0.4 of the rest" in repr(next(iter(nm_masks(model).values())))
    before = model(batch(3, torch.float32)[0])
    assert strip(model) == []  # no zeros are left behind
    assert torch.equal(model(batch(3, torch.float32)[0]), before)
    assert all((p != 0).all() for p in model.parameters())


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fractions_of_a_run_of_unknown_length_are_refused_before_the_model_is_touched(net, wrapper):
    model = net()
    with pytest.raises(ConfigurationError, match=r"Expected a known number of optimizer steps, because .*`total_steps`"):
        Sparsifier(model, SGD(model.parameters()), recipe=wrapper(STE()))
    assert nm_masks(model) == {}


def test_a_tail_has_to_know_the_end_even_if_its_start_is_a_step(net):
    model = net()
    with pytest.raises(ConfigurationError, match="because DenseTail prunes after the last of them"):
        Sparsifier(model, SGD(model.parameters()), recipe=DenseTail(STE(), start=5))
    assert Sparsifier(model, SGD(model.parameters()), recipe=DenseTail(STE(), start=5), total_steps=9).phase == 2


def test_a_fixed_mask_has_nothing_to_fade():
    with pytest.raises(
        ConfigurationError, match=r"^Expected `recipe` of MaskDecay to keep its pruned weights alive, but got .*ASP"
    ):
        MaskDecay(StructureDecay(ASP()))


@pytest.mark.parametrize("kind", [StructureDecay, MaskDecay])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"end": 1.5}, ConfigurationError, "Expected `end` to be a step >= 0 .* but got 1.5"),
        ({"end": "half"}, ArgumentTypeError, "Expected `end` to be an integer .* but got 'half'"),
        ({"start": -1}, ConfigurationError, "Expected `start` to be a step >= 0 .* but got -1"),
        ({"start": True}, ArgumentTypeError, "Expected `start` to be an integer .* but got True"),
        ({"start": 0.6, "end": 0.5}, ConfigurationError, r"Expected `start` <= `end`, but got start=0\.6 and end=0\.5"),
    ],
)
def test_limits_out_of_range(kind, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kind(STE(), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseTail(STE(), start=2.0), "Expected `start` to be a step >= 0 .* but got 2.0"),
        (lambda: MaskDecay(STE(), fading="cosine"), "Expected `fading` to be 'linear' or 'exponential', but got 'cosine'"),
        (lambda: MaskDecay(STE(), last=0.0), r"Expected 0 < `last` < 1, .* but got 0\.0"),
        (lambda: MaskDecay(STE(), last=1.0), r"Expected 0 < `last` < 1, .* but got 1\.0"),
    ],
)
def test_other_arguments_out_of_range(make, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        make()


def test_a_description_shows_the_whole_chain():
    described = describe(StructureDecay(MaskDecay(SRSTE(lam=1e-3), end=9), end=0.25))
    assert described == {
        "type": "StructureDecay",
        "recipe": {
            "type": "MaskDecay", "recipe": {"type": "SRSTE", "lam": 1e-3}, "end": 9, "start": None, "fading": "linear",
            "last": 1e-3,
        },
        "end": 0.25,
        "start": None,
    }  # fmt: skip
    assert re.fullmatch(
        r"StructureDecay\(recipe=MaskDecay\(.*\), end=0.25, start=None\)", repr(StructureDecay(MaskDecay(), end=0.25))
    )
