"""How tables and lines reach a user: by rich and above the progress bar at a terminal, as plain text in every log.

Note [Who writes]
    All of it is logged, as plain text. Only where a handler would write that to a terminal, something better is shown in its
    place: log files stay complete, what is redirected stays plain, and a user who silences the logger silences this, too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_step.summary import Section, Sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["show", "tell"]


def show(sheet: Sheet, log: logging.Logger) -> None:
    """Log tables; at a terminal, print them by rich if it is installed. See Note [Who writes].

    Args:
        sheet: The tables.
        log: The logger.

    Example:
        >>> show(Sheet("One layer", ()), logging.getLogger("example"))
    """
    console = _console()
    _log(str(sheet), log, None if console is None else lambda: _print(sheet, console))


def tell(line: str, log: logging.Logger) -> None:
    """Log a line; at a terminal with a progress bar, have it written above that. See Note [Who writes].

    Args:
        line: The line.
        log: The logger.

    Example:
        >>> tell("optimizer step 5: masks on", logging.getLogger("example"))
    """
    write = _above_bars()
    _log(line, log, None if write is None else lambda: write(line))


def _log(text: str, log: logging.Logger, instead: Callable[[], Any] | None) -> None:
    terminals = [handler for handler in _handlers(log) if _writes_to_terminal(handler)]
    if instead is None or not terminals or not _is_terminal(sys.stdout) or not log.isEnabledFor(logging.INFO):
        log.info(text)
        return
    instead()
    with _spared(terminals, text):
        log.info(text)


def _handlers(log: logging.Logger) -> Iterator[logging.Handler]:
    """Everybody who is handed what this logger logs."""
    place: logging.Logger | None = log
    while place is not None:
        yield from place.handlers
        place = place.parent if place.propagate else None


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return handler.level <= logging.INFO and _is_terminal(getattr(handler, "stream", None))


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False


@contextmanager
def _spared(handlers: list[logging.Handler], text: str) -> Iterator[None]:
    """Keep one text from some handlers, and nothing else, whoever logs meanwhile."""

    def passes(record: logging.LogRecord) -> bool:
        return record.msg is not text

    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _above_bars() -> Callable[[str], Any] | None:
    """Who can write a line without breaking what is redrawn at the end of the terminal; nobody has to if nothing is."""
    try:
        from rich.file_proxy import FileProxy
    except ImportError:
        pass
    else:
        if isinstance(sys.stdout, FileProxy):  # what rich puts in the place of stdout while it redraws
            return _print_line
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return tqdm.write if tqdm is not None and len(getattr(tqdm, "_instances", ())) else None


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _console() -> Console | None:
    """The console of rich, if it is installed and the terminal can show more than lines of text."""
    try:
        import rich
    except ImportError:
        return None
    console = rich.get_console()
    return None if console.is_dumb_terminal else console


def _print(sheet: Sheet, console: Console) -> None:
    from rich.text import Text

    # As `Text` throughout: in a string rich would take a glob like [ab] for markup.
    console.print(Text(sheet.head, style="bold"))
    for section in sheet.sections:
        console.print(_table(section))
    for line in sheet.foot:
        console.print(Text(line))


def _table(section: Section) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, *rows = section.rows
    table = Table(box=box.ROUNDED, border_style="dim", header_style="bold")
    for i, title in enumerate(header):
        style = "" if i else "cyan"
        # Folded, not cut: in a narrow terminal a name is still a name.
        table.add_column(Text(title), justify="right" if i in section.right else "left", style=style, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
