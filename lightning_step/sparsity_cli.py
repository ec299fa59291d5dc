"""LightningCLI with a ``sparsity`` section, for `lightning_step.cli` and for command lines of one's own.

Note [Why a section]
    A list of callbacks does not compose: that of a later configuration file replaces the one before. A section does, so a
    base file, a recipe and a command line can each state only the difference. It takes what `STEPSparsityCallback` takes
    and, beneath ``export`` and ``monitor``, what `SparseExport` and `SparsityMonitor` take; all of it is read from their
    signatures, so that there is no second list to keep. Without the section, or with ``sparsity: null``, the run is a dense
    one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import final, override

from lightning_step.callbacks import SparseExport, SparsityMonitor, STEPSparsityCallback
from lightning_step.errors import ConfigurationError

__all__ = ["SparsityCLI"]

_SECTION = "sparsity"


@final  # takes no class_path: its arguments stand right below its key
class ExportSection:
    """The file to write at the end of fitting.

    Args:
        kwargs: Those of `SparseExport`.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def callback(self) -> SparseExport:
        return SparseExport(**self._kwargs)


@final
class MonitorSection:
    """What to log, and how often.

    Args:
        kwargs: Those of `SparsityMonitor`.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def callback(self) -> SparsityMonitor:
        return SparsityMonitor(**self._kwargs)


@final
class SparsitySection:
    """Masks, and what becomes of them.

    Args:
        export: Write a file when fitting ends; null: none.
        monitor: Log to the trainer's loggers: true, false, or what and how often.
        kwargs: Those of `STEPSparsityCallback`.
    """

    def __init__(self, export: ExportSection | None = None, monitor: bool | MonitorSection = True, **kwargs: Any) -> None:
        self._export = export
        self._monitor = monitor
        self._kwargs = kwargs

    def callbacks(self) -> list[pl.Callback]:
        # Made here and not while the section is parsed, so that what they raise reaches the user as it is.
        masks = STEPSparsityCallback(monitor=self._monitor is not False, **self._kwargs)
        more = [each for each in (self._monitor, self._export) if isinstance(each, (MonitorSection, ExportSection))]
        return [masks, *(each.callback() for each in more)]


class SparsityCLI(LightningCLI):
    """LightningCLI whose files and command line have a section ``sparsity``; see Note [Why a section].

    Everything else is as in ``LightningCLI``: subclass it, or name it behind a ``LightningCLI`` of your own among the bases
    of a class. Callbacks beneath ``trainer.callbacks`` work on; the same callback in both places is an error.

    Raises:
        ConfigurationError: If masks, or the same file, are asked for by the section and by ``trainer.callbacks``.

    Example:
        >>> class MyCLI(SparsityCLI):
        ...     def add_arguments_to_parser(self, parser):
        ...         parser.add_argument("--notes")
        >>> issubclass(MyCLI, LightningCLI)
        True
    """

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Called for the command and every subcommand. Chooses the parser that tells errors of the section in one line."""
        if self.parser_class is LightningArgumentParser:
            self.parser_class = _Parser
        return super().init_parser(**kwargs)

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Called once for every subcommand. Adds the section."""
        super().add_core_arguments_to_parser(parser)
        parser.add_argument(
            f"--{_SECTION}",
            type=SparsitySection | None,
            default=None,
            help="Arguments of STEPSparsityCallback, and beneath `export` and `monitor` those of SparseExport and "
            "SparsityMonitor; null: a dense run.",
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Called when everything is parsed. Gives the trainer the callbacks of the section.

        Args:
            kwargs: Arguments of the trainer that are to win over the configured ones.

        Returns:
            The trainer.
        """
        section: SparsitySection | None = self._get(self.config_init, _SECTION)
        if section is not None:
            given = kwargs.get("callbacks", self._get(self.config_init, "trainer").get("callbacks"))
            listed = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
            ours = section.callbacks()
            _check_once(listed, ours)
            kwargs["callbacks"] = [*listed, *ours]
        return super().instantiate_trainer(**kwargs)


class _Parser(LightningArgumentParser):
    """The usual parser, but for errors within the section: those are told in one line, not in pages of alternatives."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = _one_line(message)
        if line is None or not self.exit_on_error:
            super().error(message if line is None else line, ex)
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


def _check_once(listed: Sequence[pl.Callback], ours: Sequence[pl.Callback]) -> None:
    paths = {each.path for each in ours if isinstance(each, SparseExport)}
    for callback in listed:
        twice = any(isinstance(callback, kind) for kind in map(type, ours) if kind is not SparseExport)
        if twice or (isinstance(callback, SparseExport) and callback.path in paths):
            raise ConfigurationError(
                f"Expected {type(callback).__name__} in one place, but got it in `trainer.callbacks` and by the section "
                f"`{_SECTION}`. Keep one of them; `--{_SECTION} null` leaves out the section."
            )


_SECTIONS = {SparsitySection.__name__, ExportSection.__name__, MonitorSection.__name__}  # no class that a user named
_KEY = re.compile(r"""^Parser key ["'](.+?)["']:$""")
_CLASS = re.compile(r"""^Problem with given class_path ["'](?:.+\.)?(\w+)["']:$""")
_VALUE = re.compile(r"^Given value: ([^{(]+)$")
_FRAME = re.compile(r"^(Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>$)")


def _one_line(message: str) -> str | None:
    """What a tree of rejected alternatives comes down to; None if it is not about the section."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    keys = [found[1] for line in lines if (found := _KEY.match(line))]
    if not keys or keys[0].partition(".")[0] != _SECTION:
        return None
    classes = [found[1] for line in lines if (found := _CLASS.match(line)) and found[1] not in _SECTIONS]
    values = [found[1] for line in lines if (found := _VALUE.match(line))]
    said = [line for line in lines if line and not (_KEY.match(line) or _CLASS.match(line) or _FRAME.match(line))]
    if any(line == f"Not a valid subclass of {name}" for line in said for name in _SECTIONS):
        said = ["Expected arguments below it, or null"]
    why = re.sub(r"an? <class '(.+?)'>", r"\1", "; ".join(dict.fromkeys(said)))
    got = f", but got {values[0]}" if values and values[0] not in why else ""  # the innermost stands first
    kind = f" ({classes[-1]})" if classes else ""
    # The parser has no help for what lies deeper.
    known = {_SECTION: "--sparsity.help", f"{_SECTION}.recipe": f"--sparsity.recipe.help {''.join(classes[-1:])}"}
    where = ".".join(keys)
    hint = f". See {known[where]}" if "is not accepted" in why and where in known else ""
    return f"{where}{kind}: {why}{got}{hint}."
