"""What all metrics of masks have in common: each is a share, a part of a whole, and both are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.sharding import shards

__all__ = ["Share"]


class Share(Metric):
    """A part divided by a whole, added up over updates and processes.

    ``MetricCollection`` lets metrics share one state if theirs have the same names and, after the first update, about the
    same values. So every class, and every configuration that counts something else, needs names of its own.

    Args:
        part: Name of the state that counts the part.
        whole: Name of the state that counts the whole.
        dtype: Of both states, for good: in half precision, which a true-half trainer casts everything to, no count is right.
        kwargs: What every torchmetrics ``Metric`` takes.

    Example:
        >>> class Ripe(Share):
        ...     def update(self, apples):
        ...         self.add(torch.tensor([(apples > 0.5).sum(), apples.numel()]))
        >>> share = Ripe("ripe", "apples")
        >>> share.update(torch.tensor([0.1, 0.9, 0.8, 0.7]))
        >>> share.ripe, share.compute()
        (tensor(3), tensor(0.7500, dtype=torch.float64))
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, part: str, whole: str, *, dtype: torch.dtype = torch.int64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._part, self._whole = part, whole
        self.add_state(part, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state(whole, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def add(self, pair: Tensor, spread_as: Tensor | None = None) -> None:
        """Count.

        Args:
            pair: Part and whole, shape ``(2,)``.
            spread_as: The tensor both were counted in. A process that holds a shard of it counts that shard alone, and as
                often as there are shards: a sum over processes then weighs it as a tensor of which each holds a copy.
        """
        factor = 1 if spread_as is None else shards(spread_as)
        for name, value in zip((self._part, self._whole), pair * factor, strict=True):
            state: Tensor = getattr(self, name)
            setattr(self, name, state + value.to(state))

    def compute(self) -> Tensor:
        """Divide.

        Returns:
            The share, shape ``()``; NaN if there was nothing to count.
        """
        # float64, so that a single group among many millions still makes the share other than 1.
        part, whole = (getattr(self, name).double() for name in (self._part, self._whole))
        share: Tensor = part / whole
        return share

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw one value, or several as they follow each other. Needs matplotlib.

        Args:
            val: What `compute` or a call of the metric returned, or a list of these; None: `compute` is called.
            ax: The axes to draw on; None: new ones.

        Returns:
            The figure, None if ``ax`` was given, and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Called by ``to``, ``half``, ``set_dtype`` and their kin. Moves the states, and leaves them their dtype."""
        states = (self._part, self._whole)
        super()._apply(fn, exclude_state=(*exclude_state, *states))
        for name in states:
            self._defaults[name] = self._defaults[name].to(self.device)  # type: ignore[union-attr]
            setattr(self, name, getattr(self, name).to(self.device))
        return self


def same_shape(one: tuple[str, Tensor], other: tuple[str, Tensor]) -> None:
    """Refuse two tensors that would be broadcast.

    Args:
        one: Name and tensor.
        other: Name and tensor.

    Raises:
        ConfigurationError: If their shapes differ.

    Example:
        >>> same_shape(("mask", torch.ones(2)), ("before", torch.zeros(2)))
    """
    if one[1].shape != other[1].shape:
        raise ConfigurationError(
            f"Expected `{one[0]}` and `{other[0]}` of one shape, but got {tuple(one[1].shape)} and {tuple(other[1].shape)}. "
            "Update with one tensor at a time."
        )


def boolean(name: str, mask: Tensor) -> None:
    """Refuse a mask that is none.

    Args:
        name: Of the argument.
        mask: Its value.

    Raises:
        ArgumentTypeError: If it is not boolean.

    Example:
        >>> boolean("mask", torch.tensor([True]))
    """
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"Expected `{name}` to be a boolean mask, but got {mask.dtype}. Name what you pass, as in "
            "update(weight=..., latent=..., mask=..., before=...), and write `weight != 0` if there is no mask at hand."
        )
