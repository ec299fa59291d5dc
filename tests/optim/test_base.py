import pytest
import schedulefree
import torch
from torch import nn

from lightning_step.errors import OptimizerError
from lightning_step.optim import AdamAdapter, RAdamAdapter, SecondMomentAdapter, adapter_for, base, register_adapter


class MyAdamW(torch.optim.AdamW):
    """A subclass may step differently, so it is not known by its parent."""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(base, "_adapters", dict(base._adapters))


def make(kind, **arguments):
    return kind(nn.Linear(4, 4).parameters(), lr=0.1, **arguments)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "arguments", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}, {"maximize": True}], ids=repr
)
def test_adam_and_adamw_are_known(kind, arguments):
    assert isinstance(adapter_for(make(kind, **arguments)), AdamAdapter)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (torch.optim.SGD, r"torch\.optim\.sgd\.SGD"),
        (torch.optim.Adagrad, r"torch\.optim\.adagrad\.Adagrad"),
        (MyAdamW, r"\S*test_base\.MyAdamW"),
    ],
)
def test_an_unknown_optimizer_is_refused_by_name_with_what_to_do(kind, name):
    known = r"known: .*torch\.optim\.adam\.Adam, torch\.optim\.adamw\.AdamW.*"
    cure = rf"SRSTE, STE, ASP, Dense; .*`lightning_step\.optim\.register_adapter\({kind.__name__}, AdamAdapter\(\)\)`"
    with pytest.raises(OptimizerError, match=rf"{known}, but got {name}\. .*{cure}") as error:
        adapter_for(make(kind))
    assert isinstance(error.value, TypeError)


def test_the_line_that_the_error_suggests_is_enough():
    register_adapter(MyAdamW, AdamAdapter())
    optimizer = make(MyAdamW)
    adapter = adapter_for(optimizer)
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert adapter.freeze(optimizer, parameters, "adam") == parameters
    assert all(torch.allclose(adapter.second_moment(optimizer, p), torch.ones(())) for p in parameters)


def test_a_registered_type_does_not_cover_its_subclasses():
    class Child(MyAdamW):
        pass

    register_adapter(MyAdamW, AdamAdapter())
    with pytest.raises(OptimizerError, match=r"known: .*MyAdamW.*, but got \S*Child\. "):
        adapter_for(make(Child))


def test_a_later_registration_replaces_the_earlier():
    class Mine(AdamAdapter):
        pass

    mine = Mine()
    register_adapter(torch.optim.Adam, mine)
    assert adapter_for(make(torch.optim.Adam)) is mine
    assert type(adapter_for(make(torch.optim.AdamW))) is AdamAdapter


def of_package(module, name):
    """An optimizer type by the name of one that need not be installed."""
    return type(name, (torch.optim.SGD,), {"__module__": module})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.Adamax, r"torch\.optim\.adamax\.Adamax\. It keeps a decaying maximum of \|g\|, no second moment"),
        (torch.optim.Muon, r"torch\.optim\.Muon\. It has a momentum only"),
        (torch.optim.Adafactor, r"torch\.optim\.Adafactor\. It keeps sums over rows and columns"),
        (torch.optim.SparseAdam, r"torch\.optim\.sparse_adam\.SparseAdam\. It takes sparse gradients only"),
        (of_package("bitsandbytes.optim.adam", "Adam8bit"), r"bitsandbytes\.optim\.adam\.Adam8bit\. .* in 8 bits"),
        (schedulefree.AdamWScheduleFree, r"schedulefree\.\S+\.AdamWScheduleFree\. It trains one set .* evaluates another"),
    ],
)
def test_what_looks_like_adam_and_cannot_be_frozen_is_refused_by_name_with_the_reason(kind, reason):
    optimizer = kind([nn.Parameter(torch.ones(4, 4))], lr=0.1)
    cure = r".*\. Give the masked tensors to Adam, AdamW, NAdam or RAdam, .*`exclude`, or use .*SRSTE, STE, ASP, Dense\.$"
    with pytest.raises(OptimizerError, match=rf"but got {reason}{cure}"):
        adapter_for(optimizer)
    register_adapter(kind, AdamAdapter())  # who knows better may say so
    assert isinstance(adapter_for(optimizer), AdamAdapter)


@pytest.mark.parametrize(("beta2", "fits"), [(0.5, False), (2 / 3, False), (0.7, True), (0.999, True)])
def test_radam_with_a_memory_too_short_to_divide_by_is_refused(beta2, fits):
    optimizer = make(torch.optim.RAdam, betas=(0.9, beta2))
    if fits:
        assert isinstance(adapter_for(optimizer), RAdamAdapter)
        return
    with pytest.raises(OptimizerError, match=rf"Expected RAdam with beta2 > 2/3, but got beta2={beta2}: .*Raise beta2, or"):
        adapter_for(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_differentiable_is_refused(kind):
    with pytest.raises(
        OptimizerError, match=rf"Expected {kind.__name__} with differentiable=False.* recipe without a switch"
    ):
        adapter_for(make(kind, differentiable=True))


def test_differentiable_in_one_of_several_groups_is_refused():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "differentiable": on} for on in (False, True)]
    with pytest.raises(OptimizerError, match="but got differentiable=True"):
        adapter_for(torch.optim.Adam(groups))


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match=r"abstract .*check.*effective_gradient.*freeze.*moments.*second_moment.*step"):
        SecondMomentAdapter()
