"""Another learning rate for some parameters of a group, for the time of one step.

Note [Groups of one step]
    A factor per parameter needs groups of their own. Made for good, they would show in checkpoints, schedulers and loggers,
    and a run could not be resumed without them. So the optimizer gets its groups split right before its arithmetic, and
    gets its own back right after; state belongs to parameters and does not notice. What an optimizer writes into its
    groups while it steps (some count there) is carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_step.errors import OptimizerError

__all__ = ["StepRates", "check_rates"]

Group = dict[str, Any]
_OWN = ("params", "lr")  # what a part of a group has for itself


class StepRates:
    """Splits the groups of an optimizer by the factors of their parameters' rates.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight, bias], lr=0.1)
        >>> rates = StepRates(optimizer)
        >>> rates.begin({weight: 2.0})
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.2, 0.1]
        >>> rates.end()
        >>> len(optimizer.param_groups)
        1
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._whole: list[Group] | None = None  # the optimizer's own groups, while it has split ones
        self._parts: list[tuple[Group, Group]] = []  # a part, and the group it is of

    def begin(self, factors: Mapping[Tensor, float]) -> None:
        """Split the groups.

        Args:
            factors: Parameter to factor, of all whose factor is not 1.
        """
        self.end()  # a step before may have ended in an exception
        if not factors:
            return
        whole = self._optimizer.param_groups
        self._parts = [(part, group) for group in whole for part in _split(group, factors)]
        self._whole, self._optimizer.param_groups = whole, [part for part, _ in self._parts]

    def end(self) -> None:
        """Give the optimizer its own groups back. Without `begin`, nothing happens."""
        if self._whole is None:
            return
        for part, group in self._parts:
            group.update({key: value for key, value in part.items() if key not in _OWN and value is not group.get(key)})
        self._optimizer.param_groups = self._whole
        self._whole, self._parts = None, []


def check_rates(optimizer: Optimizer) -> None:
    """Refuse an optimizer that does not look at its groups when it steps.

    Args:
        optimizer: The optimizer.

    Raises:
        OptimizerError: If it has one learning rate for all parameters.

    Example:
        >>> import torch
        >>> check_rates(torch.optim.SGD([torch.zeros(1)]))
    """
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "Expected an optimizer with a learning rate per parameter group, but got LBFGS, which has one for all. Use "
            "another optimizer, or a recipe without RateScale."
        )


def _split(group: Group, factors: Mapping[Tensor, float]) -> list[Group]:
    """Parts with one factor each, in the order in which factors come; parameters keep their order within a part."""
    parts: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [
        {**group, "params": parameters, "lr": group["lr"] if factor == 1.0 else group["lr"] * factor}
        for factor, parameters in parts.items()
    ]
