"""From a trained model to one verified file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_step.errors import ConfigurationError, ExportError, ViolationError
from lightning_step.export.files import atomic_write, check_writable
from lightning_step.export.manifest import HEADER_KEY, Format, Manifest, SparseTensor
from lightning_step.functional import apply_mask, find_violation, pack_nm
from lightning_step.naming import plain_name
from lightning_step.parametrization import NMMask, nm_masks
from lightning_step.sharding import any_sharded, is_first, on_one, reshard, whole
from lightning_step.targets import Targets

__all__ = ["FORMATS", "Exported", "check_format", "export_model"]

FORMATS: tuple[Format, ...] = ("dense", "packed")
VALUES, INDEX = ".nm_values", ".nm_index"
_SAFE = (
    "The model is still in memory (after a Trainer, as `trainer.lightning_module`); "
    "write it with `export_model(model, path)`."
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Example:
        >>> Exported(Path("model.safetensors"), Manifest("dense", {}), 100).bytes
        100
    """

    path: Path
    manifest: Manifest
    bytes: int


def check_format(format: str) -> Format:
    """Refuse a format nobody writes.

    Args:
        format: Its name.

    Returns:
        The same name.

    Raises:
        ConfigurationError: If it is unknown.

    Example:
        >>> check_format("packed")
        'packed'
    """
    for known in FORMATS:
        if format == known:
            return known
    raise ConfigurationError(f"Expected `format` to be one of {list(FORMATS)}, but got {format!r}.")


@torch.no_grad()
def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Format = "dense",
    *,
    targets: Targets | None = None,
    one_shot: bool = False,
    info: Mapping[str, Any] | None = None,
) -> Exported:
    r"""Write :math:`\Pi_T(w_T) \odot w_T` to one safetensors file, verified, its manifest in the header.

    The model is left as it is. The file is there whole or not at all. If the model is sharded (FSDP2), call this on every
    process: tensors are gathered, the first process writes, and all return the same or raise the same.

    Args:
        model: A model with masks, or, with ``targets``, one whose weights hold their zeros already.
        path: The file to write.
        format: ``"dense"`` for plain keys and exact zeros, ``"packed"`` for kept values and mask ranks.
        targets: What must hold its pattern, for a model without masks (after `strip`). Verified, never pruned.
        one_shot: Apply masks that are still off, too: one-shot magnitude pruning of what was trained dense.
        info: Plain values to keep in the manifest.

    Returns:
        Path, manifest and size.

    Raises:
        ConfigurationError: If no mask is on, the path cannot be written, the format is unknown, or a tensor that should
            hold a pattern is not in the model's state dict.
        PatternError: If the pattern is one that nobody packs; see `pack_nm`.
        ArgumentTypeError: If ``info`` holds other than plain values.
        ViolationError: If a tensor does not hold its pattern.
        ExportError: If writing fails midway, for instance on a full disk. The old file is left as it was.

    Example:
        >>> import tempfile
        >>> from lightning_step import NMPattern, apply_nm_masks, load_sparse
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> exported = export_model(layer, tempfile.mkdtemp() + "/layer.safetensors", "packed")
        >>> plain = load_sparse(exported.path, nn.Linear(8, 4))
        >>> torch.equal(plain.weight, layer.weight)
        True
    """
    format = check_format(format)
    reshard(model)
    tensors, aliases = _tensors(model)
    if not any_sharded(tensors.values()):
        path = _checked(path)
        masks = {} if targets is not None else _masks_to_apply(model, one_shot)
        hard = {name: _harden(tensor, masks.get(name)) for name, tensor in tensors.items()}
        return _export(hard, aliases, masks, path, format, targets, info)
    # All processes are here, and none leaves before it knows how the first one fared.
    checked = on_one(lambda: _checked(path))
    masks = {} if targets is not None else _masks_to_apply(model, one_shot)
    hard = _gathered(tensors, masks)
    return on_one(lambda: _export(hard, aliases, masks, checked, format, targets, info))


def _gathered(tensors: Mapping[str, Tensor], masks: Mapping[str, NMMask]) -> dict[str, Tensor]:
    """What `_harden` makes of the whole tensors; only on the process that writes, so that memory holds them once."""
    hard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if is_first():
            hard[name] = _harden(complete, masks.get(name))
    return hard


def _export(
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
    masks: Mapping[str, NMMask],
    path: Path,
    format: Format,
    targets: Targets | None,
    info: Mapping[str, Any] | None,
) -> Exported:
    sparse = _sparse_entries(tensors, aliases, masks, targets)
    for name, entry in sparse.items():
        _verify(name, tensors[name], entry)
    manifest = Manifest(format, sparse, aliases, dict(info or {}))
    if format == "packed":
        tensors = _packed(tensors, sparse)
    return Exported(path, manifest, _write(path, tensors, {"format": "pt", HEADER_KEY: manifest.to_json()}))


def _checked(path: str | os.PathLike[str]) -> Path:
    try:
        return check_writable(path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} {_SAFE}") from error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    if "__metadata__" in tensors:  # that key of the header is taken, and nobody could read the file
        raise ConfigurationError("Expected no tensor named '__metadata__', but got one. Rename it.")
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)
        return path.stat().st_size
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise ExportError(
            f"Expected to write {size:,} bytes to {str(path)!r}, but got: {error}. What was there before is untouched. "
            f"Make room, or choose another path. {_SAFE}"
        ) from error


def _masks_to_apply(model: nn.Module, one_shot: bool) -> dict[str, NMMask]:
    masks = nm_masks(model)
    chosen = {name: mask for name, mask in masks.items() if mask.enabled or one_shot}
    if not chosen:
        raise ConfigurationError(
            f"Expected a model with learned masks, but got {len(masks)} masks of which none is on: training ended before "
            "masks began. Train past the switch, or prune by magnitude now with `one_shot=True`."
        )
    return chosen


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state dict once, and the other names of those that several names share."""
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


def _harden(tensor: Tensor, mask: NMMask | None) -> Tensor:
    if mask is not None:
        tensor = apply_mask(tensor, mask.mask(tensor))
    return tensor.to("cpu", memory_format=torch.contiguous_format, copy=True)


def _sparse_entries(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], masks: Mapping[str, NMMask], targets: Targets | None
) -> dict[str, SparseTensor]:
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


def _verify(name: str, tensor: Tensor, entry: SparseTensor) -> None:
    bad = find_violation(tensor, entry.pattern, entry.dim)
    if bad is not None:
        raise ViolationError(
            f"Expected {name!r} to hold {entry.pattern} along dim {entry.dim}, but got {bad.nonzeros} non-zero weights in "
            f"group {bad.index} (and {bad.groups - 1} more bad groups). Export never prunes: train it with a mask, or "
            "exclude it."
        )


def _packed(tensors: Mapping[str, Tensor], sparse: Mapping[str, SparseTensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in sparse:
            packed = pack_nm(tensor, sparse[name].pattern, sparse[name].dim)
            parts = {name + VALUES: packed.values, name + INDEX: packed.index}
        else:
            parts = {name: tensor}
        taken = [part for part in parts if part in stored or (part != name and part in tensors)]
        if taken:
            raise ConfigurationError(f"Expected no tensor named {taken[0]!r} beside {name!r}, but got one. Rename it.")
        stored |= parts
    return stored
