"""Verified sparse files, and back."""

from lightning_step.export.files import atomic_write, check_writable
from lightning_step.export.load import load_sparse, read_manifest
from lightning_step.export.manifest import Format, Manifest, SparseTensor
from lightning_step.export.write import FORMATS, Exported, check_format, export_model

__all__ = [
    "FORMATS",
    "Exported",
    "Format",
    "Manifest",
    "SparseTensor",
    "atomic_write",
    "check_format",
    "check_writable",
    "export_model",
    "load_sparse",
    "read_manifest",
]
