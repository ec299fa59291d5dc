"""The safetensors container, written tensor by tensor: sizes are known before anything is computed.

Note [Streaming]
    ``safetensors`` wants all tensors in memory at once. A file would then cost, on top of the model, a hardened copy of all
    of it. Here the length of the header is known first, from names, dtypes and shapes alone; then each tensor is made, put
    at its place and forgotten; at the end the header is written, with the digests of what was put there. Data lie in the
    order in which ``safetensors`` itself would put them, and the same model gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from lightning_step.errors import ConfigurationError

__all__ = ["Slot", "check_slots", "layout", "named", "raw_bytes", "write_tensors"]

# In the order in which safetensors sorts the data: the widest first, so that everything is aligned.
_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float4_e2m1fn_x2: "F4",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}
_CHUNK = 2**20  # bytes that are handed to the file at a time


class Slot(NamedTuple):
    """What is known of a tensor before it is there.

    Example:
        >>> Slot(torch.float16, (2, 3)).bytes
        12
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data.

        Returns:
            Bytes.
        """
        return math.prod(self.shape) * self.dtype.itemsize


def named(slot: Slot) -> tuple[str, list[int]]:
    """Dtype and shape as a header says them.

    Args:
        slot: Of a dtype that safetensors stores.

    Returns:
        Name of the dtype, and sizes.

    Example:
        >>> named(Slot(torch.bfloat16, (2, 3)))
        ('BF16', [2, 3])
    """
    sizes = [*slot.shape]
    if slot.dtype == torch.float4_e2m1fn_x2:  # two numbers a byte, and the header counts numbers
        sizes[-1:] = [sizes[-1] * 2] if sizes else []
    return _NAMES[slot.dtype], sizes


def raw_bytes(tensor: Tensor) -> memoryview:
    """The data of a tensor as a file holds them.

    Args:
        tensor: On the CPU.

    Returns:
        Its bytes, row-major; a view where the tensor is contiguous.

    Example:
        >>> raw_bytes(torch.tensor([1, 2], dtype=torch.int16)).tolist()
        [1, 0, 2, 0]
    """
    data: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def check_slots(slots: Mapping[str, Slot]) -> None:
    """Refuse what no safetensors file can hold.

    Args:
        slots: Dtype and shape of every tensor.

    Raises:
        ConfigurationError: If a name is the one that the header takes, or a dtype is none that safetensors stores.

    Example:
        >>> check_slots({"__metadata__": Slot(torch.uint8, (3,))})
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected no tensor named '__metadata__', but got one. Rename it.
    """
    for name, slot in slots.items():
        if name == "__metadata__":  # that key of the header is taken, and nobody could read the file
            raise ConfigurationError("Expected no tensor named '__metadata__', but got one. Rename it.")
        if slot.dtype not in _NAMES:
            raise ConfigurationError(
                f"Expected tensors of a dtype that safetensors stores, but got {name!r} of {slot.dtype}. Cast it, or leave "
                "it out of the state dict."
            )


def layout(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of a file and where the data of each tensor begins.

    Args:
        slots: Dtype and shape of every tensor, from `check_slots`.
        metadata: Strings to keep in the header.

    Returns:
        Length and header, padded to a multiple of 8 bytes; offsets from the start of the file.

    Example:
        >>> head, offsets = layout({"a": Slot(torch.uint8, (3,)), "b": Slot(torch.float32, (1,))}, {})
        >>> offsets["b"] == len(head), offsets["a"] == len(head) + 4
        (True, True)
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(slots, key=lambda name: (_RANKS[slots[name].dtype], name)):
        slot = slots[name]
        offsets[name], end = end, end + slot.bytes
        dtype, sizes = named(slot)
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def write_tensors(
    path: Path,
    slots: Mapping[str, Slot],
    metadata: Callable[[Mapping[str, str]], Mapping[str, str]],
    tensors: Iterable[tuple[str, Tensor]],
    openings: Mapping[str, bytes],
) -> dict[str, str]:
    """Write a file whose tensors are made while it is written; see Note [Streaming].

    Args:
        path: The file, which is overwritten.
        slots: Dtype and shape of every tensor, from `check_slots`.
        metadata: Makes the strings to keep in the header from the digests, of the same length for any digests.
        tensors: Every tensor once, in any order, on the CPU. Each may be forgotten as soon as the next is asked for.
        openings: What the digest of each tensor begins with.

    Returns:
        The SHA-256 of each, in hexadecimal digits.

    Raises:
        ConfigurationError: If a tensor is not the one that its slot says, or one is missing.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> one = [("a", torch.ones(2))]
        >>> digests = write_tensors(path, {"a": Slot(torch.float32, (2,))}, lambda digests: {}, one, {"a": b""})
        >>> load_file(path), digests["a"][:8]
        ({'a': tensor([1., 1.])}, '80b8fd6d')
    """
    head, offsets = layout(slots, metadata(dict.fromkeys(slots, "0" * 64)))
    digests: dict[str, str] = {}
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.truncate(len(head) + sum(slot.bytes for slot in slots.values()))
        for name, tensor in tensors:
            found = Slot(tensor.dtype, tuple(tensor.shape))
            if name not in offsets or found != slots[name]:
                raise ConfigurationError(f"Expected {name!r} as {slots.get(name)}, each once, but got {found}.")
            file.seek(offsets.pop(name))
            digests[name] = _write(file, raw_bytes(tensor), hashlib.sha256(openings[name]), pool)
        if offsets:
            raise ConfigurationError(f"Expected every tensor of the header, but got none for {sorted(offsets)[0]!r}.")
        file.seek(0)
        file.write(layout(slots, metadata(digests))[0])  # of the same length
    return digests


def _write(file: BinaryIO, data: memoryview, sha256: hashlib._Hash, pool: Executor) -> str:
    """Hash while the data go to the file."""
    hashed = pool.submit(sha256.update, data) if len(data) > _CHUNK else None
    for start in range(0, len(data), _CHUNK):
        file.write(data[start : start + _CHUNK])
    if hashed is None:
        sha256.update(data)
    else:
        hashed.result()
    return sha256.hexdigest()
