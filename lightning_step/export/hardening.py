"""What export does to a model before any format: names, masks, zeros, and the proof that they are there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_step.errors import ConfigurationError, ViolationError
from lightning_step.export.manifest import SparseTensor
from lightning_step.functional import apply_mask, find_violation
from lightning_step.naming import plain_name
from lightning_step.parametrization import NMMask, nm_masks
from lightning_step.targets import Targets

__all__ = ["harden", "masks_to_apply", "sparse_entries", "tensors_of", "verify"]


def masks_to_apply(model: nn.Module, one_shot: bool) -> dict[str, NMMask]:
    """The masks whose zeros belong in the file.

    Args:
        model: A model with masks.
        one_shot: Take masks that are still off, too.

    Returns:
        Tensor name to its mask.

    Raises:
        ConfigurationError: If there is none, or one still lets pruned weights through.

    Example:
        >>> masks_to_apply(nn.Linear(8, 4), one_shot=False)
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected a model with learned masks, but got 0 masks ...
    """
    masks = nm_masks(model)
    chosen = {name: mask for name, mask in masks.items() if mask.enabled or one_shot}
    faint = [name for name, mask in chosen.items() if not mask.prunes and not one_shot]
    if faint:
        raise ConfigurationError(
            f"Expected masks at full strength, but got {faint[0]!r} (and {len(faint) - 1} more) with pruned weights at "
            f"{masks[faint[0]].leak:.3g} of their size: training ended while masks came on. Train to the end of the decay, "
            "or prune by magnitude now with `one_shot=True`."
        )
    if not chosen:
        raise ConfigurationError(
            f"Expected a model with learned masks, but got {len(masks)} masks of which none is on: training ended before "
            "masks began. Train past the switch, or prune by magnitude now with `one_shot=True`."
        )
    return chosen


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state dict once, and the other names of those that several names share.

    Args:
        model: Any module.

    Returns:
        Tensors by plain name, nothing copied; alias to the name that the tensor goes by.

    Example:
        >>> sorted(tensors_of(nn.Linear(8, 4))[0])
        ['bias', 'weight']
    """
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if not isinstance(value, Tensor):
            continue  # extra state of some module: no weight, and safetensors holds tensors only
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value.detach()
    return tensors, aliases


def harden(tensor: Tensor, mask: NMMask | None) -> Tensor:
    """The tensor on the CPU, with the zeros of the mask in it.

    Args:
        tensor: The latent weight.
        mask: Its mask, or None to take it as it is.

    Returns:
        Contiguous, of the same dtype and shape; without a mask it may be the tensor itself.

    Example:
        >>> import torch
        >>> from lightning_step import NMPattern
        >>> harden(torch.tensor([1., 2.]), NMMask(NMPattern(1, 2)))
        tensor([0., 2.])
    """
    if mask is not None:
        tensor = apply_mask(tensor, mask.mask(tensor))
    return tensor.to("cpu").contiguous()


def sparse_entries(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], masks: Mapping[str, NMMask], targets: Targets | None
) -> dict[str, SparseTensor]:
    """What the manifest says of each tensor that has to hold a pattern.

    Args:
        tensors: From `tensors_of`.
        aliases: From `tensors_of`.
        masks: The masks that are applied.
        targets: What has to hold a pattern where there are no masks.

    Returns:
        Entry by the name the tensor goes by.

    Raises:
        ConfigurationError: If a tensor is not in the state dict.

    Example:
        >>> from lightning_step import NMPattern, find_targets
        >>> layer = nn.Linear(8, 4)
        >>> sparse_entries(tensors_of(layer)[0], {}, {}, find_targets(layer, NMPattern(2, 4)))
        {'weight': SparseTensor(n=2, m=4, dim=1, shape=(4, 8))}
    """
    patterns = {name: (mask.pattern, mask.dim) for name, mask in masks.items()}
    if targets is not None:
        patterns = {target.name: (target.pattern, target.dim) for target in targets.masked}
    entries: dict[str, SparseTensor] = {}
    for name, (pattern, dim) in patterns.items():
        tensor = tensors.get(aliases.get(name, name))
        if tensor is None:  # a state dict under other names would let the tensor pass unverified
            raise ConfigurationError(
                f"Expected the state dict to hold the tensor {name!r}, which must be {pattern}, but got only "
                f"{sorted(tensors)[:5]}, ... Export the very module whose tensors have masks or were found."
            )
        shape = tuple(tensor.shape)
        entries[aliases.get(name, name)] = SparseTensor(pattern.n, pattern.m, dim % len(shape), shape)
    return entries


def verify(name: str, tensor: Tensor, entry: SparseTensor) -> None:
    """Refuse a tensor that does not hold its pattern.

    Args:
        name: What to call it.
        tensor: With its zeros.
        entry: What it has to hold.

    Raises:
        ViolationError: With its first bad group.

    Example:
        >>> import torch
        >>> verify("weight", torch.ones(1, 4), SparseTensor(2, 4, 1, (1, 4)))
        Traceback (most recent call last):
        lightning_step.errors.ViolationError: Expected 'weight' to hold 2:4 along dim 1, but got 4 non-zero weights in ...
    """
    bad = find_violation(tensor, entry.pattern, entry.dim)
    if bad is not None:
        raise ViolationError(
            f"Expected {name!r} to hold {entry.pattern} along dim {entry.dim}, but got {bad.nonzeros} non-zero weights in "
            f"group {bad.index} (and {bad.groups - 1} more bad groups). Export never prunes: train it with a mask, or "
            "exclude it."
        )
