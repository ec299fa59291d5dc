"""What the header of an exported file says, without its tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_step.errors import FileFormatError
from lightning_step.export import read_manifest
from lightning_step.export.manifest import INDEX, VALUES, Manifest

__all__ = ["ExportedFile", "find_exported", "read_exported"]


@dataclass(frozen=True)
class ExportedFile:
    """One file that `SparseExport`, `export_model` or the command line wrote.

    Example:
        >>> ExportedFile(Path("m.safetensors"), "packed", 500, 1000, {"2:4": 8}, 0.5, {}).share
        0.5
    """

    path: Path
    format: str
    bytes: int  # of the whole file
    dense_bytes: int  # of its tensors, stored dense
    patterns: Mapping[str, int]  # n:m -> how many tensors hold it
    density: float  # share of the weights in these tensors that is kept
    info: Mapping[str, Any]  # recipe and switches of the training

    @property
    def share(self) -> float:
        """Its size by that of its tensors stored dense.

        Returns:
            A fraction.
        """
        return self.bytes / max(self.dense_bytes, 1)


def read_exported(path: str | os.PathLike[str]) -> ExportedFile:
    """Read the header of one file.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        FileFormatError: If the file is missing, damaged, or of another program.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from lightning_step import NMPattern, apply_nm_masks, export_model
        >>> layer = nn.Linear(64, 64)
        >>> _ = apply_nm_masks(layer, NMPattern(1, 4))
        >>> file = read_exported(export_model(layer, tempfile.mkdtemp() + "/layer.safetensors").path)
        >>> file.patterns, file.density
        ({'1:4': 1}, 0.25)
    """
    path, manifest = Path(path), read_manifest(path)
    patterns: dict[str, int] = {}
    for entry in manifest.sparse.values():
        patterns[str(entry.pattern)] = patterns.get(str(entry.pattern), 0) + 1
    sizes = [(math.prod(entry.shape), entry.n / entry.m) for entry in manifest.sparse.values()]
    density = sum(size * kept for size, kept in sizes) / max(sum(size for size, _ in sizes), 1)
    return ExportedFile(
        path, manifest.format, path.stat().st_size, _dense_bytes(path, manifest), patterns, density, manifest.info
    )


def find_exported(folder: str | os.PathLike[str]) -> tuple[list[ExportedFile], list[str]]:
    """Read every file of this package below a folder; safetensors files of others are passed over.

    Args:
        folder: Where to look.

    Returns:
        The files, and what could not be read.

    Example:
        >>> find_exported("no/such/folder")
        ([], [])
    """
    files, problems = [], []
    for path in sorted(Path(folder).rglob("*.safetensors")):
        try:
            files.append(read_exported(path))
        except (FileFormatError, OSError) as error:
            if "holds no manifest" not in str(error):
                problems.append(str(error))
    return files, problems


def _dense_bytes(path: Path, manifest: Manifest) -> int:
    from safetensors import safe_open

    total = 0.0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            bits = re.search(r"\d+", part.get_dtype())  # BF16, F8_E4M3, I64
            size = math.prod(part.get_shape()) * (int(bits.group()) if bits else 8) / 8  # BOOL
            entry = manifest.sparse.get(name.removesuffix(VALUES))
            if name.endswith(INDEX) and name.removesuffix(INDEX) in manifest.sparse:
                continue
            total += size * entry.m / entry.n if entry is not None and name.endswith(VALUES) else size
    return round(total)
