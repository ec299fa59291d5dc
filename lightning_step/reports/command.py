"""The subcommands ``report`` and ``figure``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_step.commands import run_parser
from lightning_step.reports.figures import FIGURES, write_figure
from lightning_step.reports.report import write_report

__all__ = ["REPORT_COMMANDS", "run_report_command"]

REPORT_COMMANDS: Mapping[str, str] = {
    "report": "one HTML page about one run or several, from their event files and exported files",
    "figure": "one figure, from runs or from the results of a benchmark",
}


def run_report_command(arguments: Sequence[str]) -> int:
    """Run one of `REPORT_COMMANDS`.

    Args:
        arguments: Its name first.

    Returns:
        The exit status: 0, or 1 for an error of this package, which is told in one line.

    Raises:
        SystemExit: With status 2, for arguments that nobody knows; with 0 for ``--help``.

    Example:
        >>> run_report_command(["report", "no/such/folder"])
        1
    """
    return run_parser(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-step", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    report = commands.add_parser("report", help=REPORT_COMMANDS["report"], description=REPORT_COMMANDS["report"])
    folders = "a folder with event files, or with subfolders that hold them; NAME=FOLDER chooses its name in the report"
    report.add_argument("runs", metavar="RUN_DIR", nargs="+", help=folders)
    report.add_argument("--out", metavar="PATH", default="report.html", help="the page; one that is there is replaced")
    report.add_argument(
        "--file",
        metavar="RUN=FILE",
        action="append",
        default=[],
        help="an exported file that does not lie in the run's folder; with a single run FILE will do; may be repeated",
    )
    report.add_argument("--figures", metavar="DIR", help="write every figure there as PNG and SVG, too")
    report.add_argument("--title", default="Sparsity report", help="of the page")
    tag = "a scalar that is a loss; by default all with 'loss' in their name; may be repeated"
    report.add_argument("--loss", metavar="TAG", action="append", default=[], help=tag)
    _add_beta2(report)
    report.set_defaults(work=_report)

    figure = commands.add_parser("figure", help=REPORT_COMMANDS["figure"], description=REPORT_COMMANDS["figure"])
    kinds = figure.add_subparsers(required=True, metavar="NAME")
    for name, kind in FIGURES.items():
        one = kinds.add_parser(name, help=f"{kind.help} (from {kind.inputs})", description=kind.help)
        what = {"runs": folders, "results": "a file of JSON lines, see lightning_step.reports.results"}
        words = what.get(kind.inputs, " or ".join(what.values()))
        one.add_argument("inputs", metavar="RUN_DIR" if kind.inputs == "runs" else "INPUT", nargs="+", help=words)
        one.add_argument("--out", metavar="PATH", default=f"{name}.png", help="its ending chooses the format: png, svg, pdf")
        one.add_argument("--tag", metavar="TAG", action="append", default=[], help="a scalar of the runs; may be repeated")
        _add_beta2(one)
        one.set_defaults(work=_figure, name=name)
    return parser


def _add_beta2(parser: argparse.ArgumentParser) -> None:
    words = "decay of Adam's second moment, for the criteria of runs that do not say (default: 0.999)"
    parser.add_argument("--beta2", type=float, help=words)


def _report(arguments: argparse.Namespace) -> str:
    written = write_report(
        arguments.runs,
        arguments.out,
        files=arguments.file,
        figures_folder=arguments.figures,
        loss=arguments.loss,
        beta2=arguments.beta2,
        title=arguments.title,
    )
    more = f" and {len(written) - 1} files of figures in {Path(arguments.figures)}" if len(written) > 1 else ""
    return f"wrote {written[0]} ({written[0].stat().st_size:,} bytes){more}"


def _figure(arguments: argparse.Namespace) -> str:
    path = write_figure(arguments.name, arguments.inputs, arguments.out, tags=arguments.tag, beta2=arguments.beta2)
    return f"wrote {path} ({path.stat().st_size:,} bytes)"
