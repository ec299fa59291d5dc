"""From a trained model to one verified file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_step.errors import ConfigurationError, ExportError, ViolationError
from lightning_step.export.container import Slot, check_slots, write_tensors
from lightning_step.export.digests import openings
from lightning_step.export.files import atomic_write, check_writable
from lightning_step.export.hardening import harden, masks_to_apply, sparse_entries, tensors_of, verify
from lightning_step.export.manifest import HEADER_KEY, INDEX, VALUES, Format, Manifest, SparseTensor
from lightning_step.functional import Packed, pack_nm
from lightning_step.functional.packing import check_packable, index_bytes
from lightning_step.parametrization import NMMask
from lightning_step.sharding import any_sharded, is_first, on_one, reshard, whole
from lightning_step.targets import Targets

__all__ = ["FORMATS", "Exported", "check_format", "export_model", "export_tensors"]

FORMATS: tuple[Format, ...] = ("dense", "packed")
"""The formats of `export_model`, by name."""

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

    The model is left as it is. The file is there whole or not at all, and is written tensor by tensor: no second copy of the
    model is made, only one of the tensor at hand. If the model is sharded (FSDP2), call this on every
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
    tensors, aliases = tensors_of(model)
    if not any_sharded(tensors.values()):
        path = _checked(path)
        masks = {} if targets is not None else masks_to_apply(model, one_shot)
        plan = _Plan(path, format, sparse_entries(tensors, aliases, masks, targets), aliases, dict(info or {}))
        return _export(plan, tensors, lambda name: harden(tensors[name], masks.get(name)))
    # All processes are here, and none leaves before it knows how the first one fared.
    checked = on_one(lambda: _checked(path))
    masks = {} if targets is not None else masks_to_apply(model, one_shot)
    hard = _gathered(tensors, masks)

    def export() -> Exported:
        plan = _Plan(checked, format, sparse_entries(hard, aliases, masks, targets), aliases, dict(info or {}))
        return _export(plan, dict(hard), hard.pop)

    return on_one(export)


@torch.no_grad()
def export_tensors(
    tensors: Mapping[str, Tensor],
    sparse: Mapping[str, SparseTensor],
    path: str | os.PathLike[str],
    format: Format = "dense",
    *,
    masks: Mapping[str, NMMask] | None = None,
    aliases: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Exported:
    """Write tensors that no model holds: those of another file, or of a checkpoint. Every pattern is verified.

    Args:
        tensors: Each once, by name.
        sparse: What has to hold a pattern, by the same names.
        path: The file to write.
        format: See `export_model`.
        masks: What is still to be applied, by the same names.
        aliases: Other names of tensors.
        info: Plain values to keep in the manifest.

    Returns:
        Path, manifest and size.

    Raises:
        ConfigurationError: If the path cannot be written or the format is unknown.
        ViolationError: If a tensor does not hold its pattern.
        ExportError: If writing fails midway. The old file is left as it was.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/layer.safetensors"
        >>> export_tensors({"a": torch.zeros(1, 4)}, {"a": SparseTensor(2, 4, 1, (1, 4))}, path).manifest.format
        'dense'
    """
    plan = _Plan(check_writable(path), check_format(format), sparse, dict(aliases or {}), dict(info or {}), "")
    return _export(plan, tensors, lambda name: harden(tensors[name], (masks or {}).get(name)))


class _Plan(NamedTuple):
    path: Path
    format: Format
    sparse: Mapping[str, SparseTensor]
    aliases: Mapping[str, str]
    info: Mapping[str, Any]
    safe: str = _SAFE


def _gathered(tensors: Mapping[str, Tensor], masks: Mapping[str, NMMask]) -> dict[str, Tensor]:
    """What `harden` makes of the whole tensors; only on the process that writes, so that memory holds them once."""
    hard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if is_first():
            hard[name] = harden(complete, masks.get(name))
    return hard


def _export(plan: _Plan, tensors: Mapping[str, Tensor], hard: Callable[[str], Tensor]) -> Exported:
    """Write what ``hard`` makes of each tensor; of ``tensors`` only dtypes and shapes are asked."""
    manifest = Manifest(plan.format, plan.sparse, plan.aliases, plan.info)
    slots = _slots(tensors, plan)

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        return {"format": "pt", HEADER_KEY: replace(manifest, sha256=digests).to_json()}

    try:
        with atomic_write(plan.path) as temporary:
            stored = _stored(tensors, plan, hard)
            digests = write_tensors(temporary, slots, metadata, stored, openings(slots, manifest))
        manifest = replace(manifest, sha256=digests)
        return Exported(plan.path, manifest, plan.path.stat().st_size)
    except OSError as error:
        size = sum(slot.bytes for slot in slots.values())
        raise ExportError(
            f"Expected to write {size:,} bytes to {str(plan.path)!r}, but got: {error}. What was there before is untouched. "
            f"Make room, or choose another path. {plan.safe}".rstrip()
        ) from error


def _slots(tensors: Mapping[str, Tensor], plan: _Plan) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for name, tensor in tensors.items():
        parts = {name: Slot(tensor.dtype, tuple(tensor.shape))}
        if plan.format == "packed" and name in plan.sparse:
            entry = plan.sparse[name]
            check_packable(entry.pattern)
            groups = tensor.numel() // entry.m
            values, index = Slot(tensor.dtype, (groups, entry.n)), Slot(torch.uint8, (index_bytes(entry.pattern, groups),))
            parts = {name + VALUES: values, name + INDEX: index}
        taken = [part for part in parts if part in slots or (part != name and part in tensors)]
        if taken:
            raise ConfigurationError(f"Expected no tensor named {taken[0]!r} beside {name!r}, but got one. Rename it.")
        slots |= parts
    check_slots(slots)
    return slots


def _stored(tensors: Mapping[str, Tensor], plan: _Plan, hard: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, made when it is asked for and verified."""
    for name in tensors:
        tensor, entry = hard(name), plan.sparse.get(name)
        if entry is not None and plan.format == "packed":
            packed = _packed(name, tensor, entry)
            del tensor  # not needed any more while the parts are written
            yield name + VALUES, packed.values
            yield name + INDEX, packed.index
            continue
        if entry is not None:
            verify(name, tensor, entry)
        yield name, tensor


def _packed(name: str, tensor: Tensor, entry: SparseTensor) -> Packed:
    """Packing proves the pattern on its way; only where it refuses is the tensor searched again, to name it."""
    try:
        return pack_nm(tensor, entry.pattern, entry.dim)
    except ViolationError:
        verify(name, tensor, entry)
        raise


def _checked(path: str | os.PathLike[str]) -> Path:
    try:
        return check_writable(path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} {_SAFE}") from error
