import copy
import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_step import AtStep
from lightning_step.errors import ResumeError
from lightning_step.freezing import FrozenStep
from lightning_step.functional import adam_bound, preconditioned_step, preconditioner
from lightning_step.hooks import StepHooks
from lightning_step.optim import adapter_for
from lightning_step.recipes import Freeze

RATE, DECAY = 0.01, 0.1
FREEZE = Freeze(AtStep(1))


class Run:
    """Three tensors under AdamW, stepped the way the driver does it; ``a`` and ``b`` are to be frozen, ``c`` is not."""

    def __init__(self, freeze=FREEZE, **arguments):
        torch.manual_seed(0)
        self.parameters = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in "abc"}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE, weight_decay=DECAY, **arguments)
        scope = {name: self.parameters[name] for name in "ab"}
        self.frozen = FrozenStep(self.optimizer, adapter_for(self.optimizer), freeze, scope)
        StepHooks(self.optimizer, self.frozen.withhold, self._after)

    def _after(self):
        o = self.optimizer
        self.frozen.step(getattr(o, "found_inf", None), getattr(o, "grad_scale", None))

    def give_gradients(self, i, names="abc", factor=1.0):
        generator = torch.Generator().manual_seed(i)
        grads = {name: torch.randn(4, 3, generator=generator) for name in "abc"}
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name] * factor if name in names else None
        return grads

    def train(self, start, stop):
        for i in range(start, stop):
            self.give_gradients(i)
            self.optimizer.step()
        return self

    def everything(self):
        """All that a step could change."""
        return copy.deepcopy([[p.detach(), self.optimizer.state[p]] for p in self.parameters.values()])


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_before_the_freeze_every_step_is_the_stock_one():
    run, stock = Run().train(0, 5), Run()
    assert run.frozen.names == []
    plain = torch.optim.AdamW(stock.parameters.values(), lr=RATE, weight_decay=DECAY)
    for i in range(5):
        stock.give_gradients(i)
        plain.step()
    assert_same(run.everything(), [[p.detach(), plain.state[p]] for p in stock.parameters.values()])


@pytest.mark.parametrize("form", ["adam", "paper"])
@pytest.mark.parametrize("max_step", [None, float("inf"), 0.1])
def test_after_the_freeze_each_frozen_tensor_takes_the_preconditioned_step(form, max_step):
    run = Run(Freeze(AtStep(5), form=form, max_step=max_step)).train(0, 5)
    before = {name: (p.detach().clone(), copy.copy(run.optimizer.state[p])) for name, p in run.parameters.items()}
    expected = {}
    for name in "ab":
        weight, state = before[name]
        denominator = preconditioner(state["exp_avg_sq"].clone(), 5, beta2=0.999, form=form)
        expected[name] = [weight, state["exp_avg"].clone(), denominator]
    assert run.frozen.freeze() == run.frozen.names == ["a", "b"]
    bound = adam_bound((0.9, 0.999)) if max_step is None else max_step
    for i in range(5, 20):
        grads = run.give_gradients(i)
        run.optimizer.step()
        for name, (weight, m, d) in expected.items():
            constants = {"lr": RATE, "weight_decay": DECAY, "decoupled": True, "max_step": bound}
            expected[name][:2] = preconditioned_step(weight, grads[name], m, d, i, **constants)
            state = run.optimizer.state[run.parameters[name]]
            torch.testing.assert_close(run.parameters[name].detach(), expected[name][0])
            torch.testing.assert_close([state["exp_avg"], state["exp_avg_sq"]], expected[name][1:])
            assert int(state["step"]) == i + 1


def test_the_other_tensors_take_the_stock_step_bit_for_bit():
    run, stock = Run().train(0, 5), Run().train(0, 20)
    run.frozen.freeze()
    run.train(5, 20)
    assert_same(run.everything()[2], stock.everything()[2])
    assert not torch.equal(run.parameters["a"], stock.parameters["a"])


def test_withheld_gradients_are_put_back_untouched():
    run = Run().train(0, 5)
    run.frozen.freeze()
    grads = run.give_gradients(5)
    objects = {name: p.grad for name, p in run.parameters.items()}
    seen = []
    StepHooks(run.optimizer, lambda: seen.append([p.grad is None for p in run.parameters.values()]), lambda: None)
    run.optimizer.step()
    assert seen == [[True, True, False]]  # hidden from the stock step
    for name, parameter in run.parameters.items():
        assert parameter.grad is objects[name]
        assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("names", ["", "c", "a", "bc"])
def test_a_frozen_tensor_without_a_gradient_stays_where_it_is(names):
    run = Run().train(0, 5)
    run.frozen.freeze()
    before = run.everything()
    run.give_gradients(5, names)
    run.optimizer.step()
    for name, old, new in zip("abc", before, run.everything(), strict=True):
        assert torch.equal(old[0], new[0]) == (name not in names)
        assert int(new[1]["step"]) == 5 + (name in names)
    assert [name for name, p in run.parameters.items() if p.grad is not None] == list(names)


def test_a_tensor_that_never_had_a_gradient_stays_live():
    run = Run()
    run.give_gradients(0, "ac")
    run.optimizer.step()
    assert run.frozen.freeze() == ["a"]
    plain = torch.optim.AdamW([b := copy.deepcopy(run.parameters["b"])], lr=RATE, weight_decay=DECAY)
    b.grad = run.give_gradients(1)["b"]
    run.optimizer.step()
    plain.step()
    assert torch.equal(run.parameters["b"], b)
    assert_same(run.optimizer.state[run.parameters["b"]], plain.state[b])


def scaled_step(run, scaler, i, factor=1.0):
    """One step under a loss scaler; ``factor`` spoils the gradients of ``a``."""
    grads = run.give_gradients(i)
    run.optimizer.zero_grad()
    loss = sum((p * grads[name] * (factor if name == "a" else 1.0)).sum() for name, p in run.parameters.items())
    scaler.scale(loss).backward()
    scaler.step(run.optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scaler_divides_out_its_scale_and_skips_bad_steps(fused):
    scaled, plain = Run(fused=fused).train(0, 5), Run(fused=fused).train(0, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for run in (scaled, plain):
        run.frozen.freeze()
    for i in (5, 6, 7):
        scaled_step(scaled, scaler, i)
        plain.train(i, i + 1)
    assert_same(scaled.everything(), plain.everything())
    scaled_step(scaled, scaler, 8, factor=float("inf"))
    assert scaler.get_scale() == 512.0  # it did skip
    assert not torch.isfinite(scaled.parameters["a"].grad).all()
    assert_same(scaled.everything(), plain.everything())
    scaled_step(scaled, scaler, 9)
    assert_same(scaled.everything(), plain.train(9, 10).everything())


@pytest.mark.parametrize(("found_inf", "moves"), [(None, True), (torch.tensor(0.0), True), (torch.tensor(1.0), False)])
def test_found_inf_skips_the_step_and_grad_scale_divides(found_inf, moves):
    run, plain = Run().train(0, 5), Run().train(0, 5)
    for each, scale in ((run, 8.0), (plain, 1.0)):
        each.frozen.freeze()
        each.give_gradients(5, "ab", scale)
        each.frozen.withhold()
        each.frozen.step(found_inf, torch.tensor(scale))
    assert_same(run.everything(), plain.everything())
    assert torch.equal(run.parameters["a"].grad, 8 * plain.parameters["a"].grad)
    assert int(run.optimizer.state[run.parameters["a"]]["step"]) == 5 + moves


def test_a_closure_and_a_scheduler_work_as_before():
    run = Run().train(0, 5)
    run.frozen.freeze()
    scheduler = LambdaLR(run.optimizer, lambda epoch: 0.0 if epoch else 1.0)
    called = []

    def closure():
        called.append(run.give_gradients(5))
        return torch.tensor(3.0)

    twin = Run().train(0, 5)
    twin.frozen.freeze()
    assert run.optimizer.step(closure) == 3.0
    assert len(called) == 1
    assert_same(run.everything(), twin.train(5, 6).everything())
    scheduler.step()
    run.train(6, 7)
    assert_same([weight for weight, _ in run.everything()], [weight for weight, _ in twin.everything()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_second_moment_that_is_not_finite_is_named(bad):
    run = Run()
    assert run.frozen.non_finite() == []  # nothing there yet
    run.train(0, 2)
    assert run.frozen.non_finite() == []
    run.optimizer.state[run.parameters["b"]]["exp_avg_sq"][1, 2] = bad
    assert run.frozen.non_finite() == ["b"]


def test_a_resumed_run_goes_on_bit_for_bit():
    run = Run().train(0, 5)
    run.frozen.freeze()
    run.train(5, 8)
    torch.save([run.parameters, run.optimizer.state_dict(), run.frozen.names], file := io.BytesIO())
    parameters, state, names = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = Run()
    for name, parameter in resumed.parameters.items():
        parameter.data = parameters[name].data
    resumed.frozen.restore(iter(names))
    with pytest.raises(ResumeError, match=r"preconditioner of 'a' \(and 1 more\).*Load the optimizer's state dict"):
        resumed.frozen.check_restored()
    resumed.optimizer.load_state_dict(state)
    resumed.frozen.check_restored()
    assert_same(resumed.train(8, 12).everything(), run.train(8, 12).everything())


def test_a_checkpoint_with_an_unknown_frozen_tensor_is_refused():
    frozen = Run().frozen
    with pytest.raises(ResumeError, match=r"none named \['c', 'zz'\]\. Resume with the same model and parameter groups"):
        frozen.restore(["a", "c", "zz"])
    assert frozen.names == []
