"""What one stage of a Lightning ``Trainer`` leaves for the next: the state of the masks, and of which module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_step.resume import STATE_VERSION, check_version

__all__ = ["Handover", "packed"]

State = dict[str, Any]


def packed(optimizers: Sequence[State]) -> State:
    """The states of all optimizers as one.

    Args:
        optimizers: The state of every optimizer that holds masked tensors.

    Returns:
        The state.

    Example:
        >>> packed([])
        {'version': 1, 'optimizers': []}
    """
    return {"version": STATE_VERSION, "optimizers": list(optimizers)}


class Handover:
    """Keeps what a checkpoint says until somebody takes it up, and what a module was left with until it trains again.

    Example:
        >>> layer, handover = nn.Linear(1, 1), Handover()
        >>> handover.load(packed([{"t": 3, "frozen": ["weight"], "open": {}}]))
        >>> handover.keep(layer)  # a stage that did not train ends
        >>> handover.renew(layer, packed([]))
        >>> handover.take()
        ({'version': 1, 'optimizers': [{'t': 3, 'frozen': [], 'open': {}}]}, True)
    """

    def __init__(self) -> None:
        self.loaded: State | None = None  # from a checkpoint, in this stage
        self._lost = False  # what the module was left with had a frozen second moment, which is gone
        self._left: State | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None

    @property
    def state(self) -> State | None:
        """What to save while nothing trains: it is handed on."""
        return self._left if self.loaded is None else self.loaded

    def load(self, state: State) -> None:
        """Take a state from a checkpoint. One that was written before the first fit says nothing.

        Args:
            state: From a checkpoint.

        Raises:
            ResumeError: If it is of another version.
        """
        check_version(state)
        self.loaded = state if state["optimizers"] else None

    def keep(self, module: nn.Module) -> None:
        """A stage ends: what was loaded and not trained on is what the module was left with.

        Args:
            module: The module of the stage.
        """
        if self.loaded is not None:
            self._left, self.loaded = self.loaded, None
            self._module = weakref.ref(module)

    def renew(self, module: nn.Module, trained: State) -> None:
        """A fit is set up. What the module was left with goes on, but its optimizer will be a new one.

        Args:
            module: The module to fit.
            trained: What the fit before left, whichever its module.
        """
        left = trained if self._left is None else self._left
        own = left["optimizers"] if self._module() is module else []
        # A tuner sets up a fit that never starts: what is lost by then is still to be told.
        self._lost = any(state["frozen"] for state in own) or (self._lost and bool(own))
        # What was sampled and frozen is that of the optimizer before.
        self._left = packed([{**state, "frozen": [], "open": _emptied(state["open"])} for state in own]) if own else None

    def take(self) -> tuple[State | None, bool]:
        """A fit starts.

        Returns:
            The checkpoint it resumes from, or else what its module was left with; None if it is the first. And whether a
            frozen second moment is lost with the optimizer before.
        """
        state, self.loaded = self.state, None
        return state, self._lost and state == self._left

    def begin(self, module: nn.Module) -> None:
        """A fit is under way: from now on its optimizers know.

        Args:
            module: The module that is trained.
        """
        self._left, self._module, self._lost = None, weakref.ref(module), False


def _emptied(open_switches: State) -> State:
    return {role: {"samples": []} for role in open_switches}
