"""Running code right before and right after an optimizer's own arithmetic, whoever calls ``step``.

Note [After the closure]
    Lightning runs forward and backward in a closure inside ``optimizer.step``, so a plain pre-step hook would see the
    gradients of the step before. Here the pre-hook wraps the closure and runs after it; without a closure the gradients
    are there already. Unlike Lightning's ``on_before_optimizer_step`` this is behind gradient clipping, works the same in a
    plain loop, and under a loss scaler runs only for steps the scaler lets through (a fused optimizer skips on its own,
    and says so in ``found_inf``).

Note [Steps within steps]
    torch runs the hooks in the ``step`` of every class it has seen an instance of. A subclass that calls ``super().step()``
    thus runs them twice, or once if nobody in the process has made an instance of the parent. Only the outermost step
    counts; it is told by the call stack, because a count of steps begun would be wrong after an exception.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_step.errors import OptimizerError

__all__ = ["StepHooks", "check_bare"]


class StepHooks:
    """Calls ``before`` when the gradients of a step are ready and ``after`` when the step is done.

    Args:
        optimizer: Any torch optimizer. Its ``step`` is not replaced, so schedulers and profilers keep working.
        before: Called with gradients ready, before they are used.
        after: Called after the step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> hooks = StepHooks(optimizer, lambda: print("before", weight.item()), lambda: print("after", weight.item()))
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        before 1.0
        after 0.5
        >>> hooks.remove()
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before = torch.no_grad()(before)
        self._after = torch.no_grad()(after)
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        ]

    def remove(self) -> None:
        """Take the hooks off; the optimizer is as it was."""
        for handle in self._handles:
            handle.remove()

    def _pre_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _within_another_step(optimizer):
            return None
        # args[0] is the optimizer itself; the closure may come either way, see Note [After the closure]
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._before()
            return None

        def closure_then_before() -> Any:
            result = closure()
            self._before()
            return result

        if positional:
            return (args[0], closure_then_before, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_before}

    def _post_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _within_another_step(optimizer):
            self._after()


def check_bare(optimizer: Optimizer) -> None:
    """Refuse a wrapper around the optimizer that steps: hooks on it would not run, or not at the right time.

    Args:
        optimizer: Any torch optimizer.

    Raises:
        OptimizerError: If it holds another one.

    Example:
        >>> check_bare(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        raise OptimizerError(
            f"Expected the optimizer that steps, but got {type(optimizer).__name__}, a wrapper around "
            f"{type(inner).__name__}. Pass the one inside, `optimizer.optimizer`; the loop goes on with the wrapper."
        )


def _within_another_step(optimizer: Optimizer) -> bool:
    """Whether the ``step`` that calls a hook was itself called by a ``step``. See Note [Steps within steps]."""
    step = sys._getframe(2)  # torch's wrapper, the same code around every step; it calls the optimizer `self`
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
