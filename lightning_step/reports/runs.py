"""One run as a report sees it: its folder, its name, its curves, its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.reports.event_files import EVENT_FILES, EventLog, read_events
from lightning_step.reports.exported import ExportedFile, find_exported, read_exported

__all__ = ["Run", "read_runs"]

MAX_RUNS = 40  # no figure can tell more apart


@dataclass(frozen=True)
class Run:
    """One run.

    Example:
        >>> from lightning_step.figures import Curve
        >>> Run("step", Path("out"), EventLog({"loss": Curve((4, 9), (2.0, 1.5))})).last_step
        9
    """

    name: str  # as it is called in the report; may hold any character
    folder: Path
    log: EventLog
    files: Sequence[ExportedFile] = ()
    problems: Sequence[str] = ()  # what could not be read

    @property
    def last_step(self) -> int:
        """The last step that anything was logged at.

        Returns:
            A step; 0 if nothing was logged.
        """
        return max((curve.steps[-1] for curve in self.log.scalars.values()), default=0)


def read_runs(folders: Sequence[str], files: Sequence[str] = ()) -> list[Run]:
    """Read runs and give them short names that tell them apart.

    Args:
        folders: Each a folder with event files, or one whose subfolders hold them; ``NAME=FOLDER`` chooses the name.
        files: Exported files that lie elsewhere, as ``NAME=FILE``; with a single run ``FILE`` will do.

    Returns:
        The runs, in the order of the folders.

    Raises:
        FileFormatError: If there is no such folder, nothing to read in it, or a named file is none of this package.
        ConfigurationError: If there are too many runs, or it is unclear whose a file is.

    Example:
        >>> read_runs(["no/such/folder"])
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a folder of a run, but got 'no/such/folder', which is no folder.
    """
    found = [pair for given in folders for pair in _found(*_split(given))]
    if len(found) > MAX_RUNS:
        raise ConfigurationError(
            f"Expected at most {MAX_RUNS} runs, but got {len(found)} below {', '.join(map(repr, folders))}. Name the "
            "folders of fewer runs."
        )
    short = iter(_short_names([path for name, path in found if name is None]))
    names = _told_apart([next(short) if name is None else name for name, _ in found])
    return _with_files([_read(name, path) for name, (_, path) in zip(names, found, strict=True)], files)


def _split(given: str) -> tuple[str | None, Path]:
    """Name and path; what is there as it stands has no name, whatever characters it holds."""
    try:
        if "=" not in given or Path(given).exists():
            return None, Path(given)
    except (OSError, ValueError):  # a name too long, a null byte
        return None, Path(given)
    name, _, path = given.partition("=")
    return name or None, Path(path)


def _found(name: str | None, folder: Path) -> list[tuple[str | None, Path]]:
    """The runs in a folder that was given; a name that was given is that of the first part of theirs."""
    inside = _folders_of_runs(folder)
    if name is None or len(inside) == 1:
        return [(name, path) for path in inside]
    return [(f"{name}/{path.relative_to(folder).as_posix()}", path) for path in inside]


def _folders_of_runs(folder: Path) -> list[Path]:
    if not _is_folder(folder):
        raise FileFormatError(f"Expected a folder of a run, but got {str(folder)!r}, which is no folder.")
    if any(folder.glob(EVENT_FILES)):
        return [folder]
    below = sorted({path.parent for path in folder.rglob(EVENT_FILES)}, key=_natural)
    if not below and not any(folder.rglob("*.safetensors")):
        raise FileFormatError(
            f"Expected event files (events.out.tfevents...) in {str(folder)!r} or below, but got none. Train with a "
            "TensorBoardLogger, and name the folder that it logged to (lightning_logs/version_0)."
        )
    return below or [folder]


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # a null byte
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    """version_2 before version_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """What differs between the paths, without the folders that all share and those that every run has."""
    # A path that was given as ".." has no name before it is resolved.
    parts = [[part for part in path.resolve().parts if part != "lightning_logs"] for path in paths]
    if len(paths) == 1:
        [own] = parts
        return ["/".join(own[-2:] if re.fullmatch(r"version_\d+", own[-1]) else own[-1:])]
    while parts and all(len(own) > 1 and own[0] == parts[0][0] for own in parts):
        parts = [own[1:] for own in parts]
    while parts and all(len(own) > 1 and own[-1] == parts[0][-1] for own in parts):
        parts = [own[:-1] for own in parts]
    return ["/".join(own) for own in parts]


def _told_apart(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made


def _read(name: str, folder: Path) -> Run:
    log = read_events(folder)
    files, problems = find_exported(folder)
    if not log.scalars:
        problems = ["no scalars could be read from its event files", *problems]
    return Run(name, folder, log, files, [*log.problems, *problems])


def _with_files(runs: list[Run], files: Sequence[str]) -> list[Run]:
    """Files that lie elsewhere, given to the runs they are of."""
    given: dict[str, list[ExportedFile]] = {run.name: list(run.files) for run in runs}
    for value in files:
        name, path = _split(value)
        if name is None and len(runs) == 1:
            name = runs[0].name
        if name not in given:
            raise ConfigurationError(
                f"Expected `--file RUN=FILE` with one of the runs {list(given)}, but got {value!r}. The runs are named "
                "after what differs between their folders; NAME=FOLDER chooses a name."
            )
        given[name].append(read_exported(path))
    return [replace(run, files=given[run.name]) for run in runs]
