"""The subcommands on files and checkpoints; they need neither the model's class nor an extra."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from lightning_step.checkpoints import export_checkpoint, read_checkpoint
from lightning_step.errors import ConfigurationError, LightningStepError
from lightning_step.export import FORMATS, Exported, convert_file, describe_file, verify_file
from lightning_step.pattern import NMPattern

__all__ = ["COMMANDS", "help_text", "run_command", "run_parser"]

COMMANDS: Mapping[str, str] = {
    "inspect": "say what a file holds: pattern, density and bytes of every tensor, and which runtime takes it",
    "verify": "make sure that every pattern of a file holds; exit status 1 if one does not",
    "convert": "write a file in another format",
    "export": "write the sparse model of a Lightning checkpoint, without training",
}


def run_command(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS`.

    Args:
        arguments: Its name first.

    Returns:
        The exit status: 0, or 1 for an error of this package, which is told in one line.

    Raises:
        SystemExit: With status 2, for arguments that nobody knows; with 0 for ``--help``.

    Example:
        >>> run_command(["convert", "a.safetensors", "--to", "dense", "--out", "a.safetensors/b"])
        1
    """
    return run_parser(_parser(), arguments)


def run_parser(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Parse arguments and do the work they ask for.

    Args:
        parser: Sets ``work`` to a function from what it parsed to what is to be said.
        arguments: Of the command line.

    Returns:
        The exit status: 0, or 1 for an error of this package, which is told in one line.

    Raises:
        SystemExit: With status 2, for arguments that nobody knows; with 0 for ``--help``.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> parser.set_defaults(work=lambda parsed: "done")
        >>> run_parser(parser, [])
        done
        0
    """
    parsed = parser.parse_args(arguments)
    work: Callable[[argparse.Namespace], str] = parsed.work
    try:
        said = work(parsed)
    except LightningStepError as error:
        sys.stderr.write(f"error: {type(error).__name__}: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"{said}\n")
    return 0


def help_text(reports: Mapping[str, str] | None = None) -> str:
    """What ``lightning-step --help`` says of all subcommands.

    Args:
        reports: Those that make reports, which lie above this module.

    Returns:
        Several lines.

    Example:
        >>> help_text().splitlines()[0]
        'usage: lightning-step [--help] [--version] COMMAND ...'
    """
    rows = [
        "usage: lightning-step [--help] [--version] COMMAND ...",
        "",
        "files and checkpoints:",
        *(f"  {name:<9} {text}" for name, text in COMMANDS.items()),
        "",
        "reports (need the extra `plots`):",
        *(f"  {name:<9} {text}" for name, text in (reports or {}).items()),
        "",
        "training, as LightningCLI does it (needs the extra `cli`):",
        "  fit       train a model: lightning-step fit --config config.yaml",
        "  validate, test, predict",
        "",
        "lightning-step COMMAND --help tells more.",
    ]
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-step", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for name, work in (("inspect", _inspect), ("verify", _verify), ("convert", _convert), ("export", _export)):
        what = _FILES[name]
        made[name].add_argument("file", metavar="CKPT" if name == "export" else "FILE", help=what)
        made[name].set_defaults(work=work)
    _add_verify(made["verify"])
    for name, option in (("convert", "--to"), ("export", "--format")):
        made[name].add_argument(option, dest="format", choices=FORMATS, required=True)
        made[name].add_argument("--out", metavar="PATH", required=True, help="a file there is replaced, as a whole")
    export = made["export"]
    export.add_argument("--module", metavar="NAME", help="export this submodule, its names without prefix")
    export.add_argument("--one-shot", action="store_true", help="prune by magnitude what has no learned mask")
    export.add_argument("--n", type=int, help="weights kept of every m, for --one-shot of a dense run")
    export.add_argument("--m", type=int, help="weights in a group along dim 1, for --one-shot of a dense run")
    export.add_argument("--include", metavar="GLOB", action="append", help="prune only these tensors; may be repeated")
    export.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="leave these dense; may be repeated")
    return parser


_OURS = "a file that SparseExport or export_model wrote"
_FILES = {
    "inspect": f"{_OURS}, any other safetensors file, or an .onnx file",
    "verify": f"{_OURS}; with --n and --m any other safetensors file; or an .onnx file",
    "convert": _OURS,
    "export": "a Lightning checkpoint (.ckpt)",
}


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("--n", type=int, help="weights kept of every m, for a file that does not say it")
    verify.add_argument("--m", type=int, help="weights in a group, for a file that does not say it")
    verify.add_argument("--dim", type=int, help="dimension that holds the groups (default: 1); ONNX says it itself")
    verify.add_argument("--include", metavar="GLOB", action="append", help="verify only these tensors; may be repeated")
    verify.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="leave these out; may be repeated")


def _inspect(arguments: argparse.Namespace) -> str:
    return describe_file(arguments.file)


def _verify(arguments: argparse.Namespace) -> str:
    count = verify_file(
        arguments.file, _pattern(arguments), include=arguments.include, exclude=arguments.exclude, dim=arguments.dim
    )
    return f"{arguments.file}: {count} tensor{'s' * (count != 1)} verified"


def _convert(arguments: argparse.Namespace) -> str:
    return _wrote(convert_file(arguments.file, arguments.out, arguments.format))


def _export(arguments: argparse.Namespace) -> str:
    return _wrote(
        export_checkpoint(
            read_checkpoint(arguments.file, arguments.module),
            arguments.out,
            arguments.format,
            one_shot=arguments.one_shot,
            pattern=_pattern(arguments),
            include=arguments.include,
            exclude=arguments.exclude,
        )
    )


def _pattern(arguments: argparse.Namespace) -> NMPattern | None:
    if (arguments.n is None) != (arguments.m is None):
        raise ConfigurationError(f"Expected both --n and --m or none, but got n={arguments.n} and m={arguments.m}.")
    return None if arguments.n is None else NMPattern(arguments.n, arguments.m)


def _wrote(exported: Exported) -> str:
    count = len(exported.manifest.sparse)
    tensors = f"{count} tensor{'s' * (count != 1)}"
    return f"wrote {exported.path} ({exported.manifest.format}, {exported.bytes:,} bytes): {tensors} verified"
