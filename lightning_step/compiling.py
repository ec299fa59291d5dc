"""Whether our own kernels are compiled, and how: on first use, and never instead of a result.

Note [LIGHTNING_STEP_COMPILE]
    ``1`` compiles every kernel of this package that can be, ``0`` none. Unset, each kernel decides for itself by where it
    pays; its documentation says when. A compiled kernel is made by ``torch.compile`` when it is first needed. Where that
    fails, for the want of a compiler as a rule, a line in the log says so, once, and the eager kernel serves from then on.

Note [Never within a graph]
    Inside of somebody's graph (``torch.compile``, ``torch.export``, tracing, function transforms) and under a dispatch mode
    (fake tensors, counters) the eager kernel runs: there it is traced, and fused, with the rest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from typing_extensions import ParamSpec

from lightning_step.errors import ConfigurationError

__all__ = ["VARIABLE", "compiled", "is_traced", "wants_compile"]

VARIABLE = "LIGHTNING_STEP_COMPILE"
"""The environment variable. See Note [LIGHTNING_STEP_COMPILE]."""

Given = ParamSpec("Given")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_CHOICES = {"": None, "0": False, "1": True}
_failures: set[str] = set()  # what the log has said already


def wants_compile() -> bool | None:
    """What the user asks for. See Note [LIGHTNING_STEP_COMPILE].

    Returns:
        True and False as asked; None if it is left to each kernel.

    Raises:
        ConfigurationError: If the variable is set to something else than 0 or 1.

    Example:
        >>> wants_compile() in (True, False, None)
        True
    """
    value = os.environ.get(VARIABLE, "")
    if value not in _CHOICES:
        raise ConfigurationError(
            f"Expected the environment variable {VARIABLE} to be 0 or 1, but got {value!r}. Unset it to leave the choice to "
            "each kernel."
        )
    return _CHOICES[value]


def compiled(
    function: Callable[Given, Result],
    eager: Callable[Given, Result] | None = None,
    *,
    dynamic: bool | None = True,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[Given, Result]:
    """A kernel that is compiled when it is first called, and eager wherever it cannot be.

    The whole of it becomes one graph, so a failure comes before anything has been computed: a kernel that works in place
    has changed nothing by then, and the eager one starts from the same tensors. See Note [Never within a graph].

    Args:
        function: What to compile. Numbers that change from call to call are better given as tensors without dimensions.
        eager: What serves where it is not compiled, with the same arguments; by default ``function`` itself.
        dynamic: Whether one graph serves every size, as ``torch.compile`` takes it.
        backend: As ``torch.compile`` takes it.

    Returns:
        The kernel. Whether to call it at all is the caller's choice; see `wants_compile`.

    Example:
        >>> double = compiled(lambda x: x * 2, backend="eager")
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """
    eager = function if eager is None else eager
    state: dict[str, Callable[Given, Result]] = {}

    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if state.get("kernel") is eager or is_traced():
            return eager(*args, **kwargs)
        if "kernel" not in state:
            state["kernel"] = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
        try:
            return state["kernel"](*args, **kwargs)
        except _compile_errors() as error:
            state["kernel"] = eager
            _tell(error)
        return eager(*args, **kwargs)

    return call


def is_traced() -> bool:
    """Whether what runs now ends up in somebody's graph, or is looked at by a mode. See Note [Never within a graph].

    Returns:
        True if so.

    Example:
        >>> is_traced()
        False
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _compile_errors() -> tuple[type[BaseException], ...]:
    """What `torch.compile` raises when it fails, as opposed to the kernel it makes; known once it has been loaded."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return (TorchDynamoException, FailOnRecompileLimitHit, OSError, ImportError)


def _tell(error: BaseException) -> None:
    # The first line often only names the one that failed, and the second one why.
    reason = " ".join([f"{type(error).__name__}:", *str(error).split("\n\n")[0].split()])[:300]
    if reason not in _failures:
        _failures.add(reason)
        _log.warning(f"kernels are not compiled, and run slower: {reason} (set {VARIABLE}=0 not to try)")
