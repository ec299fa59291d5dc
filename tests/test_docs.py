"""What the pages in docs/ point at is there: files, and tests by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelPruning
from torch.ao.pruning import WeightNormSparsifier

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RESULTS = DOCS.parent / "examples" / "benchmarks" / "results" / "main" / "results.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())


def links(page: Path) -> list[tuple[str, Path]]:
    """Text and target of every link to a file of the project."""
    return [
        (text, (page.parent / target).resolve()) for text, target in LINK.findall(page.read_text()) if "://" not in target
    ]


def names_in(text: str) -> list[str]:
    return re.findall(r"test_\w+", text)


def test_a_link_and_the_names_in_in_it_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[`test_a`](../t.py), [`test_b` and `test_c`](t.py#x), [web](https://example.org/test_d.py)")
    assert links(page) == [("`test_a`", (tmp_path.parent / "t.py")), ("`test_b` and `test_c`", tmp_path / "t.py")]
    assert names_in("`test_b` and `test_c`") == ["test_b", "test_c"]


@every_page
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    assert [str(target) for _, target in links(page) if not target.exists()] == []


@every_page
def test_every_test_that_a_page_names_is_in_the_file_it_links_to(page: Path) -> None:
    missing = [
        (name, target.name)
        for text, target in links(page)
        if target.suffix == ".py"
        for name in names_in(text)
        if f"def {name}(" not in target.read_text()
    ]
    assert missing == []


def test_the_matrix_names_a_test_in_every_row() -> None:
    lines = (DOCS / "matrix.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) > 40
    assert [row for row in rows if "](../tests/" not in row] == []


def losses() -> list[tuple[float, float]]:
    """Mean loss, and how much that is above dense, of every row of the comparison on the task that the page speaks of."""
    text = RESULTS.read_text(encoding="utf-8").partition("\n**char-tuned**: ")[0]
    rows = re.findall(r"\| (\d\.\d{4}) ± [\d.]+ \| ([+-]\d\.\d{4}) \|", text)
    return [(float(mean), float(above)) for mean, above in rows]


def test_every_loss_that_the_text_speaks_of_comes_from_the_committed_comparison() -> None:
    spoken = set(re.findall(r"\b\d\.\d{3}\b", (DOCS / "choosing.md").read_text(encoding="utf-8")))
    assert len(spoken) >= 4
    measured = losses()
    assert len(measured) > 15
    known = {f"{above:.3f}" for _, above in measured} | {
        f"{one - other:.3f}" for one, _ in measured for other, _ in measured
    }
    # Betas are numbers, too.
    assert spoken - known == {"0.999"}


def test_all_results_are_on_the_page_of_benchmarks() -> None:
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    results = sorted(path.relative_to(DOCS.parent).as_posix() for path in RESULTS.parents[1].rglob("results.md"))
    assert results
    assert [path for path in results if f'--8<-- "{path}"' not in page] == []


@pytest.mark.parametrize("tool", [ModelPruning, WeightNormSparsifier])
def test_arguments_of_other_tools_are_called_what_they_are_called_there(tool: type) -> None:
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    named = {name for name in inspect.signature(tool).parameters if re.search(rf"`(?:[^`\n]*\W)?{name}=", text)}
    assert len(named) >= 3
    rows = [line for line in text.splitlines() if line.startswith("| `") and any(f"{name}=" in line for name in named)]
    written = set(re.findall(r"(\w+)=", " ".join(line.split(" | ")[0] for line in rows)))
    assert written <= set(inspect.signature(tool).parameters)
