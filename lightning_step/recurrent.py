"""How a recurrent layer comes to use masked weights.

Note [Flat weights]
    ``nn.LSTM`` and its kin do not read ``self.weight_ih_l0`` in their forward pass but a list of the parameters made
    earlier, ``_flat_weights``. A masked layer shows its forward pass a list of masked weights instead, and everybody else
    (``to``, ``flatten_parameters``, copies, pickles) the list of the parameters. The masked list lives as long as the
    forward pass, in the thread that runs it, and is never stored in the module. cuDNN wants all of it in one chunk of
    memory (it copies, and warns, at every call otherwise), so the list is flattened like the parameters are; what has no
    mask is copied for that, because flattening moves a tensor, and a parameter has to stay where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_recurrent_weight", "recurrent_members"]


class _Shown(threading.local):
    """The masked lists of the forward passes that are under way in this thread, by the module's id."""

    def __init__(self) -> None:
        self.lists: dict[int, list[Tensor | None]] = {}


_shown = _Shown()


def is_recurrent_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a recurrent layer or cell multiplies by one of its parameters.

    Args:
        module: Any module.
        attribute: Name of its parameter.

    Returns:
        True for the input, hidden and projection weights, whose shape is ``(out, in)``; False for biases and other modules.

    Example:
        >>> [is_recurrent_weight(nn.LSTM(4, 8, proj_size=4), f"{name}_l0") for name in ("weight_hh", "weight_hr", "bias_hh")]
        [True, True, False]
    """
    if isinstance(module, nn.RNNBase):
        return attribute.startswith("weight_") and attribute in module._flat_weights_names
    return isinstance(module, nn.RNNCellBase) and attribute in {"weight_ih", "weight_hh"}


def recurrent_members(
    original: type[nn.Module], unmasked: Callable[[nn.Module], AbstractContextManager[None]]
) -> dict[str, Any]:
    """What the masked class of a recurrent layer has beside its masked weights. See Note [Flat weights].

    Args:
        original: The class of the layer.
        unmasked: Switches the masks of a module off for a while.

    Returns:
        Class members; none for a class that reads its weights by name.

    Example:
        >>> from contextlib import nullcontext
        >>> sorted(recurrent_members(nn.GRU, nullcontext)), recurrent_members(nn.GRUCell, nullcontext)
        (['_flat_weights', '_init_flat_weights', '_update_flat_weights', 'forward'], {})
    """
    if not issubclass(original, nn.RNNBase):
        return {}
    plain: Any = original

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(mask.enabled for mask in self._nm_masks.values()):
            return plain.forward(self, *args, **kwargs)
        with _showing(self, [_temporary(self, name) for name in self._flat_weights_names]):
            self.flatten_parameters()
            return plain.forward(self, *args, **kwargs)

    def init_flat_weights(self: Any) -> None:  # torch calls it after `to` and the like
        with unmasked(self):
            plain._init_flat_weights(self)

    def update_flat_weights(self: Any) -> None:  # torch calls it in forward and before copies; what is shown is up to date
        if id(self) not in _shown.lists:
            with unmasked(self):
                plain._update_flat_weights(self)

    return {
        # torch.compile leaves recurrent layers to eager anyway; it must not begin again half-way into this forward.
        "forward": torch.compiler.disable(forward),  # type: ignore[no-untyped-call]
        "_flat_weights": property(_read, _write),
        "_init_flat_weights": init_flat_weights,
        "_update_flat_weights": update_flat_weights,
    }


def _read(self: nn.Module) -> Any:
    shown = _shown.lists.get(id(self))
    return self.__dict__["_flat_weights"] if shown is None else shown


def _write(self: nn.Module, value: Any) -> None:
    self.__dict__["_flat_weights"] = value


def _temporary(module: nn.Module, name: str) -> Tensor | None:
    weight = getattr(module, name, None)
    return weight.clone() if weight is module._parameters.get(name) and weight is not None else weight


@contextmanager
def _showing(module: nn.Module, weights: list[Tensor | None]) -> Iterator[None]:
    _shown.lists[id(module)] = weights
    try:
        yield
    finally:
        del _shown.lists[id(module)]
