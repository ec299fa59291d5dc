from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_step.errors import FileFormatError
from lightning_step.reports import plot_variance, read_variance

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that logged every 10 steps and switched at step 30, as the callback logs it."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(10, 61, 10):
            writer.add_scalar("sparsity/phase", 1 + (step >= 30), step)
            if step <= 30:
                writer.add_scalar("sparsity/variance_change", 1e-7 / step, step)
                writer.add_scalar("sparsity/threshold", 5e-9, step)
            if 20 <= step <= 30:
                writer.add_scalar("sparsity/window_mean", 1.5e-7 / step, step)
    return tmp_path / "run"


def test_it_reads_what_was_logged(folder: Path) -> None:
    log = read_variance(folder)
    assert log.change.steps == (10, 20, 30)
    assert log.change.values == pytest.approx((1e-8, 5e-9, 1e-7 / 30))
    assert log.window_mean.steps == (20, 30)
    assert log.threshold.values == pytest.approx((5e-9,) * 3)
    assert (log.masks_on, log.frozen) == (30, 30)


def test_a_run_that_never_switched_has_no_mark(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20):
            writer.add_scalar("sparsity/phase", 1, step)
            writer.add_scalar("sparsity/variance_change", 1.0, step)
    log = read_variance(tmp_path)
    assert (log.masks_on, log.frozen) == (None, None)
    assert plot_variance(tmp_path, tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_masks_from_the_start_and_a_later_freeze_are_two_marks(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20, 30):
            writer.add_scalar("sparsity/phase", 2, step)
            if step <= 20:
                writer.add_scalar("sparsity/variance_change", 1.0, step)
    log = read_variance(tmp_path)
    assert (log.masks_on, log.frozen) == (10, 20)


def test_it_draws_a_png_in_a_new_folder(folder: Path, tmp_path: Path) -> None:
    path = plot_variance(folder, tmp_path / "new" / "plot.png")
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert int.from_bytes(content[16:20], "big") == 1200, "8 inches at 150 dots"


def test_a_folder_that_is_none() -> None:
    with pytest.raises(FileFormatError, match="Expected a TensorBoard folder, but got 'nowhere', which is no folder"):
        read_variance("nowhere")


def test_a_folder_without_our_scalars_says_what_it_found(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
    with pytest.raises(
        FileFormatError, match=r"named 'sparsity/variance_change' in .*, but got: loss\. Train with STEPSparsity"
    ):
        read_variance(tmp_path)


def test_without_matplotlib_it_says_what_to_install(folder: Path) -> None:
    program = (
        "import sys\n"
        "from lightning_step.reports import plot_variance\n"
        "sys.modules['matplotlib.figure'] = None  # as if it could not be imported\n"
        f"plot_variance({str(folder)!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert run.returncode == 1
    assert "ConfigurationError: Expected matplotlib to be installed" in run.stderr
    assert "pip install 'lightning-step[plots]'" in run.stderr
