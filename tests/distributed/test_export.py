"""Two processes that export in the middle of training, and the best checkpoint at its end; run by `export_worker.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_step import load_sparse


@pytest.fixture(scope="module")
def exported(launch: Callable[..., list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    launch("export_worker.py", folder)
    return folder


def two_largest(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 4)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().argsort(dim=1, descending=True, stable=True)[:, :2], 1.0)
    return (groups * kept).reshape(weight.shape)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2, one file"])
def test_the_best_checkpoint_and_the_model_of_then_are_written_once_and_told_to_all(engine: str, exported: Path) -> None:
    first, second = (torch.load(exported / f"{engine}.{rank}.pt", weights_only=False) for rank in (0, 1))
    folder = exported / engine
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-dense.safetensors",
        "best-packed.safetensors",
        "best.ckpt",
        "now.safetensors",
    ]
    assert first["now"] == second["now"] == [str(folder / "now.safetensors")]
    assert first["best"] == second["best"] == [str(folder / f"best-{each}.safetensors") for each in ("dense", "packed")]
    for path in folder.glob("*.safetensors"):
        found = load_sparse(path)
        for name, weight in first["weights"].items():
            assert torch.equal(found[name], two_largest(weight) if name.endswith("weight") else weight), (path.name, name)
