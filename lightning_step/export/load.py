"""From a file back to dense tensors or into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_step.errors import FileFormatError, PatternError
from lightning_step.export.manifest import HEADER_KEY, Manifest
from lightning_step.export.write import INDEX, VALUES
from lightning_step.functional import Packed, unpack_nm

__all__ = ["load_sparse", "read_manifest"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@overload
def load_sparse(path: str | os.PathLike[str], model: ModuleT) -> ModuleT: ...


@overload
def load_sparse(path: str | os.PathLike[str], model: None = None) -> dict[str, Tensor]: ...


def load_sparse(path: str | os.PathLike[str], model: ModuleT | None = None) -> ModuleT | dict[str, Tensor]:
    """Read a file that this package wrote, whatever its format.

    Args:
        path: The file.
        model: A model of the same architecture, plain or with masks, to load into. None: return the tensors.

    Returns:
        The model, or every tensor by name, dense, on the CPU.

    Raises:
        FileFormatError: If the file is missing, truncated, not ours, newer than this version, or of another model; then
            every missing, unexpected and mis-shaped name is listed and the model is left as it was.

    Example:
        >>> import tempfile
        >>> from lightning_step import NMPattern, apply_nm_masks, export_model
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> path = export_model(layer, tempfile.mkdtemp() + "/layer.safetensors").path
        >>> sorted(load_sparse(path))
        ['bias', 'weight']
    """
    path = Path(path)
    manifest, stored = _read(path)
    tensors = stored if manifest.format == "dense" else _unpack_all(path, manifest, stored)
    _check_belongs(path, manifest, tensors)
    tensors |= {alias: tensors[name] for alias, name in manifest.aliases.items()}
    if model is None:
        return tensors
    _load_into(path, model, tensors)
    return model


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read only the manifest of a file.

    Args:
        path: The file.

    Returns:
        Its manifest.

    Raises:
        FileFormatError: If the file is missing, truncated, not ours or newer than this version.

    Example:
        >>> read_manifest("/nonexistent")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a readable file at `path`, but got '/nonexistent': ...
    """
    path = Path(path)
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return _manifest(path, file.metadata())
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            manifest = _manifest(path, file.metadata())
            return manifest, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise FileFormatError(
            f"Expected a readable file at `path`, but got {str(path)!r}: {error.strerror or error}."
        ) from error


def _damaged(path: Path, error: SafetensorError) -> FileFormatError:
    return FileFormatError(
        f"Expected a whole safetensors file, but got {str(path)!r}, which is truncated or damaged ({error}). "
        "Copy or export it again."
    )


def _manifest(path: Path, metadata: Mapping[str, str] | None) -> Manifest:
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise FileFormatError(
            f"Expected a file written by lightning-step, but got {str(path)!r}, whose header holds no manifest. "
            "Read other safetensors files with safetensors.torch.load_file."
        )
    try:
        return Manifest.from_json(text)
    except FileFormatError as error:
        raise FileFormatError(f"Expected to read the manifest of {str(path)!r}, but got: {error}") from error


def _unpack_all(path: Path, manifest: Manifest, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, entry in manifest.sparse.items():
        values, index = stored.pop(name + VALUES, None), stored.pop(name + INDEX, None)
        if values is None or index is None or index.dtype != torch.uint8 or index.dim() != 1:
            raise FileFormatError(
                f"Expected {name + VALUES!r} and {name + INDEX!r} (bytes) in {str(path)!r}, as its manifest says, but got "
                f"{sorted(stored)[:5]}. The file is damaged; export it again."
            )
        try:
            tensors[name] = unpack_nm(Packed(values, index), entry.pattern, entry.shape, entry.dim)
        except PatternError as error:
            raise FileFormatError(f"Expected {name!r} in {str(path)!r} to unpack, but got: {error}") from error
    return tensors | stored


def _check_belongs(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    lost = sorted({*manifest.sparse, *manifest.aliases.values()} - tensors.keys())
    lost += sorted(name for name, entry in manifest.sparse.items() if name in tensors and tensors[name].shape != entry.shape)
    if lost:
        raise FileFormatError(
            f"Expected {lost[0]!r} in {str(path)!r} in the shape that its manifest says, but got no such tensor. "
            "The file and its manifest do not belong together; export it again."
        )


@torch.no_grad()
def _load_into(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    problems = [
        f"{label}: {', '.join(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise FileFormatError(
            f"Expected {str(path)!r} to hold the tensors of {type(model).__name__}, but got a file of another model. "
            + "; ".join(problems)
            + "."
        )
    for name, value in wanted.items():  # state_dict shares storage with the model
        value.copy_(tensors[name])
