"""From a file back to dense tensors or into a model."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_step.errors import ConfigurationError, FileFormatError, PatternError
from lightning_step.export.digests import checking
from lightning_step.export.manifest import HEADER_KEY, INDEX, VALUES, Manifest
from lightning_step.export.semi_structured import active_backend, to_semi_structured, why_not_packed
from lightning_step.functional import Packed, unpack_nm
from lightning_step.naming import plain_name
from lightning_step.parametrization import nm_masks

__all__ = ["load_sparse", "read_manifest"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


Backend = Literal["auto", "dense", "semi_structured"]
_BACKENDS: tuple[Backend, ...] = ("auto", "dense", "semi_structured")


@overload
def load_sparse(
    path: str | os.PathLike[str],
    model: ModuleT,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    check_digests: bool = True,
) -> ModuleT: ...


@overload
def load_sparse(
    path: str | os.PathLike[str],
    model: None = None,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    check_digests: bool = True,
) -> dict[str, Tensor]: ...


def load_sparse(
    path: str | os.PathLike[str],
    model: ModuleT | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    check_digests: bool = True,
) -> ModuleT | dict[str, Tensor]:
    """Read a file that this package wrote, whatever its format.

    Tensors keep the dtype of the file, and those of a model the dtype of the model. Tensors that are stored dense are views
    of the mapped file as long as they stay on the CPU; packed ones are unpacked one by one.

    Args:
        path: The file.
        model: A model of the same architecture, plain or with masks, to load into. None: return the tensors.
        device: Where to put the tensors, or the model. None: the CPU, and a model stays where it is.
        backend: ``"semi_structured"`` hands the loaded model to `to_semi_structured`, ``"dense"`` does not, and ``"auto"``
            does where that helps: in evaluation mode, without masks, on a CUDA device that takes one of the 2:4 layers.
        check_digests: Compare every tensor with its SHA-256 in the manifest, which reads the whole file.

    Returns:
        The model, or every tensor by name, dense.

    Raises:
        FileFormatError: If the file is missing, truncated, changed after it was written, not ours, newer than this version,
            or of another model; then every missing, unexpected and mis-shaped name is listed. The model is left as it was.
        ConfigurationError: If the model has no memory for its weights (meta device), ``device`` or ``backend`` is none that
            there is, or ``"semi_structured"`` comes without a model, or with one that has masks.

    Example:
        >>> import tempfile
        >>> from lightning_step import NMPattern, apply_nm_masks, export_model
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> path = export_model(layer, tempfile.mkdtemp() + "/layer.safetensors").path
        >>> sorted(load_sparse(path))
        ['bias', 'weight']
    """
    path, place = Path(path), _checked_device(device)
    _check_backend(backend, model)
    manifest, stored = _read(path)
    shapes = _shapes(path, manifest, stored)
    if model is not None:
        _check_fits(path, model, shapes)  # before anything is unpacked
    with checking(path, manifest if check_digests else replace(manifest, sha256={}), stored):
        tensors = stored if manifest.format == "dense" else _unpack_all(path, manifest, stored)
    if model is None:
        tensors = {name: tensor if place is None else tensor.to(place) for name, tensor in tensors.items()}
    tensors |= {alias: tensors[name] for alias, name in manifest.aliases.items()}
    if model is None:
        return tensors
    _load_into(path, model, tensors)
    if place is not None:
        model.to(place)
    if backend == "semi_structured" or (backend == "auto" and _would_help(model, manifest)):
        to_semi_structured(model)
    return model


def _checked_device(device: torch.device | str | None) -> torch.device | None:
    try:
        place = None if device is None else torch.device(device)
        if place is not None:
            torch.empty(0, device=place)  # one that is not there is told before the file is read
        if place is None or place.type != "meta":
            return place
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigurationError(f"Expected `device` to be one of this machine, but got {device!r}: {error}") from error
    raise ConfigurationError("Expected `device` to hold weights, but got the meta device.")


def _check_backend(backend: str, model: nn.Module | None) -> None:
    if backend not in _BACKENDS:
        raise ConfigurationError(f"Expected `backend` to be one of {list(_BACKENDS)}, but got {backend!r}.")
    if backend == "semi_structured" and (model is None or nm_masks(model)):
        raise ConfigurationError(
            "Expected a model without masks for `backend='semi_structured'`, but got "
            f"{'no model' if model is None else 'one with masks'}. Such weights live in layers that no longer train."
        )


def _would_help(model: nn.Module, manifest: Manifest) -> bool:
    """Whether a layer would be packed; a model that may go on training keeps its weights."""
    if model.training or nm_masks(model):
        return False
    state = _state(model)
    for name, entry in manifest.sparse.items():
        weight = state[name]
        backend, _ = active_backend(weight.device)
        shape = entry.shape[::-1] if entry.dim == 0 else entry.shape  # (in, out) of a Hugging Face Conv1D
        if backend and (entry.n, entry.m) == (2, 4) and not why_not_packed(shape, weight.dtype, backend):
            return True
    return False


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
    with _opened(path) as file:
        return _manifest(path, file.metadata())


def _read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    with _opened(path) as file:
        manifest = _manifest(path, file.metadata())
        return manifest, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileFormatError:
        raise
    # The others are what torch makes of absurd sizes, which safetensors lets pass.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(
            f"Expected a whole safetensors file, but got {str(path)!r}, which is truncated or damaged ({error}). "
            "Copy or export it again."
        ) from error


def _check_readable(path: Path) -> None:
    try:
        if path.is_fifo():  # to open it would wait for a writer
            raise OSError(errno.EINVAL, "Not a file but a pipe")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise FileFormatError(
            f"Expected a readable file at `path`, but got {str(path)!r}: {getattr(error, 'strerror', None) or error}."
        ) from error


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


def _shapes(path: Path, manifest: Manifest, stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of all dense tensors by all their names; makes sure that file and manifest belong together."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if manifest.format == "packed":
        for name, entry in manifest.sparse.items():
            _check_packed(path, name, stored)
            del shapes[name + VALUES], shapes[name + INDEX]
            shapes[name] = entry.shape
    lost = sorted({*manifest.sparse, *manifest.aliases.values()} - shapes.keys())
    lost += sorted(name for name, entry in manifest.sparse.items() if name in shapes and shapes[name] != entry.shape)
    if lost:
        raise FileFormatError(
            f"Expected {lost[0]!r} in {str(path)!r} in the shape that its manifest says, but got no such tensor. "
            "The file and its manifest do not belong together; export it again."
        )
    twice = sorted(manifest.aliases.keys() & shapes.keys())
    if twice:
        raise FileFormatError(
            f"Expected every name in {str(path)!r} once, but got {twice[0]!r} as a tensor and in its manifest as another "
            "name of one. The file is damaged; export it again."
        )
    return shapes | {alias: shapes[name] for alias, name in manifest.aliases.items()}


def _check_packed(path: Path, name: str, stored: Mapping[str, Tensor]) -> None:
    index = stored.get(name + INDEX)
    if name + VALUES not in stored or index is None or index.dtype != torch.uint8 or index.dim() != 1 or name in stored:
        raise FileFormatError(
            f"Expected {name + VALUES!r} and {name + INDEX!r} (bytes) for {name!r} in {str(path)!r}, as its manifest says, "
            f"but got {sorted(stored)[:5]}. The file is damaged; export it again."
        )


def _unpack_all(path: Path, manifest: Manifest, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(stored)
    for name, entry in manifest.sparse.items():
        packed = Packed(tensors.pop(name + VALUES), tensors.pop(name + INDEX))
        try:
            tensors[name] = unpack_nm(packed, entry.pattern, entry.shape, entry.dim)
        except PatternError as error:
            raise FileFormatError(f"Expected {name!r} in {str(path)!r} to unpack, but got: {error}") from error
    return tensors


def _check_fits(path: Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = _state(model)
    if any(value.is_meta for value in wanted.values()):
        raise ConfigurationError(
            f"Expected a model with memory for its weights, but got {type(model).__name__} on the meta device. "
            "Call `model.to_empty(device='cpu')` first."
        )
    missing = sorted(wanted.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - wanted.keys())
    misshaped = [
        f"{name} {shapes[name]} in the file, {tuple(wanted[name].shape)} in the model"
        for name in sorted(wanted.keys() & shapes.keys())
        if shapes[name] != tuple(wanted[name].shape)
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


@torch.no_grad()
def _load_into(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted, ready = _state(model), {}
    for name, value in wanted.items():  # all are converted before the first is copied
        try:
            if not torch.can_cast(tensors[name].dtype, value.dtype):
                raise TypeError("it would lose what it means")
            ready[name] = tensors[name].to(value.dtype)
        except (RuntimeError, TypeError) as error:
            raise FileFormatError(
                f"Expected {name!r} in {str(path)!r} to become {value.dtype}, as in {type(model).__name__}, but got "
                f"{tensors[name].dtype} ({error}). Load the file without a model and convert it yourself."
            ) from error
    for name, value in wanted.items():  # state_dict shares storage with the model
        value.copy_(ready[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
