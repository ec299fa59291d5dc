"""Which tensors get masks, grouped along which dimension, and why the others are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_step.errors import ArgumentTypeError, TargetError
from lightning_step.globs import Selection
from lightning_step.group_dims import group_dim, groups_of_channels
from lightning_step.masked_classes import original_class
from lightning_step.naming import named_modules
from lightning_step.pattern import NMPattern

__all__ = ["LeftOut", "Overrides", "Target", "Targets", "find_targets", "merge_targets"]

Overrides = Mapping[str, NMPattern | Sequence[int]]
"""Shell-style glob to another n:m, for example ``{"blocks.0.*": (1, 4)}``; the last matching entry wins."""


@dataclass(frozen=True)
class Target:
    """One tensor that gets a mask.

    Example:
        >>> find_targets(nn.Linear(8, 4), NMPattern(2, 4)).masked[0].dim
        1
    """

    name: str  # full name of the tensor, "blocks.0.fc.weight"
    kind: str  # type of the layer that owns it, "Linear"
    shape: tuple[int, ...]
    dim: int  # the dimension that holds the groups
    pattern: NMPattern
    owners: tuple[tuple[str, str], ...]  # (module name, attribute) of every layer that shares the tensor


@dataclass(frozen=True)
class LeftOut:
    """One tensor that stays dense, and why.

    Example:
        >>> find_targets(nn.Linear(8, 4), NMPattern(2, 4)).left_out[0].reason
        '1-D (a bias or a scale)'
    """

    name: str
    shape: tuple[int, ...]
    reason: str


class Targets(NamedTuple):
    """Every parameter of a model, in one of two lists.

    Example:
        >>> targets = find_targets(nn.Linear(8, 4), NMPattern(2, 4))
        >>> len(targets.masked), len(targets.left_out)
        (1, 1)
    """

    masked: tuple[Target, ...]
    left_out: tuple[LeftOut, ...]


def merge_targets(parts: Sequence[Targets]) -> Targets:
    """All that some optimizer trains masks for, and the rest with the reason.

    Args:
        parts: What each optimizer of one model masks and leaves out.

    Returns:
        One entry per tensor.

    Example:
        >>> one, other = (find_targets(nn.Linear(8, 4), NMPattern(2, 4), exclude=glob) for glob in ([], ["bias"]))
        >>> len(merge_targets([one, other]).masked)
        1
    """
    held = {target.name: target for part in parts for target in part.masked}
    left_out = {entry.name: entry for part in parts for entry in part.left_out}
    return Targets(tuple(held.values()), tuple(e for name, e in left_out.items() if name not in held))


class _Use(NamedTuple):
    """One layer's use of one parameter."""

    module_name: str
    attribute: str
    module: nn.Module

    @property
    def tensor_name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute


def find_targets(
    model: nn.Module,
    pattern: NMPattern,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    min_weights: int = 0,
) -> Targets:
    """Decide for every parameter whether it gets a mask.

    Args:
        model: The model. Not modified.
        pattern: The n:m pattern of every tensor that ``overrides`` does not name.
        include: Shell-style globs over module and tensor names; only what one matches gets a mask. None: everything.
            A glob that matches a container covers all beneath it.
        exclude: Globs of what stays dense; they win over ``include``.
        overrides: Globs of what gets another n:m.
        min_weights: Tensors with fewer weights stay dense. 256 is the smallest tile that sparse hardware takes.

    Returns:
        The tensors to mask, and those left out with the reason, both in the model's order.

    Raises:
        TargetError: If a glob matches nothing, or no tensor is left to mask.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
        >>> targets = find_targets(model, NMPattern(2, 4))
        >>> [t.name for t in targets.masked], targets.left_out[0].reason
        (['2.weight'], 'size 3 along dim 1 is not divisible by m=4')
    """
    selection = Selection.over(model, include, exclude, _as_patterns(overrides or {}))
    masked: list[Target] = []
    left_out: list[LeftOut] = []
    for uses in _uses(model):
        parameter = uses[0].module._parameters[uses[0].attribute]
        assert parameter is not None  # _uses skips absent parameters
        shape = () if is_lazy(parameter) else tuple(parameter.shape)
        target = _judge(uses, parameter, pattern, selection, min_weights)
        if isinstance(target, Target):
            masked.append(target)
        else:
            left_out.append(LeftOut(uses[0].tensor_name, shape, target))
    if not masked:
        raise TargetError(_nothing_eligible(left_out))
    return Targets(tuple(masked), tuple(left_out))


def _judge(
    uses: list[_Use], parameter: nn.Parameter, pattern: NMPattern, selection: Selection, min_weights: int
) -> Target | str:
    """The target, or the reason why it is none."""
    names = [use.tensor_name for use in uses]
    if is_lazy(parameter):
        return "not initialized yet (run one batch through the lazy layer first)"
    if parameter.dim() < 2:
        return "1-D (a bias or a scale)"
    refused = selection.refusal(names)
    if refused is not None:
        return refused
    places = {group_dim(use.module, use.attribute) for use in _products(uses)}
    if _is_tied_embedding(uses) and not selection.names_exactly(names):
        return f"tied to an embedding (name {names[-1]!r} in `include` to mask both)"
    if None in places or len(places) > 1:
        return _why_not_a_product(uses, places)
    pattern = selection.override(names) or pattern
    dim = places.pop()
    assert dim is not None  # checked just above
    reason = _why_not_this_tensor(uses[0], parameter, pattern, dim, min_weights)
    if reason is not None:
        return reason
    owners = tuple((use.module_name, use.attribute) for use in uses)
    return Target(names[0], _kind(_products(uses)[0]), tuple(parameter.shape), dim, pattern, owners)


def _why_not_this_tensor(use: _Use, parameter: nn.Parameter, pattern: NMPattern, dim: int, min_weights: int) -> str | None:
    if not parameter.requires_grad:
        return "not trainable"
    if not parameter.dtype.is_floating_point:
        return f"not a real floating-point tensor ({parameter.dtype})"
    if parameter.numel() < min_weights:
        return f"too small ({parameter.numel()} weights < min_weights={min_weights})"
    size = parameter.shape[dim]
    groups = groups_of_channels(use.module)
    if size // groups % pattern.m:
        within = f" within each of {groups} groups" if groups > 1 else ""
        return f"size {size // groups} along dim {dim}{within} is not divisible by m={pattern.m}"
    return None


def _uses(model: nn.Module) -> Iterator[list[_Use]]:
    """Every parameter once, with all the layers that share it."""
    by_parameter: dict[int, list[_Use]] = {}
    for module_name, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                by_parameter.setdefault(id(parameter), []).append(_Use(module_name, attribute, module))
    yield from by_parameter.values()


def _products(uses: list[_Use]) -> list[_Use]:
    """The uses that say how to group; all of them where there are only embeddings, which are then left out."""
    # An embedding is a look-up, not a product: only ever masked together with the head that it is tied to.
    return [use for use in uses if not isinstance(use.module, nn.Embedding)] or uses


def _is_tied_embedding(uses: list[_Use]) -> bool:
    embeddings = [isinstance(use.module, nn.Embedding) for use in uses]
    return any(embeddings) and not all(embeddings)


def _why_not_a_product(uses: list[_Use], places: set[int | None]) -> str:
    if None in places:
        stranger = next(use for use in _products(uses) if group_dim(use.module, use.attribute) is None)
        if isinstance(stranger.module, nn.Embedding):
            return "an embedding: a look-up, not a product"
        if isinstance(stranger.module, ParametrizationList):
            return f"parametrized: {type(stranger.module[0]).__name__} computes the weight from it"
        return f"{_kind(stranger)}.{stranger.attribute} is not a weight that N:M masks know"
    return f"shared by layers that group it along different dimensions {sorted(d for d in places if d is not None)}"


def _kind(use: _Use) -> str:
    return str(original_class(use.module).__name__)


def _as_patterns(overrides: Overrides) -> dict[str, NMPattern]:
    patterns: dict[str, NMPattern] = {}
    for glob, value in overrides.items():
        if isinstance(value, NMPattern):
            patterns[glob] = value
        elif isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) != 2:
            raise ArgumentTypeError(
                f"Expected `overrides[{glob!r}]` to be an NMPattern or two integers [n, m], but got {value!r}."
            )
        else:
            patterns[glob] = NMPattern(*value)
    return patterns


def _nothing_eligible(left_out: list[LeftOut]) -> str:
    seen: dict[str, str] = {}
    for entry in left_out:
        seen.setdefault(entry.reason, entry.name)
    why = "; ".join(f"{name}: {reason}" for reason, name in list(seen.items())[:6]) or "the model has no parameters"
    return (
        f"Expected at least one tensor to mask, but got none: all {len(left_out)} parameters are left out ({why}). "
        "Widen `include`, shorten `exclude`, or choose an m that divides the layers' input size."
    )
