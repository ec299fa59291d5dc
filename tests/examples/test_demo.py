from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The demo as a user runs it, only shorter."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "24", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout + run.stderr, out


def test_it_shows_what_is_masked_and_where_it_switched(demo: tuple[str, Path]) -> None:
    said, _ = demo
    assert "N:M masks on 8 of 27 tensors" in said
    assert "an embedding: a look-up, not a product" in said
    assert said.count("lightning-step, optimizer step 12: masks on, second moment frozen (8 tensors)") == 1


def test_the_default_recipe_has_its_masks_from_the_start_and_freezes_later(demo: tuple[str, Path]) -> None:
    said, _ = demo
    _, default = said.split("The default recipe, 2:4, 24 steps")
    assert "lightning-step, optimizer step 0: masks on" in default
    assert "lightning-step, optimizer step 12: second moment frozen (8 tensors)" in default


def test_the_end_table_says_that_the_file_gives_the_same_loss(demo: tuple[str, Path]) -> None:
    said, _ = demo
    losses = [line.split()[-3 if "/" in line else -1] for line in said.splitlines() if line.startswith("default, ")]
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert "loaded-back loss the same, 0 tensors violate 2:4" in said
    assert "blocks.*.qkv.weight    50.0 %" in said


def test_the_packed_file_is_smaller_and_the_picture_is_there(demo: tuple[str, Path]) -> None:
    _, out = demo
    assert (out / "sparse-packed.safetensors").stat().st_size < 0.6 * (out / "dense.safetensors").stat().st_size
    assert (out / "variance.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("step/version_0/events.out.tfevents*"))
