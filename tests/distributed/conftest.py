"""Starts workers as a cluster would: one process per rank, told by environment variables who it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUNG = 1000  # instead of the exit code of a process that had to be killed
Launch = Callable[..., list[int]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def run(
    script: str, *arguments: object, world: int = 2, may_fail: bool = False, timeout: float = 240, patience: float = 60
) -> list[int]:
    """Run a worker on every rank and wait; returns the exit codes. Whoever outlives the time limit is a hang."""
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",  # Lightning leaves starting processes to us
    }
    command = [sys.executable, "-W", "error::UserWarning:lightning_step", str(Path(__file__).parent / script)]
    command += [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = wait(processes, timeout, patience)
        if any(codes) and not may_fail:
            said = "\n".join(f"rank {rank}: {log.read_text()[-6000:]}" for rank, log in enumerate(logs))
            raise AssertionError(f"{script} {arguments} ended with {codes}\n{said}")
    return codes


def wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float, patience: float) -> list[int]:
    """Wait for all; when one has failed, for the others only a little longer. Whoever has to be killed has hung."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + patience)
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return [HUNG if code is None else code for code in codes]


@pytest.fixture(scope="session")
def launch() -> Launch:
    return run


@pytest.fixture(scope="session")
def hung() -> int:
    """What `launch` gives for a process that had to be killed."""
    return HUNG


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the plain PyTorch worker, one file per rank and subject."""
    folder = tmp_path_factory.mktemp("plain")
    run("plain_worker.py", folder, timeout=400)
    return folder


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the Lightning worker, one file per rank and run."""
    folder = tmp_path_factory.mktemp("fitted")
    run("lightning_worker.py", "train", folder, timeout=400)
    run("lightning_worker.py", "resume sharded files on one", folder, world=1)
    return folder
