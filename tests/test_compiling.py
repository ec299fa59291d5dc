import logging

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses import FakeTensorMode

from lightning_step import compiling
from lightning_step.compiling import VARIABLE, compiled, wants_compile
from lightning_step.errors import ConfigurationError


class Backend:
    """Counts the graphs it is given; from graph `fails_from` on it has no compiler."""

    def __init__(self, fails_from=None):
        self.graphs, self.fails_from = 0, fails_from

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.fails_from is not None and self.graphs >= self.fails_from:
            raise InvalidCxxCompiler
        return graph


def accumulate(total, x):
    """Works in place, so a second go at it would show."""
    total.add_(x)
    return total * 2


@pytest.fixture(autouse=True)
def forgetful():
    torch._dynamo.reset()
    compiling._failures.clear()
    yield
    torch._dynamo.reset()
    compiling._failures.clear()


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_the_variable_is_read_each_time(value, expected, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert wants_compile() is None
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert wants_compile() is expected


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(
        ConfigurationError, match=f"Expected the environment variable {VARIABLE} to be 0 or 1, but got 'yes'"
    ):
        wants_compile()


def test_it_compiles_on_first_use_and_once_for_every_size():
    kernel = compiled(accumulate, backend=(backend := Backend()))
    assert backend.graphs == 0
    for size in (3, 5, 7, 3):
        assert torch.equal(kernel(total := torch.ones(size), torch.ones(size)), torch.full([size], 4.0))
        assert torch.equal(total, torch.full([size], 2.0))
    assert backend.graphs == 1


def test_without_a_compiler_the_eager_one_serves_and_the_log_says_so_once(caplog):
    backend = Backend(fails_from=1)
    kernels = [compiled(function, backend=backend) for function in (accumulate, lambda t, x: t.add_(x) * 2)]
    with caplog.at_level(logging.INFO, "lightning_step"):
        for kernel in kernels:
            for i in range(3):
                result = kernel(total := torch.ones(2), torch.ones(2))
                assert (result.tolist(), total.tolist()) == ([4.0, 4.0], [2.0, 2.0]), i
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lightning_step.compiling"]
    assert line.startswith("kernels are not compiled, and run slower: BackendCompilerFailed: ")
    assert line.endswith(f"(set {VARIABLE}=0 not to try)")


def test_after_a_failure_nothing_is_tried_again():
    kernel = compiled(accumulate, backend=(backend := Backend(fails_from=2)), dynamic=False)
    kernel(torch.ones(2), torch.ones(2))
    for size in (3, 4, 2):
        assert kernel(torch.ones(size), torch.ones(size)).tolist() == [4.0] * size
    assert backend.graphs == 2


def test_more_kinds_of_arguments_than_the_compiler_takes_end_in_eager():
    kernel = compiled(accumulate, backend=(backend := Backend()), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(2, 8):
            assert kernel(total := torch.ones(size), torch.ones(size)).tolist() == [4.0] * size
            assert total.tolist() == [2.0] * size
    assert backend.graphs == 2


def test_an_error_of_the_kernel_itself_is_the_eager_one():
    with pytest.raises(RuntimeError, match="The size of tensor"):
        compiled(accumulate, backend=Backend())(torch.ones(2), torch.ones(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_within_a_graph_or_under_a_mode_the_eager_kernel_runs():
    told = []

    def eager(total, x):
        told.append(type(x).__name__)
        return accumulate(total, x)

    kernel = compiled(accumulate, eager, backend=(backend := Backend()))
    ones = torch.ones(2)
    outer = torch.compile(lambda x: kernel(torch.ones(2), x) + 1, backend=(around := Backend()), fullgraph=True)
    assert outer(ones).tolist() == [5.0, 5.0]
    assert (around.graphs, backend.graphs) == (1, 0)
    with FakeTensorMode():
        kernel(torch.ones(2), torch.ones(2))
    torch.func.vmap(lambda x: kernel(torch.ones_like(x), x))(torch.ones(3, 2))
    torch.jit.trace(lambda x: kernel(torch.ones(2), x), ones, check_trace=False)
    assert backend.graphs == 0
    assert "FakeTensor" in told
    kernel(torch.ones(2), ones)
    assert backend.graphs == 1
