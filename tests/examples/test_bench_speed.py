"""The benchmark of time and memory runs, at a small size, and writes what it measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

import torch  # noqa: E402
from aims import AIMS, verdict  # noqa: E402
from bench_speed import main, measured_apart  # noqa: E402
from masking_speed import by_argsort, by_double_argsort, by_patterns, by_topk, patterns_of  # noqa: E402
from side_by_side import Alive, Row, Settings, medians  # noqa: E402

from lightning_step import NMPattern  # noqa: E402
from lightning_step.functional import nm_mask  # noqa: E402


def test_a_quick_run_of_the_parts_writes_a_page_and_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests go on after this one
    parts = "masks,growth,steps,layers,fit,files"
    monkeypatch.setattr(
        sys, "argv", ["bench_speed.py", "--quick", "--repeats", "1", "--only", parts, "--out", str(tmp_path)]
    )
    main()
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    found = {row["part"] for row in rows}
    assert found == {"masks", "growth", "training step", "peak memory", "layers", "fit start-up", "files"}
    assert all(row["value"] > 0 for row in rows if row["part"] not in ("layers", "fit start-up"))
    peaks = {row["what"]: row["value"] for row in rows if row["part"] == "peak memory"}
    assert peaks["GPT, phase I"] == 1.0, "nothing is allocated beyond a dense step"
    assert peaks["GPT, phase II"] < peaks["GPT, SR-STE's reference"]
    page = (tmp_path / "results.md").read_text()
    assert page.count("\n| ") == len(rows) + 1
    assert page in capsys.readouterr().out
    assert {(row["part"], row["what"], row["of"]) for row in rows} >= {
        aim for aim in AIMS if aim[0] in found and not aim[1].startswith("1:")
    }, "every aim is measured"


def test_a_part_is_measured_in_a_process_of_its_own() -> None:
    threads = torch.get_num_threads()
    settings = Settings(torch.device("cpu"), repeats=1, quick=True, largest=1, threads=threads + 1)
    rows = measured_apart("masks", settings)
    assert {row.part for row in rows} == {"masks"}
    assert torch.get_num_threads() == threads, "the process that measures has its own number"


def test_what_is_reached_and_what_is_missed() -> None:
    row = Row("masks", "2:4 magnitude_mask", "one multiply", 8.0)
    assert verdict(row) == "at most 8: reached"
    assert verdict(row._replace(value=8.1)) == "at most 8: missed"
    assert verdict(row._replace(of="else")) == ""
    slow = Row("training step", "GPT, SR-STE's reference", "phase II", 1.25)
    assert verdict(slow) == "at least 1.25: reached"
    assert verdict(slow._replace(value=1.2)) == "at least 1.25: missed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "masks,speed"], "Expected parts among masks, .* but got 'speed'")]
    + [(["--device", "cuda"], "Expected a CUDA device, but got none")] * (not torch.cuda.is_available()),
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit, match=message):
        main()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_the_published_methods_are_done_right(n: int, m: int) -> None:
    weight = torch.randn(8, 64)
    expected = nm_mask(weight.abs(), NMPattern(n, m)).to(weight.dtype)
    for method in (by_argsort, by_double_argsort, by_topk):
        assert torch.equal(method(weight, n, m), expected), method
    if m <= 8:
        assert torch.equal(by_patterns(weight, patterns_of(n, m, weight)), expected)


def test_bytes_alive_and_turns_are_counted() -> None:
    with Alive() as alive:
        kept = torch.empty(100)  # 400 bytes
        kept.add_(1).view(10, 10)
        for _ in range(3):
            kept + 1
    assert (alive.peak, alive.now) == (800, 400)
    turns: list[str] = []
    settings = Settings(torch.device("cpu"), repeats=2, quick=True, largest=1)
    medians({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, settings, warm=1)
    assert "".join(turns) == "ababba"
