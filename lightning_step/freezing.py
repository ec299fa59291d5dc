"""Taking preconditioned steps in the place of the optimizer's own.

Note [Withheld gradients]
    A parameter without a gradient is one that every optimizer skips. So in phase II the gradients of the frozen
    parameters are withheld while the stock step runs, which then moves only the others; the adapter moves the frozen
    ones; and the gradients are put back for whoever wants to look at them. ``optimizer.step`` itself stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_step.errors import ResumeError
from lightning_step.optim import SecondMomentAdapter
from lightning_step.recipes import Freeze
from lightning_step.sharding import local, whole_count

__all__ = ["FrozenStep"]


class FrozenStep:
    """The frozen parameters of one optimizer.

    Args:
        optimizer: The optimizer.
        adapter: Its adapter.
        freeze: How to freeze.
        parameters: Name to parameter, of all that may be frozen.

    Example:
        >>> from lightning_step import AtStep
        >>> from lightning_step.optim import adapter_for
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([weight], lr=0.1)
        >>> frozen = FrozenStep(optimizer, adapter_for(optimizer), Freeze(AtStep(1)), {"weight": weight})
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> frozen.freeze()
        ['weight']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        adapter: SecondMomentAdapter,
        freeze: Freeze,
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.names: list[str] = []  # of the frozen parameters; empty in phase I
        self._optimizer = optimizer
        self._adapter = adapter
        self._freeze = freeze
        self._parameters = dict(parameters)
        self._withheld: dict[Tensor, Tensor] = {}

    def non_finite(self) -> list[str]:
        """Names whose second moment holds a NaN or an infinity, which must not be frozen.

        Returns:
            The names.
        """
        moments = {name: self._adapter.second_moment(self._optimizer, p) for name, p in self._parameters.items()}
        return [n for n, v in moments.items() if v is not None and whole_count(v, ~torch.isfinite(local(v)))]

    def unseen(self) -> list[str]:
        """Names of all that should freeze, if no gradient but zero has reached any of them.

        Returns:
            The names; nothing once there is a second moment to freeze.
        """
        moments = (self._adapter.second_moment(self._optimizer, parameter) for parameter in self._parameters.values())
        seen = any(v is not None and whole_count(v, local(v) != 0) for v in moments)
        return [] if seen else list(self._parameters)

    def freeze(self) -> list[str]:
        """Turn every second moment into a preconditioner, in place.

        Returns:
            Names of the parameters frozen. One that never had a gradient has nothing to freeze and stays live.
        """
        done = set(self._adapter.freeze(self._optimizer, self._parameters.values(), self._freeze.form))
        self.names = [name for name, parameter in self._parameters.items() if parameter in done]
        return self.names

    def restore(self, names: Iterable[str]) -> None:
        """Take up a freeze from a checkpoint, whose preconditioners come with the optimizer's own state.

        Args:
            names: Names of the frozen parameters.

        Raises:
            ResumeError: If a name is unknown here.
        """
        names = list(names)
        unknown = [name for name in names if name not in self._parameters]
        if unknown:
            raise ResumeError(
                f"Expected the frozen parameters of the checkpoint in this run, but got none named {unknown}. "
                "Resume with the same model and parameter groups."
            )
        self.names = names

    def check_restored(self) -> None:
        """Make sure that the optimizer's state came back together with the phase.

        Raises:
            ResumeError: If a frozen parameter has no preconditioner.
        """
        lacking = [n for n in self.names if self._adapter.second_moment(self._optimizer, self._parameters[n]) is None]
        if lacking:
            raise ResumeError(
                f"Expected the optimizer to hold the preconditioner of {lacking[0]!r} (and {len(lacking) - 1} more), "
                "because the checkpoint was written in phase II, but got an optimizer without state. Load the optimizer's "
                "state dict from the same checkpoint."
            )

    def withhold(self) -> None:
        """Hide the gradients of the frozen parameters from the stock step. See Note [Withheld gradients]."""
        self._withheld.clear()
        for name in self.names:
            parameter = self._parameters[name]
            if parameter.grad is not None:
                self._withheld[parameter] = parameter.grad
                parameter.grad = None

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Move the frozen parameters and put their gradients back.

        Args:
            found_inf: Non-zero where a fused optimizer has just skipped its step: then this one is skipped too.
            grad_scale: Factor that is still in the gradients.
        """
        if not self._withheld:
            return
        if found_inf is None or not bool(found_inf):
            self._adapter.step(self._optimizer, self._unscaled(grad_scale), self._freeze.max_step)
        for parameter, grad in self._withheld.items():
            parameter.grad = grad
        self._withheld.clear()

    def _unscaled(self, grad_scale: Tensor | None) -> Mapping[Tensor, Tensor]:
        return self._withheld if grad_scale is None else _Unscaled(self._withheld, grad_scale)


class _Unscaled(Mapping[Tensor, Tensor]):
    """Gradients that are divided when they are asked for, so that there are never copies of all of them."""

    def __init__(self, grads: Mapping[Tensor, Tensor], scale: Tensor) -> None:
        self._grads, self._scale = grads, scale

    def __getitem__(self, parameter: Tensor) -> Tensor:
        grad = self._grads[parameter]
        return grad / self._scale.to(grad.device)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._grads

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._grads)

    def __len__(self) -> int:
        return len(self._grads)
