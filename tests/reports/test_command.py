from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_step.cli import main
from tests.reports.conftest import Write
from tests.reports.test_figures import RESULTS, SCALARS
from tests.reports.test_html import check_page


def test_a_report_from_the_command_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write("step", SCALARS), tmp_path / "new" / "page.html"
    options = ["--figures", str(tmp_path / "figures"), "--title", "Mine", "--loss", "val_loss", "--beta2", "0.9"]
    assert main(["report", f"x={run}", "--out", str(out), *options]) == 0
    said = capsys.readouterr().out
    count = len(list((tmp_path / "figures").iterdir()))
    assert said == f"wrote {out} ({out.stat().st_size:,} bytes) and {count} files of figures in {tmp_path / 'figures'}\n"
    page = check_page(out.read_text(encoding="utf-8"))
    assert "Mine" in page.words
    assert any("β2 = 0.9, as given" in word for word in page.words)


def test_a_figure_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "switch.svg"
    assert main(["figure", "switch", str(RESULTS), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out} ({out.stat().st_size:,} bytes)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "error: FileFormatError: Expected a folder of a run, but got 'nowhere'"),
        (["figure", "patterns", "nowhere.jsonl"], "error: FileFormatError: Expected a file of JSON lines, but got 'nowhere"),
    ],
)
def test_errors_are_one_line_and_status_1(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_page_that_cannot_be_written(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    run = write("step", SCALARS)
    assert main(["report", str(run), "--out", str(run)]) == 1
    assert "Expected `path` to name a file, but got the folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["report"], ["figure"], ["figure", "other", "x"], ["report", "x", "--nothing"]])
def test_arguments_that_nobody_knows(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_it_needs_no_jsonargparse(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    program = (
        "import sys\n"
        "sys.modules['jsonargparse'] = None\n"
        "from lightning_step.cli import main\n"
        f"assert main(['report', {str(write('run', {'loss': {1: 1.0}}))!r}, '--out', {str(out)!r}]) == 0\n"
        "assert main(['--help']) == 0"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "  report    one HTML page" in run.stdout
    assert "  figure    one figure" in run.stdout
