"""The classes that masked modules get in place of their own.

Note [What a masked class adds]
    A property per masked tensor, whose value is the masked weight while the ``Parameter`` stays registered under the same
    name; recurrent layers some more (see `lightning_step.recurrent`). The class is made at run time, one per original
    class and set of tensors, so copies and pickles name the type and the tensors that it is made from.

Note [Classes on top]
    Another tool may subclass a masked class and swap a module's class once more: ``fully_shard`` makes an ``FSDPLinear``
    of a ``Linear`` that way, with a mixin in front. When masks come or go below it, the same class is made anew on the
    other base, so that what the tool has put on top stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lightning_step.errors import ConfigurationError
from lightning_step.recurrent import recurrent_members
from lightning_step.sharding import any_sharded

__all__ = ["masks_of", "masks_off", "original_class", "put_mask", "take_masks"]


class _Mask(Protocol):
    """What a masked class needs of a mask."""

    enabled: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """The masked weight."""


_masked_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
_rebased_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def masks_of(module: nn.Module) -> dict[str, Any]:
    """The masks of one module, its children not counted.

    Args:
        module: Any module.

    Returns:
        Attribute to its mask.

    Example:
        >>> masks_of(nn.Linear(8, 4))
        {}
    """
    masks: dict[str, Any] = module.__dict__.get("_nm_masks", {})
    return masks


def put_mask(module: nn.Module, attribute: str, mask: _Mask) -> None:
    """Make a module show one of its parameters masked, in place.

    Args:
        module: The module.
        attribute: Name of its parameter.
        mask: The mask.

    Example:
        >>> from lightning_step import NMMask, NMPattern
        >>> layer = nn.Linear(4, 1)
        >>> put_mask(layer, "weight", NMMask(NMPattern(2, 4)))
        >>> type(layer).__name__, int(layer.weight.count_nonzero())
        ('MaskedLinear', 2)
    """
    masks = masks_of(module) | {attribute: mask}
    # In __dict__, not through setattr: a registered child would show up in named_modules.
    module.__dict__["_nm_masks"] = masks
    ours = _masked_base(type(module))
    if ours is None:
        module.__class__ = _masked_class(type(module), tuple(sorted(masks)))
    else:
        module.__class__ = _rebased(type(module), ours, _masked_class(original_class(module), tuple(sorted(masks))))


def take_masks(module: nn.Module) -> None:
    """Give a module back its own class; its parameters stay as they are.

    Args:
        module: A module with masks.

    Example:
        >>> from lightning_step import NMMask, NMPattern
        >>> layer = nn.Linear(4, 1)
        >>> put_mask(layer, "weight", NMMask(NMPattern(2, 4)))
        >>> take_masks(layer)
        >>> type(layer).__name__, int(layer.weight.count_nonzero())
        ('Linear', 4)
    """
    ours = _masked_base(type(module))
    if ours is not None:
        module.__class__ = _rebased(type(module), ours, original_class(module))
    del module.__dict__["_nm_masks"]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had when it got its masks.

    Args:
        module: Any module.

    Returns:
        Its class.

    Example:
        >>> original_class(nn.Linear(8, 4)).__name__
        'Linear'
    """
    original: type[nn.Module] = getattr(type(module), "_nm_original", type(module))
    return original


@contextmanager
def masks_off(masks: Iterable[_Mask]) -> Iterator[None]:
    """Switch masks off for a while.

    Args:
        masks: The masks. Those that are off stay off.

    Yields:
        Nothing; the masks are on again afterwards.

    Example:
        >>> from lightning_step import NMMask, NMPattern
        >>> with masks_off([mask := NMMask(NMPattern(2, 4))]):
        ...     print(mask.enabled)
        False
    """
    on = [mask for mask in masks if mask.enabled]
    for mask in on:
        mask.enabled = False
    try:
        yield
    finally:
        for mask in on:
            mask.enabled = True


def _masked_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The masked class itself, which another tool may have subclassed since."""
    return next((base for base in cls.__mro__ if "_nm_original" in vars(base)), None)


def _rebased(cls: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """A class with one base exchanged. See Note [Classes on top]."""
    if cls is old or old is new:
        return new if cls is old else cls
    key = (cls, new)
    if key not in _rebased_classes:
        bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
        members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        name = cls.__name__.replace(old.__name__, new.__name__)
        _rebased_classes[key] = type(name, bases, members | {"__qualname__": name})
    return _rebased_classes[key]


def _masked_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    key = (original, attributes)
    if key not in _masked_classes:
        members: dict[str, Any] = {attribute: _masked_property(attribute) for attribute in attributes}
        members |= {"_nm_original": original, "__reduce_ex__": _reduce, "__delattr__": _delete, "__module__": __name__}
        members["train"] = _train_of(original)
        members |= recurrent_members(original, lambda module: masks_off(masks_of(module).values()))
        _masked_classes[key] = type(f"Masked{original.__name__}", (original,), members)
    return _masked_classes[key]


def _masked_property(attribute: str) -> property:
    def read(self: nn.Module) -> Any:
        if attribute not in self._parameters:
            raise _taken_away(self, attribute)
        parameter = self._parameters[attribute]
        if parameter is not None and any_sharded((parameter,)) and _keeps_what_it_reads(sys._getframe(1)):
            return parameter
        mask = masks_of(self)[attribute]
        if torch.compiler.is_compiling():  # a graph computes its own, and must not depend on what is kept
            return mask(parameter)
        return mask.shown(parameter, self.training)

    def refuse(self: nn.Module, value: Any) -> NoReturn:  # a Parameter never comes here: nn.Module registers it
        raise _taken_away(self, attribute)

    return property(read, refuse, doc="The masked weight; the latent one is registered under the same name.")


def _train_of(original: type[nn.Module]) -> Callable[..., nn.Module]:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        for mask in masks_of(self).values():
            mask.kept.drop()
        return original.train(self, mode)

    return train


def _keeps_what_it_reads(reader: FrameType) -> bool:
    """Whether a sharded weight is read by FSDP2, which makes what it reads the parameter to train.

    It does so before the first forward pass and after every ``load_state_dict``. Given the masked weight, it would gather
    and train that temporary from then on, and the optimizer's parameter would never see a gradient again.
    """
    return reader.f_code.co_name == "reset_sharded_param"


def _delete(self: nn.Module, name: str) -> None:
    if name in masks_of(self):
        raise _taken_away(self, name)
    original_class(self).__delattr__(self, name)


def _taken_away(module: nn.Module, attribute: str) -> ConfigurationError:
    return ConfigurationError(
        f"Expected the masked {attribute!r} of a {original_class(module).__name__} to stay its parameter, but got a call "
        "that puts another tensor in its place, as weight_norm, spectral_norm, torch.nn.utils.prune, parametrizations and "
        f"nn.DataParallel do. Call `strip(model)` first, or leave {attribute!r} out of the masks with `exclude`."
    )


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    reduced = tuple(object.__reduce_ex__(self, protocol))
    return (_rebuild, (original_class(self), tuple(sorted(masks_of(self)))), *reduced[2:])


def _rebuild(original: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    cls = _masked_class(original, attributes)
    return cls.__new__(cls)
