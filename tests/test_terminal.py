"""Who gets what: handlers that write to a terminal, log files, and everything that is redirected."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from lightning_step.summary import Section, Sheet
from lightning_step.terminal import show, tell

rich = pytest.importorskip("rich")
SHEET = Sheet(
    "N:M masks on 1 of 2 tensors",
    (
        Section((("masked", "tensors"), ("blocks.*.attention.in_proj_weight", "12")), right=(1,)),
        Section((("left dense", "why"), ("head.weight", "excluded by 'h[e]ad'"))),
    ),
    ("recipe: STEP()",),
)
PLAIN = """\
N:M masks on 1 of 2 tensors
masked                             tensors
blocks.*.attention.in_proj_weight       12
left dense   why
head.weight  excluded by 'h[e]ad'
recipe: STEP()
"""


class Terminal(io.StringIO):
    """Takes text and says that it is a terminal."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """Without colours and the like."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(rich, "_console", None)  # the one console of the process remembers nothing of other tests


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger with a parent that has a log file, as Lightning's is set up by many."""
    parent, logger = logging.getLogger("parent_of_test"), logging.getLogger("parent_of_test.own")
    parent.propagate = False
    logger.setLevel(logging.INFO)
    yield logger
    for each in (parent, logger):
        each.handlers.clear()
        each.setLevel(logging.NOTSET)


def add(logger: logging.Logger, stream: io.StringIO, level: int = logging.NOTSET) -> io.StringIO:
    handler = logging.StreamHandler(stream)
    handler.setLevel(level)
    logger.addHandler(handler)
    return stream


def test_at_a_terminal_rich_shows_what_log_files_get_as_plain_text(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, stderr, file = Terminal(), add(log, Terminal()), add(log.parent, io.StringIO())  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", stdout)
    show(SHEET, log)
    lines = stdout.shown().splitlines()
    assert lines[0] == "N:M masks on 1 of 2 tensors"
    assert lines[2] == "│ masked                            │ tensors │"
    assert lines[4] == "│ blocks.*.attention.in_proj_weight │      12 │"
    assert "│ head.weight │ excluded by 'h[e]ad' │" in lines, "a glob is no markup"
    assert lines[-1] == "recipe: STEP()"
    assert "\x1b[36m" in stdout.getvalue(), "with colours"
    assert stderr.getvalue() == "", "once on the screen is enough"
    assert file.getvalue() == PLAIN
    log.info("and then")
    assert stderr.getvalue() == "and then\n", "the handler is as it was"


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [(io.StringIO, Terminal), (Terminal, io.StringIO), (io.StringIO, io.StringIO)],
    ids=["> file", "2> file", "both"],
)
def test_what_is_redirected_stays_plain_and_where_it_was(
    stdout: type[io.StringIO], stderr: type[io.StringIO], log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, errors = stdout(), add(log, stderr())
    monkeypatch.setenv("FORCE_COLOR", "1")  # as continuous integration likes it: rich believes it, we do not
    monkeypatch.setattr(sys, "stdout", screen)
    show(SHEET, log)
    tell("masks on", log)
    assert errors.getvalue() == f"{PLAIN}masks on\n"
    assert screen.getvalue() == ""


@pytest.mark.parametrize("missing", ["rich", "a terminal that can move its cursor"])
def test_without_rich_a_terminal_gets_plain_text(missing: str, log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = Terminal(), add(log, Terminal())
    if missing == "rich":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", stdout)
    show(SHEET, log)
    assert stderr.getvalue() == PLAIN
    assert stdout.getvalue() == ""


@pytest.mark.parametrize("how", ["logger", "handler"])
def test_a_user_who_silences_the_logger_sees_nothing(how: str, log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = Terminal(), add(log, Terminal(), logging.WARNING if how == "handler" else logging.NOTSET)
    log.setLevel(logging.WARNING if how == "logger" else logging.INFO)
    monkeypatch.setattr(sys, "stdout", stdout)
    show(SHEET, log)
    tell("masks on", log)
    assert stdout.getvalue() + stderr.getvalue() == ""


def test_in_a_narrow_terminal_names_are_folded_not_cut(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Terminal()
    add(log, Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys, "stdout", stdout)
    show(SHEET, log)
    rows = [line.split("│") for line in stdout.shown().splitlines() if line.startswith("│")]
    assert max(map(len, stdout.shown().splitlines())) <= 30
    assert "blocks.*.attention.in_proj_weight" in "".join(row[1].strip() for row in rows)


def test_a_line_is_written_above_a_tqdm_bar(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr, file = Terminal(), add(log, Terminal()), add(log.parent, io.StringIO())  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", stdout)
    with tqdm(total=3, file=stdout, ncols=40) as bar:
        bar.update()
        tell("optimizer step 5: masks on", log)
        lines = stdout.getvalue().split("\n")
        assert len(lines) == 2, "a line of its own"
        assert lines[0].endswith("\roptimizer step 5: masks on"), "where the bar was"
        assert "1/3" in lines[1], "and the bar below it"
    assert stderr.getvalue() == ""
    assert file.getvalue() == "optimizer step 5: masks on\n"
    tell("over", log)
    assert stderr.getvalue() == "over\n", "no bar, no reason to do anything"


def test_a_line_is_written_above_a_display_of_rich(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    stdout, stderr = Terminal(), add(log, Terminal())
    monkeypatch.setattr(sys, "stdout", stdout)
    with Progress(console=rich.get_console(), auto_refresh=False) as progress:
        progress.add_task("Epoch 0", total=3)
        progress.refresh()
        tell("optimizer step 5: masks on [8 tensors]", log)
    assert stderr.getvalue() == ""
    lines = [line.strip() for line in re.split(r"[\r\n]", stdout.shown())]
    at = lines.index("optimizer step 5: masks on [8 tensors]")
    assert any(line.startswith("Epoch 0") for line in lines[:at])
    assert any(line.startswith("Epoch 0") for line in lines[at:])


def test_a_closed_stream_is_no_terminal(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    stderr = add(log, Terminal())
    monkeypatch.setattr(sys, "stdout", closed)
    show(SHEET, log)
    assert stderr.getvalue() == PLAIN
