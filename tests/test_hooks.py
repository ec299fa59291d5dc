import copy

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from lightning_step.errors import OptimizerError
from lightning_step.hooks import StepHooks, check_bare

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make(kind=torch.optim.SGD):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, kind([weight], lr=0.5)


def closure_of(weight, optimizer, value, log):
    """Forward and backward, as a trainer puts them into a closure; the gradient is ``value``."""

    def closure():
        log.append("closure")
        optimizer.zero_grad()
        loss = (weight * value).sum()
        loss.backward()
        return loss

    return closure


def step_without_closure(weight, optimizer, value, log):
    closure_of(weight, optimizer, value, log)()
    return optimizer.step()


def step_with_none(weight, optimizer, value, log):
    closure_of(weight, optimizer, value, log)()
    return optimizer.step(None)


def step_with_positional_closure(weight, optimizer, value, log):
    return optimizer.step(closure_of(weight, optimizer, value, log))


def step_with_keyword_closure(weight, optimizer, value, log):
    return optimizer.step(closure=closure_of(weight, optimizer, value, log))


STEPS = [step_without_closure, step_with_none, step_with_positional_closure, step_with_keyword_closure]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_before_sees_this_steps_gradients_and_the_old_weights_and_after_the_new_ones(kind, step):
    weight, optimizer = make(kind)
    plain_weight, plain = make(kind)
    log = []
    StepHooks(
        optimizer,
        lambda: log.append(("before", weight.tolist(), weight.grad.tolist())),
        lambda: log.append(("after", weight.tolist())),
    )
    for value in (3.0, -7.0):
        old = plain_weight.tolist()
        loss = step(weight, optimizer, value, log)
        assert loss == step(plain_weight, plain, value, [])
        assert log == ["closure", ("before", old, [value, value]), ("after", plain_weight.tolist())]
        log.clear()


@pytest.mark.parametrize("step", STEPS)
def test_a_gradient_edited_in_before_is_the_one_used(step):
    weight, optimizer = make()
    StepHooks(optimizer, lambda: weight.grad.mul_(10), lambda: None)
    step(weight, optimizer, 1.0, [])
    assert weight.tolist() == [1.0 - 0.5 * 10, 2.0 - 0.5 * 10]


@pytest.mark.parametrize("step", STEPS)
def test_before_and_after_run_without_autograd_and_the_closure_with_it(step):
    weight, optimizer = make()
    modes = []
    StepHooks(optimizer, lambda: modes.append(torch.is_grad_enabled()), lambda: modes.append(torch.is_grad_enabled()))
    step(weight, optimizer, 1.0, [])
    assert modes == [False, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_scheduler_made_before_or_after_still_counts_steps(step, scheduler_first):
    weight, optimizer = make()
    calls = []
    if scheduler_first:
        scheduler = StepLR(optimizer, step_size=2)
    StepHooks(optimizer, lambda: calls.append("before"), lambda: calls.append("after"))
    if not scheduler_first:
        scheduler = StepLR(optimizer, step_size=2)
    rates = []
    for _ in range(4):
        step(weight, optimizer, 1.0, [])
        scheduler.step()  # warns, hence fails, if it missed the optimizer's step
        rates.append(scheduler.get_last_lr()[0])
    assert calls == ["before", "after"] * 4
    assert rates == pytest.approx([0.5, 0.05, 0.05, 0.005])


def test_a_scheduler_that_no_step_reaches_warns():
    # The check above can fail: this is what it would look like.
    _, optimizer = make()
    scheduler = StepLR(optimizer, step_size=2)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`"):
        scheduler.step()


def test_remove_leaves_the_optimizer_as_it_was():
    weight, optimizer = make()
    step, hooks = optimizer.step, (dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks))
    calls = []
    installed = StepHooks(optimizer, lambda: calls.append("before"), lambda: calls.append("after"))
    assert optimizer.step == step  # wrapped by nobody
    step_with_positional_closure(weight, optimizer, 1.0, [])
    assert calls == ["before", "after"]
    installed.remove()
    assert (dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)) == hooks
    for step in STEPS:
        step(weight, optimizer, 1.0, [])
    assert calls == ["before", "after"]


def test_two_sets_of_hooks_live_side_by_side():
    weight, optimizer = make()
    calls = []
    first = StepHooks(optimizer, lambda: calls.append("a"), lambda: calls.append("A"))
    StepHooks(optimizer, lambda: calls.append("b"), lambda: calls.append("B"))
    step_with_positional_closure(weight, optimizer, 1.0, calls)
    assert calls == ["closure", "a", "b", "A", "B"]
    calls.clear()
    first.remove()
    step_with_positional_closure(weight, optimizer, 1.0, calls)
    assert calls == ["closure", "b", "B"]


def test_a_closure_that_is_called_several_times_has_before_after_each():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    start = copy.deepcopy(weight)
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=5)
    log = []

    def closure():
        log.append("closure")
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    StepHooks(optimizer, lambda: log.append("before"), lambda: log.append("after"))
    optimizer.step(closure)
    evaluations = optimizer.state[weight]["func_evals"]
    assert evaluations > 1
    assert log == ["closure", "before"] * evaluations + ["after"]
    assert not torch.equal(weight, start)


def test_an_error_in_the_closure_reaches_the_caller_and_after_does_not_run():
    _, optimizer = make()
    calls = []
    StepHooks(optimizer, lambda: calls.append("before"), lambda: calls.append("after"))

    def closure():
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert calls == []


# Steps within steps -------------------------------------------------------------------------------------------------


class CallsSuper(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(min=0.0)
        return loss


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_calls_its_parents_step_is_one_step(step):
    make()  # from now on torch runs the hooks in the parent's step, too
    weight, optimizer = make(CallsSuper)
    log = []
    StepHooks(optimizer, lambda: log.append(("before", weight.tolist())), lambda: log.append(("after", weight.tolist())))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    for _ in range(2):
        step(weight, optimizer, 3.0, log)
    seen = [entry for entry in log if entry != "closure"]
    assert seen == [("before", [1.0, 2.0]), ("after", [0.0, 0.5]), ("before", [0.0, 0.5]), ("after", [0.0, 0.0])]


def test_a_step_within_the_step_of_another_optimizer_counts():
    weight, optimizer = make()
    _, outer = make(CallsSuper)
    log = []
    StepHooks(optimizer, lambda: log.append("before"), lambda: log.append("after"))
    weight.grad = torch.ones(2)
    outer.step(lambda: optimizer.step())
    assert log == ["before", "after"]


# Wrappers -----------------------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """Hands everything on, as those of Fabric and accelerate do; torch never hears of it."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_a_wrapper_is_refused_and_the_one_inside_is_not():
    _, optimizer = make()
    check_bare(optimizer)
    message = (
        r"the optimizer that steps, but got Wrapper, a wrapper around SGD\. Pass the one inside, `optimizer\.optimizer`"
    )
    with pytest.raises(OptimizerError, match=message):
        check_bare(Wrapper(optimizer))
