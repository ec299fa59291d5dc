import itertools

import pytest
import torch

from lightning_step.optim import AdamAdapter, adapter_for, pieces
from lightning_step.optim.pieces import Numbers, Part, batches, flat, parts

NUMBERS = Numbers(bound=3.0)


def part_of(*tensors):
    return Part(*(tensors if len(tensors) == 4 else tensors * 4), NUMBERS)


def layouts():
    image = torch.randn(4, 6, 3, 3)
    return {
        "rows": torch.randn(40, 30),
        "columns": torch.randn(30, 40).t(),
        "channels last": image.to(memory_format=torch.channels_last),
        "every other row": torch.randn(60, 30)[::2],
        "none": torch.randn(0, 4),
        "one": torch.randn(()),
        "a row of a larger one": torch.randn(3, 500)[1],
    }


@pytest.mark.parametrize("name", layouts())
def test_flat_is_the_same_memory_or_nothing(name):
    tensor = layouts()[name]
    found = flat(part_of(tensor))
    assert (found is None) == (name == "every other row")
    if found is not None:
        assert [t.shape for t in found[:4]] == [(tensor.numel(),)] * 4
        found.weight.fill_(7.0)
        assert torch.equal(tensor, torch.full_like(tensor, 7.0))


def test_tensors_that_lie_in_memory_in_different_orders_have_no_flat_form():
    one = torch.randn(8, 8)
    assert flat(part_of(one, one.t(), one, one)) is None
    assert flat(part_of(one, one.clone(), one, one)) is not None


@pytest.mark.parametrize("limit", [4, 64, 1000, 10**6])
def test_batches_hold_every_element_once_and_no_more_than_their_limit(limit, monkeypatch):
    monkeypatch.setitem(pieces.BYTES, "cpu", limit * 4)
    given = [part_of(tensor) for tensor in layouts().values()]
    for part in given:
        part.weight.zero_()
    sizes = []
    for batch in batches(given):
        sizes.append(sum(weight.numel() for weight in batch.weights))
        assert len({len(column) for column in batch}) == 1
        for weight in batch.weights:
            weight.add_(1)
    assert all(torch.equal(part.weight, torch.ones_like(part.weight)) for part in given)
    assert all(size <= max(limit, 900) for size in sizes)  # one with gaps is not cut
    assert sum(size > limit for size in sizes) == (limit < 900)


def frozen(kind, **settings):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(tensor.clone()) for tensor in layouts().values()]
    optimizer = getattr(torch.optim, kind)(weights, lr=0.01, **settings)
    for _ in range(7):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    adapter = adapter_for(optimizer)
    ours = adapter.freeze(optimizer, weights, "adam")
    assert len(ours) == len(weights) - 1  # the empty one has nothing to freeze
    return optimizer, adapter, ours


@pytest.mark.parametrize(
    ("kind", "settings", "there"),
    list(
        itertools.product(
            ["Adam", "AdamW", "NAdam", "RAdam"],
            [{"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.0}],
            [False, True],
        )
    ),
)
def test_the_bits_do_not_depend_on_how_tensors_are_cut(kind, settings, there, monkeypatch):
    if there:  # as if step counts lay on a device
        for module in ("adam", "nadam", "radam"):
            monkeypatch.setattr(f"lightning_step.optim.{module}.on_host", lambda states: False)
    results = []
    for limit in (1 << 18, 512):
        monkeypatch.setitem(pieces.BYTES, "cpu", limit)
        optimizer, adapter, weights = frozen(kind, **settings)
        for _ in range(5):
            adapter.step(optimizer, {weight: torch.randn_like(weight) for weight in weights}, 0.5)
        results.append([[weight.detach(), optimizer.state[weight]] for weight in weights])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_gradient_is_asked_for_when_its_turn_has_come():
    optimizer, _, weights = frozen("AdamW")
    asked = []

    class Grads(dict):
        def __getitem__(self, weight):
            asked.append(weight)
            return super().__getitem__(weight)

    grads = Grads({weight: torch.ones_like(weight) for weight in weights})
    stream = parts(weights, grads, [optimizer.state[weight] for weight in weights], [NUMBERS] * len(weights))
    next(stream)
    assert len(asked) == 1


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Sizes of the tensors that operations make new."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        mutates = any(argument.alias_info is not None for argument in func._schema.arguments)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and not mutates:
                self.made.append(tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam"])
@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_nothing_of_the_size_of_a_weight_is_allocated(kind, settings):
    limit = pieces.BYTES["cpu"] // 4
    weight = torch.nn.Parameter(torch.randn(limit // 128, 1024))  # eight portions
    optimizer = getattr(torch.optim, kind)([weight], **settings)
    for _ in range(6):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    adapter = adapter_for(optimizer)
    adapter.freeze(optimizer, [weight], "adam")
    with Largest() as largest:
        adapter.step(optimizer, {weight: weight.grad}, None)
    assert max(largest.made) == limit
    assert isinstance(adapter, AdamAdapter)
