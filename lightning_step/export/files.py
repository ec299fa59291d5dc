"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_step.errors import ConfigurationError

__all__ = ["atomic_write", "check_writable"]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Find out now whether a file can be written later.

    Args:
        path: The file to be written. Missing folders are made.

    Returns:
        The path.

    Raises:
        ConfigurationError: If it is a folder, or its folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> check_writable(tempfile.mkdtemp() + "/out/model.safetensors").name
        'model.safetensors'
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(f"Expected `path` to name a file, but got the folder {str(path)!r}. Add a file name.")
    if path.exists() and not path.is_file():
        # Renaming would put a file in its place, and /dev/null would be gone.
        raise ConfigurationError(f"Expected `path` to name a file, but got {str(path)!r}, a device or a pipe.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary_beside(path).unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ConfigurationError(
            f"Expected `path` to be writable, but got {str(path)!r}: {getattr(error, 'strerror', None) or error}. "
            "Choose a folder that this process may write to."
        ) from error
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write beside the file and rename, so that a crash leaves the old file or the new one, never half of it.

    Args:
        path: The final name.

    Yields:
        The name to write to, in the same folder. On an error it is removed and the final name is left as it was.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "file"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the data must be on disk before the name is
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    return Path(name)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
