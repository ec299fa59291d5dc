from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_step import NMPattern
from lightning_step.errors import FileFormatError
from lightning_step.reports.results import Result, best_cells, read_results

COMPARED = Path(__file__).parents[2] / "examples" / "benchmarks" / "results" / "main"


def test_every_field_is_read(tmp_path: Path) -> None:
    body = {"recipe": "STEP", "n": 1, "m": 8, "seed": 2, "loss": 1.5, "lr": 0.1, "lam": 2e-4, "optimizer": "SGD"}
    body |= {"switch": 0.3, "frozen": False, "change": "x", "losses": [[20, 1.5], [10, 2.0]], "unknown": [1]}
    (tmp_path / "a.jsonl").write_text(f'\n{json.dumps(body)}\n\n{{"recipe": "dense", "loss": NaN, "n": null}}\n')
    full, bare = read_results(tmp_path / "a.jsonl")
    assert full == Result("STEP", NMPattern(1, 8), 1.5, 2, 0.1, 2e-4, "SGD", 0.3, False, "x", ((10, 20), (2.0, 1.5)))
    assert bare[:2] == ("dense", None)
    assert math.isnan(bare.loss)
    assert bare[3:] == Result("dense", None, 1.0)[3:]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "Expecting value"),
        ("[1]", "it is no object"),
        ('{"loss": 1}', "'recipe' is missing"),
        ('{"recipe": "STEP"}', "'loss' is missing"),
        ('{"recipe": "STEP", "loss": "low"}', "loss is 'low'"),
        ('{"recipe": "STEP", "loss": true}', "loss is True"),
        ('{"recipe": "STEP", "loss": 1, "n": 2}', "n is 2 and m is None"),
        ('{"recipe": "STEP", "loss": 1, "n": 5, "m": 4}', "Expected 1 <= n <= m"),
        ('{"recipe": "STEP", "loss": 1, "losses": [1]}', "cannot unpack"),
    ],
)
def test_a_line_that_is_no_result_is_named(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"recipe": "dense", "loss": 1}\n' + line)
    with pytest.raises(FileFormatError, match=rf"Expected a result as JSON.* in line 2 of '.*a\.jsonl': .*{reason}"):
        read_results(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_a_file_without_results(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"Expected a (JSON object a line|file of JSON lines)"):
        read_results(tmp_path / "a.jsonl")


def test_the_best_setting_is_the_best_mean_of_those_with_most_seeds() -> None:
    runs = [
        Result("a", None, loss, seed, lr)
        for lr, losses in ((1, (2.0, 2.2)), (2, (1.0, 3.4)))
        for seed, loss in enumerate(losses)
    ]
    runs += [
        Result("a", None, 0.5, 0, 3),
        Result("b", None, math.nan),
        Result("a", None, math.nan, 0, 4),
        Result("a", None, 1, 1, 4),
    ]
    cells = best_cells(runs, lambda run: run.recipe)
    assert list(cells) == ["a"], "b broke down"
    assert (cells["a"].mean, cells["a"].settings, len(cells["a"].runs)) == (pytest.approx(2.1), 4, 2)
    assert cells["a"].spread == pytest.approx(math.sqrt(0.02))


def test_the_comparison_in_this_form_is_the_one_of_its_table() -> None:
    cells = best_cells((r for r in read_results(COMPARED / "char.jsonl") if not r.change), lambda r: (*r[:2], *r[7:9]))
    page = (COMPARED / "results.md").read_text(encoding="utf-8")
    for key, row in {
        ("STEP", NMPattern(2, 4), None, None): "STEP",
        ("SR-STE", NMPattern(1, 8), None, None): "SR-STE",
        ("dense", None, None, None): "dense",
        ("STEP", NMPattern(2, 4), None, False): "v not frozen",
        ("STEP", NMPattern(2, 4), 0.3, None): "switch at 30 %",
    }.items():
        assert f"| {row} | {cells[key].mean:.4f} ± {cells[key].spread:.4f} |" in page
