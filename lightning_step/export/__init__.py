"""Verified sparse files, and back."""

from lightning_step.export.acceleration import (
    RUNTIMES,
    Acceleration,
    Verdict,
    accelerations,
    format_accelerations,
    short_form,
)
from lightning_step.export.contents import convert_file, describe_file, verify_file
from lightning_step.export.files import atomic_write, check_writable
from lightning_step.export.folder import export_folder
from lightning_step.export.load import load_sparse, read_manifest
from lightning_step.export.manifest import Format, Manifest, SparseTensor
from lightning_step.export.onnx import ExportedOnnx, export_onnx
from lightning_step.export.onnx_check import OnnxWeight, check_onnx
from lightning_step.export.semi_structured import Packing, SemiStructured, to_semi_structured
from lightning_step.export.write import FORMATS, Exported, check_format, export_model, export_tensors

__all__ = [
    "FORMATS",
    "RUNTIMES",
    "Acceleration",
    "Exported",
    "ExportedOnnx",
    "Format",
    "Manifest",
    "OnnxWeight",
    "Packing",
    "SemiStructured",
    "SparseTensor",
    "Verdict",
    "accelerations",
    "atomic_write",
    "check_format",
    "check_onnx",
    "check_writable",
    "convert_file",
    "describe_file",
    "export_folder",
    "export_model",
    "export_onnx",
    "export_tensors",
    "format_accelerations",
    "load_sparse",
    "read_manifest",
    "short_form",
    "to_semi_structured",
    "verify_file",
]
