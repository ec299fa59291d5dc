"""What an optimizer has to be asked for, and who may answer for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_step.errors import OptimizerError
from lightning_step.functional import PreconditionForm
from lightning_step.optim.refused import why_refused

__all__ = ["Moments", "SecondMomentAdapter", "adapter_for", "register_adapter"]

_adapters: dict[type[Optimizer], SecondMomentAdapter] = {}


class Moments(NamedTuple):
    """The constants of one parameter group.

    Example:
        >>> Moments(0.9, 0.999, 1e-8).beta2
        0.999
    """

    beta1: float
    beta2: float
    eps: float


class SecondMomentAdapter(ABC):
    """Reads, freezes and steps with the second moment of one kind of optimizer.

    An adapter holds no state: everything lives in ``optimizer.state`` and ``optimizer.param_groups``, so the optimizer's
    own ``state_dict`` is complete. Register one with `register_adapter`.

    Example:
        >>> import torch
        >>> class MyAdamW(torch.optim.AdamW):
        ...     pass
        >>> from lightning_step.optim import AdamAdapter
        >>> register_adapter(MyAdamW, AdamAdapter())
        >>> type(adapter_for(MyAdamW(torch.nn.Linear(4, 4).parameters()))).__name__
        'AdamAdapter'
    """

    @abstractmethod
    def check(self, optimizer: Optimizer) -> None:
        """Refuse settings the adapter cannot serve. Called once, when fitting starts.

        Args:
            optimizer: The optimizer.

        Raises:
            OptimizerError: If a setting is not supported, with what to do.
        """

    @abstractmethod
    def moments(self, group: Mapping[str, Any]) -> Moments:
        """The constants of a parameter group.

        Args:
            group: One entry of ``optimizer.param_groups``.

        Returns:
            Decay of both moments, and eps.
        """

    @abstractmethod
    def second_moment(self, optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
        """The live second moment v of a parameter, or its preconditioner D once frozen. Not a copy.

        Args:
            optimizer: The optimizer.
            parameter: One of its parameters.

        Returns:
            The tensor, shape and dtype of the parameter; None before the parameter's first step.
        """

    @abstractmethod
    def effective_gradient(self, group: Mapping[str, Any], weight: Tensor, grad: Tensor) -> Tensor:
        """What the optimizer squares: the gradient with coupled weight decay and sign.

        Args:
            group: The parameter group.
            weight: Some coordinates of the parameter, before the step.
            grad: The unscaled gradient at the same coordinates.

        Returns:
            The effective gradient, same shape.
        """

    @abstractmethod
    def freeze(self, optimizer: Optimizer, parameters: Iterable[Tensor], form: PreconditionForm) -> list[Tensor]:
        """Turn v into the preconditioner D, in place. Called once, at the switch.

        Args:
            optimizer: The optimizer.
            parameters: Which parameters.
            form: How D is made.

        Returns:
            The parameters frozen; one without any second moment yet stays live and is not among them. If none is, the
            switch stays open and asks again after the next step.
        """

    @abstractmethod
    def moment_behind(self, group: Mapping[str, Any], precondition: Tensor, t: int, form: PreconditionForm) -> Tensor:
        """The second moment that a preconditioner was made of, to look at.

        Args:
            group: The parameter group.
            precondition: D of one of its parameters.
            t: Optimizer steps taken when it was made.
            form: How it was made.

        Returns:
            A new tensor of the same shape, float32 or wider.
        """

    @abstractmethod
    def step(self, optimizer: Optimizer, grads: Mapping[Tensor, Tensor], max_step: float | None) -> None:
        """Take one preconditioned step of frozen parameters, instead of the optimizer's own.

        Args:
            optimizer: The optimizer.
            grads: Unscaled gradient of each parameter to move.
            max_step: Largest move of one coordinate in learning rates; None: Adam's own bound.
        """


def register_adapter(optimizer_type: type[Optimizer], adapter: SecondMomentAdapter) -> None:
    """Say who answers for a type of optimizer. Subclasses are not covered: they may step differently.

    Args:
        optimizer_type: The exact type.
        adapter: Its adapter; replaces an earlier one.

    Example:
        >>> import torch
        >>> from lightning_step.optim import AdamAdapter
        >>> register_adapter(torch.optim.AdamW, AdamAdapter())
    """
    _adapters[optimizer_type] = adapter


def adapter_for(optimizer: Optimizer) -> SecondMomentAdapter:
    """The adapter of an optimizer, by its exact type.

    Args:
        optimizer: The optimizer.

    Returns:
        Its adapter.

    Raises:
        OptimizerError: If no adapter is registered for the type, or it refuses the optimizer's settings.

    Example:
        >>> import torch
        >>> type(adapter_for(torch.optim.Adam(torch.nn.Linear(4, 4).parameters()))).__name__
        'AdamAdapter'
    """
    adapter = _adapters.get(type(optimizer))
    if adapter is None:
        raise OptimizerError(_unknown(type(optimizer)))
    adapter.check(optimizer)
    return adapter


def _unknown(cls: type[Optimizer]) -> str:
    name = f"{cls.__module__}.{cls.__qualname__}"
    cure = "a recipe that works with any optimizer: SRSTE, STE, ASP, Dense"
    reason = why_refused(cls)
    if reason is not None:
        return (
            f"Expected an optimizer whose second moment can be frozen, but got {name}. {reason}. Give the masked tensors to "
            f"Adam, AdamW, NAdam or RAdam, leave those it holds out with `exclude`, or use {cure}."
        )
    known = ", ".join(sorted(f"{t.__module__}.{t.__qualname__}" for t in _adapters))
    return (
        f"Expected an optimizer with a registered second-moment adapter (known: {known}), but got {name}. STEP has to read "
        f"and freeze Adam's second moment. Use one of those; or {cure}; or, if it keeps Adam's state, "
        f"`lightning_step.optim.register_adapter({cls.__name__}, AdamAdapter())`."
    )
