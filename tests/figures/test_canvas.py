"""The empty figure that everything is drawn on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning_step.figures import blank_figure


def test_it_has_the_size_it_is_asked_for_and_no_window(tmp_path: Path) -> None:
    figure = blank_figure(4, 2)
    figure.savefig(tmp_path / "empty.png")
    content = (tmp_path / "empty.png").read_bytes()
    assert [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)] == [600, 300], "150 dots to the inch"
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_it_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "from lightning_step.figures import blank_figure\n"
        "sys.modules['matplotlib.figure'] = None  # as if it could not be imported\n"
        "blank_figure(1, 1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert run.returncode == 1
    assert "ConfigurationError: Expected matplotlib to be installed" in run.stderr
