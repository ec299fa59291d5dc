"""One process of a DDP job is killed: nobody hangs, and the resumed job ends where the undisturbed one does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from lightning_step import load_sparse


def read(folder: Path, name: str, rank: int) -> Any:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def test_a_killed_rank_ends_the_job_and_the_resume_is_exact(launch: Any, hung: int, tmp_path: Path) -> None:
    survivor, killed = launch("lightning_worker.py", "die", tmp_path, may_fail=True, timeout=120)
    assert killed == -signal.SIGKILL
    assert survivor not in (0, hung)
    assert not (tmp_path / "model.safetensors").exists()
    launch("lightning_worker.py", "go on", tmp_path)
    for rank in (0, 1):
        resumed, undisturbed = read(tmp_path, "resumed", rank), read(tmp_path, "undisturbed", rank)
        assert resumed["from"] == "step=8"
        assert resumed["state"] == undisturbed["state"]
        assert resumed["state"]["t"] == 12
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in undisturbed["weights"].items())
    resumed, undisturbed = (load_sparse(tmp_path / run / "model.safetensors") for run in ("resumed", "undisturbed"))
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
