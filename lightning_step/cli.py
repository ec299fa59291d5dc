"""The command line: commands on files, and ``lightning-step fit``, LightningCLI with a section for masks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_step.commands import COMMANDS, help_text, run_command
from lightning_step.errors import LightningStepError
from lightning_step.reports.command import REPORT_COMMANDS, run_report_command
from lightning_step.version import __version__

if TYPE_CHECKING:
    from lightning_step.sparsity_cli import SparsityCLI

__all__ = ["SparsityCLI", "main"]


def __getattr__(name: str) -> Any:
    if name != "SparsityCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_step.sparsity_cli import SparsityCLI  # slow to import, and jsonargparse is an extra

    return SparsityCLI


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0 when all went well, 1 for an error of this package, 2 if LightningCLI's requirements are missing.

    Example:
        >>> main(["--version"])
        lightning-step 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        sys.stdout.write(f"lightning-step {__version__}\n")
        return 0
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(f"{help_text(REPORT_COMMANDS)}\n")
        return 0
    named = {**dict.fromkeys(COMMANDS, run_command), **dict.fromkeys(REPORT_COMMANDS, run_report_command)}
    if arguments and arguments[0] in named:
        return named[arguments[0]](arguments)
    if find_spec("jsonargparse") is None:
        sys.stderr.write("lightning-step needs jsonargparse for its command line: pip install 'lightning-step[cli]'\n")
        return 2
    # A console script does not look into the working directory, where `class_path: my_project.MyModel` lives.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        _run(None if args is None else arguments)
    except (LightningStepError, TypeError, ValueError) as error:
        own = _own(error)
        if own is None:
            raise
        sys.stderr.write(f"error: {type(own).__name__}: {own}\n")
        return 1
    return 0


def _own(error: BaseException | None) -> LightningStepError | None:
    """The error of this package behind another: jsonargparse wraps what a constructor raises into pages of its own."""
    # Causes only: an error that merely happened while one of ours was handled is news of its own.
    while error is not None and not isinstance(error, LightningStepError):
        error = error.__cause__
    return error


def _run(arguments: list[str] | None) -> None:
    from lightning_step.sparsity_cli import SparsityCLI

    SparsityCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )
