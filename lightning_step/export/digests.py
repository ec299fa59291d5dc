"""A SHA-256 of every tensor in a file, and of what the manifest says of it.

Note [What a digest covers]
    Bytes alone would not do: the same bytes under another dtype, shape, name or dimension are another tensor. A digest is
    taken of one line of JSON, ``[name, dtype, shape, pattern, aliases]``, and the data behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lightning_step.errors import FileFormatError
from lightning_step.export.container import Slot, named, raw_bytes
from lightning_step.export.manifest import INDEX, VALUES, Manifest

__all__ = ["checking", "digest", "openings"]

_WORTH_A_THREAD = 2**22  # bytes


def openings(slots: Mapping[str, Slot], manifest: Manifest) -> dict[str, bytes]:
    r"""What each digest begins with; see Note [What a digest covers].

    Args:
        slots: Dtype and shape of every tensor of the file.
        manifest: Its manifest.

    Returns:
        One line of UTF-8 for every tensor of the file.

    Example:
        >>> import torch
        >>> openings({"bias": Slot(torch.float32, (3,))}, Manifest("dense", {}))
        {'bias': b'["bias","F32",[3],null,[]]\n'}
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in sorted(manifest.aliases.items()):
        aliases.setdefault(name, []).append(alias)
    lines: dict[str, bytes] = {}
    for stored, slot in slots.items():
        name = stored
        if manifest.format == "packed":
            name = next((stored[: -len(end)] for end in (VALUES, INDEX) if stored.endswith(end)), stored)
            name = name if name in manifest.sparse else stored
        entry = manifest.sparse.get(name)
        pattern = None if entry is None else [entry.n, entry.m, entry.dim, list(entry.shape)]
        line = [stored, *named(slot), pattern, aliases.get(name, [])]
        # A name may hold anything that JSON can say, even half of a surrogate pair.
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n"
        lines[stored] = text.encode("utf-8", "surrogatepass")
    return lines


def digest(opening: bytes, tensor: Tensor) -> str:
    """The digest of one tensor.

    Args:
        opening: From `openings`.
        tensor: On the CPU.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import torch
        >>> digest(b"", torch.zeros(0))[:8]
        'e3b0c442'
    """
    found = hashlib.sha256(opening)
    found.update(raw_bytes(tensor))
    return found.hexdigest()


@contextmanager
def checking(path: Path, manifest: Manifest, stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Compare tensors with the digests of the manifest, at the side of what runs inside.

    Args:
        path: What to call the file.
        manifest: Its manifest; one without digests has nothing to compare with.
        stored: All its tensors.

    Yields:
        Nothing. Use no result before the end.

    Raises:
        FileFormatError: At the end, if a tensor is not the one that was written. At once, if digests and tensors have
            other names.

    Example:
        >>> import torch
        >>> with checking(Path("file"), Manifest("dense", {}, sha256={"bias": "0" * 64}), {"bias": torch.zeros(1)}):
        ...     pass
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected 'bias' in 'file' to have the SHA-256 that its manifest says, ...
    """
    if not manifest.sha256:
        yield
        return
    odd = sorted(manifest.sha256.keys() ^ stored.keys())
    if odd:
        raise FileFormatError(
            f"Expected a digest for every tensor of {str(path)!r} and for no other, but got {odd[0]!r} in only one of the "
            "two. The file and its manifest do not belong together; export it again."
        )
    lines = openings({name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}, manifest)
    if sum(tensor.nbytes for tensor in stored.values()) < _WORTH_A_THREAD:
        yield
        found = {name: digest(lines[name], tensor) for name, tensor in stored.items()}
    else:
        with ThreadPoolExecutor(1) as pool:
            futures = {name: pool.submit(digest, lines[name], tensor) for name, tensor in stored.items()}
            try:
                yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            found = {name: future.result() for name, future in futures.items()}
    wrong = [name for name in sorted(found) if found[name] != manifest.sha256[name]]
    if wrong:
        raise FileFormatError(
            f"Expected {wrong[0]!r} in {str(path)!r} to have the SHA-256 that its manifest says, "
            f"{manifest.sha256[wrong[0]]}, but got {found[wrong[0]]} ({len(wrong)} of {len(found)} tensors differ). The "
            "file was damaged or edited after it was written; copy or export it again."
        )
