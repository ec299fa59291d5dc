"""Runs of a benchmark in several processes, each with one thread, and what came of them in one file.

A line is written when a run is finished and not before, by one process, and is on the disk then. Whatever ends the program,
only the runs in progress are lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from io import BufferedRandom
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cells import Cell
from checks import differences, identity
from studies import Study
from training import quiet, train

from lightning_step import __version__

Line = dict[str, Any]
ROOT = Path(__file__).parents[2]


class Book:
    """The file of results: one JSON object a line, in the order in which runs were finished."""

    def __init__(self, file: BufferedRandom) -> None:
        self.file = file
        self.lines: dict[str, Line] = {}
        for number, text in enumerate(file.read().splitlines(keepends=True), 1):
            if not text.endswith(b"\n"):  # the program was killed while it wrote this
                file.seek(-len(text), os.SEEK_END)
                file.truncate()
                break
            line = parsed(text.decode(), f"line {number} of {file.name}")
            self.lines[line["key"]] = line

    def write(self, line: Line) -> None:
        """Add one, for good."""
        if line["key"] in self.lines:
            raise RuntimeError(f"Expected a run that is not there yet, but got {line['key']} a second time.")
        self.file.write((json.dumps(line) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines[line["key"]] = line


@contextmanager
def opened(path: Path) -> Iterator[Book]:
    """The book at ``path``, for one program at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"Expected {path} to be free, but another benchmark is writing to it. Wait, or give `--out`."
            ) from None
        yield Book(file)


def read_lines(path: Path) -> list[Line]:
    """The results in a file, without those that were written in part."""
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [text for text in texts if text.endswith("\n")]
    return [parsed(text, f"line {i} of {path}") for i, text in enumerate(whole, 1)]


def parsed(text: str, where: str) -> Line:
    """One line."""
    try:
        line = json.loads(text)
        line["key"], line["config"]
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"Expected the result of a run in {where}, but got {text[:80]!r}. Remove it.") from error
    return dict(line)


@dataclass
class Run:
    """Runs what is missing in a study.

    Args:
        study: What to run.
        book: Where results are and go.
        data: Where the data are.
        workers: Runs at a time.
        budget: Seconds; a run that would not end before is not started.
    """

    study: Study
    book: Book
    data: Path
    workers: int = 2
    budget: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    in_time: bool = True

    def go(self) -> None:
        """Until everything is done, or time is up."""
        self.check_names()
        started = time.monotonic()
        before = len(self.book.lines)
        facts = {"versions": versions(), "machine": machine(self.workers), **commit()}
        running: dict[Future[Line], Cell] = {}
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the workers
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=begin) as pool:
            while True:
                for cell in self.missing(running)[: self.workers - len(running)]:
                    self.in_time = self.fits(cell, time.monotonic() - started)
                    if not self.in_time:
                        break
                    running[pool.submit(train, cell, self.data)] = cell
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self.keep(running.pop(future), future, facts)
                self.say_how_far(len(self.book.lines) - before, time.monotonic() - started)

    def missing(self, running: Mapping[Any, Cell]) -> list[Cell]:
        """What is known to be needed, and neither done nor in progress nor broken; each once."""
        taken = {cell.key for cell in running.values()} | self.book.lines.keys() | self.failed.keys()
        cells = {cell.key: cell for cell in self.study.cells(self.book.lines)}
        return [cell for key, cell in cells.items() if key not in taken]

    def keep(self, cell: Cell, future: Future[Line], facts: Mapping[str, Any]) -> None:
        """Write a result down; or say what went wrong, and go on with the others."""
        error = future.exception()
        if error is not None:
            self.failed[cell.key] = str(cell)
            print(f"FAILED {cell}: {''.join(traceback.format_exception(error)).strip()}", file=sys.stderr, flush=True)
            return
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {**future.result(), **facts, "finished": finished}
        self.book.write(line)
        score = line["scores"].get(line["metric"]["chosen_by"])
        switch = f", {line['switches'][-1].split(' (')[0]}" if line["switches"] else ""
        print(f"{cell}: {line['metric']['chosen_by']} {score:.4f}, {line['seconds']:.0f} s{switch}", flush=True)

    def fits(self, cell: Cell, elapsed: float) -> bool:
        """Whether a run can be expected to end in time."""
        return self.budget is None or elapsed + max(self.seconds(cell.task.name), default=0.0) <= self.budget

    def seconds(self, task: str) -> list[float]:
        """What runs of a task took."""
        return [line["seconds"] for line in self.book.lines.values() if line["task"] == task]

    def say_how_far(self, finished: int, elapsed: float) -> None:
        """Done of all, and about how long the others will take."""
        rate = elapsed / finished if finished else 0.0
        done, left = 0, 0.0
        for part in self.study.parts:
            alone = replace(self.study, parts=(part,))
            there = len({cell.key for cell in alone.cells(self.book.lines)} & self.book.lines.keys())
            seconds = self.seconds(part.task.name)
            left += (alone.count() - there) * (statistics.mean(seconds) / self.workers if seconds else rate)
            done += there
        print(f"[{done}/{self.study.count()}, about {duration(left)} left, {duration(elapsed)} gone]", flush=True)

    def check_names(self) -> None:
        """Refuse to go on in a folder where a row stands for another recipe."""
        known = {}
        for line in self.book.lines.values():
            known[identity(line["config"])] = line["config"]
        for cell in self.study.cells(self.book.lines):
            config = cell.config()
            other = known.get(identity(config))
            if other is not None and other != config:
                raise SystemExit(
                    f"Expected {self.book.file.name} to hold results of the settings of today, but got another {cell}: "
                    f"{differences(other, config)}. Give another `--out`, or remove the lines of what has changed."
                )


def begin() -> None:
    """What a worker does first. It ends with the program that started it, even if that was killed."""
    quiet()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: Any) -> None:
    """Wait for another process to end."""
    parent.join()
    os._exit(1)


def duration(seconds: float) -> str:
    """Readable."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def versions() -> dict[str, str]:
    """Of all that computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "lightning-step": __version__,
    }


def machine(workers: int) -> str:
    """What it ran on."""
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{device}{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {workers} runs at a time, 1 thread each"
    )


def commit() -> dict[str, Any]:
    """The commit of the code, and whether files differed from it; None outside of a repository."""
    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lightning_step", "examples")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}
    code = [name for name in changed.splitlines() if name.endswith(".py")]
    return {"commit": head, "changed": bool(code)}


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
