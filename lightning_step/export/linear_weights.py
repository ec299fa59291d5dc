"""Layers that multiply as a Linear layer does, whose weight sparse tensor cores can therefore take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_step.group_dims import hf_conv1d
from lightning_step.naming import named_modules

__all__ = ["LinearWeight", "linear_weights", "shared_with", "use_packed"]


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """The weight of one layer.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> tuple(LinearWeight("weight", layer, layer.weight, transposed=False).rows.shape)
        (4, 8)
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    transposed: bool  # stored as (in, out), which is how Hugging Face's Conv1D does

    @property
    def rows(self) -> Tensor:
        """The weight as a Linear layer holds it.

        Returns:
            Shape ``(out, in)``, nothing copied.
        """
        weight = self.parameter.detach()
        return weight.t() if self.transposed and weight.dim() == 2 else weight


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """Every weight of a Linear layer, and of a Hugging Face ``Conv1D``, which is one with its weight transposed.

    Args:
        model: Without masks.

    Returns:
        In the order of the modules. A subclass that multiplies in a way of its own is left out: it may not know a packed
        weight.

    Example:
        >>> [found.name for found in linear_weights(nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 4, 3)))]
        ['0.weight']
    """
    found = []
    for name, module in named_modules(model):
        weight, conv = module._parameters.get("weight"), hf_conv1d(module)
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if weight is not None and (plain or (conv is not None and type(module).forward is conv.forward)):
            found.append(LinearWeight(f"{name}.weight" if name else "weight", module, weight, transposed=not plain))
    return found


def shared_with(model: nn.Module, found: Sequence[LinearWeight]) -> Mapping[int, str]:
    """Who else uses a weight: an embedding tied to the output layer has to stay what it is.

    Args:
        model: The model.
        found: From `linear_weights`.

    Returns:
        ``id`` of a parameter to the name under which something else uses it, or the same in the other orientation.

    Example:
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "head": nn.Linear(8, 4)})
        >>> model["head"].weight = model["embedding"].weight
        >>> list(shared_with(model, linear_weights(model)).values())
        ['embedding.weight']
    """
    ways: dict[int, bool] = {}
    known: set[str] = set()
    for each in found:
        if ways.setdefault(id(each.parameter), each.transposed) == each.transposed:
            known.add(each.name)
    others: dict[int, str] = {}
    for name, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            full = f"{name}.{attribute}" if name else attribute
            if parameter is not None and id(parameter) in ways and full not in known:
                others[id(parameter)] = full
    return others


def use_packed(weight: LinearWeight, packed: nn.Parameter) -> None:
    """Let the layer multiply with a packed weight from now on.

    Args:
        weight: What it was.
        packed: What it is to be, ``(out, in)``.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> use_packed(linear_weights(layer)[0], nn.Parameter(layer.weight.detach(), requires_grad=False))
        >>> layer.weight.requires_grad
        False
    """
    weight.module.weight = packed
    if weight.transposed:
        weight.module.__class__ = _turned(type(weight.module))  # type: ignore[arg-type]


@cache
def _turned(cls: type[nn.Module]) -> type[nn.Module]:
    """The class for a ``Conv1D`` whose weight is no longer transposed; one for all of them."""
    return type(cls.__name__, (cls,), {"forward": _as_linear, "__module__": __name__})


def _as_linear(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
