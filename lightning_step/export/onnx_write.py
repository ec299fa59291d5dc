"""Writes an ONNX model, its weights beside it in a second file where one would be too large.

Note [Two files, one change]
    A protobuf message holds at most 2 GiB. Beyond that the weights go into ``model.onnx.<digest>.data``, and the model names
    that file. The digest is that of the weights, so new ones never overwrite those that the old model needs: data first,
    then the model in one rename, then the old data are removed. A crash leaves the old pair or the new one whole, and at
    worst a data file that nobody names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from lightning_step.errors import ConfigurationError, ExportError
from lightning_step.export.files import atomic_write

__all__ = ["MAX_BYTES", "write_onnx"]

MAX_BYTES = 2**31 - 1  # of any protobuf message
_SMALL = 1024  # bytes of a tensor that stays in the model: shapes and scales, which graphs are optimized by
_ALIGNED = 4096  # tensors begin at a page, so that a runtime can map them


def write_onnx(path: Path, proto: Any, max_bytes: int = MAX_BYTES) -> Path | None:
    """Write a model; see Note [Two files, one change].

    Args:
        path: The file.
        proto: An ``onnx.ModelProto``. If its weights go into a file of their own they are taken out of it.
        max_bytes: How large one file may be.

    Returns:
        The file with the weights; None if all is in one.

    Raises:
        ConfigurationError: If the model is too large even without its weights.
        ExportError: If writing fails midway. What was there before is left as it was.

    Example:
        >>> import onnx  # doctest: +SKIP
        >>> write_onnx(Path("model.onnx"), onnx.load("other.onnx"), max_bytes=100_000)  # doctest: +SKIP
        PosixPath('model.onnx.5feceb66ffc86f38.data')
    """
    large = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) >= _SMALL]
    weights = sum(len(tensor.raw_data) for tensor in large)
    # Asked for its size, a message beyond 2 GiB fails: the weights are counted first.
    beside = weights > max_bytes or proto.ByteSize() > max_bytes
    size = weights if beside else proto.ByteSize()
    before = _data_of(path)
    data = path.with_name(f"{path.name}.{_digest(large)}.data") if beside else None
    try:
        if data is not None:
            _write_data(data, large)
        _write_model(path, proto, max_bytes, new=data if data not in before else None)
    except OSError as error:
        raise ExportError(
            f"Expected to write {size:,} bytes to {str(path)!r}, but got: {error}. What was there before is untouched. "
            "Make room, or choose another path."
        ) from error
    for old in before - {data}:
        old.unlink(missing_ok=True)
    return data


def _write_model(path: Path, proto: Any, max_bytes: int, new: Path | None) -> None:
    try:
        if proto.ByteSize() > max_bytes:
            raise ConfigurationError(
                f"Expected a graph of at most {max_bytes:,} bytes, which is what one ONNX file can hold, but got "
                f"{proto.ByteSize():,} bytes without the weights. Export the model in parts."
            )
        with atomic_write(path) as temporary:
            temporary.write_bytes(proto.SerializeToString())
    except (OSError, ConfigurationError):
        if new is not None:
            new.unlink(missing_ok=True)
        raise


def _write_data(path: Path, tensors: list[Any]) -> None:
    """Move what is in the tensors to a file, and leave word of where it is."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    places = []
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            places.append((file.tell(), len(tensor.raw_data)))
            file.write(tensor.raw_data)
    for tensor, (offset, length) in zip(tensors, places, strict=True):
        set_external_data(tensor, path.name, offset=offset, length=length)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL


def _digest(tensors: list[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(len(tensor.raw_data).to_bytes(8, "little"))
        digest.update(tensor.raw_data)
    return digest.hexdigest()[:16]


def _data_of(path: Path) -> set[Path]:
    """The data files of a model that is there already, as far as they are of our making."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    return {each for each in path.parent.iterdir() if ours.fullmatch(each.name) and each.is_file()}
