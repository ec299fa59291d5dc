"""Scalars and texts of TensorBoard event files, as far as the files can be read.

Note [Reading by hand]
    TensorBoard's own accumulator checks every byte of every picture and histogram in plain Python, stops at a damaged record
    without a word, and thins curves at random. An event file is a row of records (length, its checksum, data, their
    checksum), so they are read here one by one: what is large and no scalar is skipped, and damage is told.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from lightning_step.figures import Curve

__all__ = ["EVENT_FILES", "EventLog", "read_events"]

EVENT_FILES = "*tfevents*"
_CHECKED = 4096  # bytes; the checksum of longer records is not computed, which plain Python takes long for
_LARGE = 2**24  # bytes; no scalar and no text we show is in a longer record
_TEXT = 20_000  # characters of one text that are kept


@dataclass
class EventLog:
    """What the event files of one folder hold.

    Example:
        >>> EventLog().scalars
        {}
    """

    scalars: dict[str, Curve] = field(default_factory=dict)  # by tag; of two values at one step the later one
    texts: dict[str, str] = field(default_factory=dict)  # by tag, the newest
    problems: list[str] = field(default_factory=list)  # what could not be read


class _DamagedError(Exception):
    """The rest of a file cannot be read."""


def read_events(folder: str | os.PathLike[str]) -> EventLog:
    """Read every event file that lies in a folder itself, oldest first.

    Args:
        folder: The folder of one run.

    Returns:
        All that could be read, and what could not.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     writer.add_scalar("loss", 0.5, 10)
        >>> read_events(writer.log_dir).scalars
        {'loss': Curve(steps=(10,), values=(0.5,))}
    """
    log, points = EventLog(), dict[str, dict[int, float]]()
    for path in sorted(path for path in Path(folder).glob(EVENT_FILES) if not path.is_dir()):
        count = 0
        try:
            for record in _records(path):
                _take(record, points, log.texts)
                count += 1
        except (_DamagedError, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            log.problems.append(f"{path.name}: {reason}; {count:,} records before that were read")
    for tag, values in points.items():
        steps = sorted(values)
        log.scalars[tag] = Curve(tuple(steps), tuple(values[step] for step in steps))
    return log


def _records(path: Path) -> Iterator[bytes]:
    if not path.is_file():  # to open a pipe would wait for a writer
        raise _DamagedError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        while head := file.read(12):
            yield from _record(file, head, size)


def _record(file: BinaryIO, head: bytes, size: int) -> Iterator[bytes]:
    """One record; none if it is too large to be of interest."""
    if len(head) < 12:
        raise _DamagedError("it ends within a record")
    length = _length(head)
    if file.tell() + length + 4 > size:
        raise _DamagedError("it ends within a record")
    if length > _LARGE:
        file.seek(length + 4, os.SEEK_CUR)
        return
    data, (check,) = file.read(length), struct.unpack("<I", file.read(4))
    if length <= _CHECKED and _checksum(data) != check:
        raise _DamagedError("a record is damaged")
    yield data


@lru_cache(maxsize=1024)  # most records of a file are as long as others
def _length(head: bytes) -> int:
    length, check = struct.unpack("<QI", head)
    if _checksum(head[:8]) != check:
        raise _DamagedError("a record is damaged")
    return int(length)


def _checksum(data: bytes) -> int:
    # What SummaryWriter itself checksums with; slow to import, and only needed here.
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return int(masked_crc32c(data))


def _take(record: bytes, points: dict[str, dict[int, float]], texts: dict[str, str]) -> None:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with tensorboard, as slow to import
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        event = Event.FromString(record)
    except DecodeError as error:
        raise _DamagedError("a record is damaged") from error
    for value in event.summary.value:
        if value.HasField("simple_value"):
            points.setdefault(value.tag, {})[event.step] = value.simple_value
        elif value.HasField("tensor"):
            _take_tensor(value, event.step, points, texts)


def _take_tensor(value: Any, step: int, points: dict[str, dict[int, float]], texts: dict[str, str]) -> None:
    """Texts, and the scalars of writers that log them as tensors."""
    plugin, tensor = value.metadata.plugin_data.plugin_name, value.tensor
    if plugin == "text" or (not plugin and value.tag in texts):
        text = b"\n".join(tensor.string_val).decode("utf-8", "replace")
        texts[value.tag] = text if len(text) <= _TEXT else f"{text[:_TEXT]} …"
    elif plugin == "scalars" or (not plugin and value.tag in points):  # only the first value of a tag names its plugin
        from tensorboard.util.tensor_util import make_ndarray

        points.setdefault(value.tag, {})[step] = float(make_ndarray(tensor).reshape(-1)[0])
