"""The documentation site builds strictly, is complete, and asks nobody else for anything."""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_step

ROOT = Path(__file__).parents[1]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
DOCUMENTED = [name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)]
MODULES = {name: importlib.import_module(name) for name in DOCUMENTED}
# What examples may import from: test_architecture.py says so.
PUBLIC = re.search(r"^PARTS = (.*)$", (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(site: Path) -> dict[str, str]:
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    # Pages of source files have no text of ours, and the one for a server's missing pages has absolute links.
    return {name: text for name, text in pages.items() if not name.startswith(("source/", "404"))}


def fetched(text: str) -> list[str]:
    """What a browser fetches to show a page, links of the text apart."""
    sources = re.findall(r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)", text)
    links = re.findall(r"<link\b[^>]*?\bhref=[\"']?([^\"'\s>]+)", text)
    return [html.unescape(url) for url in sources + links]


def ids(text: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', text))


def test_the_make_target_builds_what_is_tested_here() -> None:
    assert "-m mkdocs build --strict\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_module_that_people_import_from_is_in_the_reference() -> None:
    assert PUBLIC is not None
    public = set(re.findall(r'"(\w+)"', PUBLIC[1]))
    assert len(public) > 4
    assert {name.partition(".")[2] for name in DOCUMENTED} >= public | {"callbacks", "errors"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_of_a_module_is_on_its_page(name: str, site: Path) -> None:
    [page] = [page for page in API if re.search(rf"^::: {re.escape(name)}$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    there = ids((site / "api" / f"{page.stem}.html").read_text(encoding="utf-8"))
    assert [each for each in MODULES[name].__all__ if f"{name}.{each}" not in there] == []


def test_every_name_of_the_package_itself_is_documented_and_listed(site: Path) -> None:
    listed = {each for module in MODULES.values() for each in module.__all__} | {"__version__"}
    assert [name for name in lightning_step.__all__ if name not in listed] == []
    index = (site / "api" / "index.html").read_text(encoding="utf-8")
    linked = set(re.findall(r"<code>(\w+)</code></a>", index))
    assert [name for name in lightning_step.__all__ if name not in linked | {"__version__"}] == []


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    pages = pages_of(site)
    assert len(pages) > 15
    elsewhere = {(name, url) for name, text in pages.items() for url in fetched(text) if re.match(r"(https?:)?//", url)}
    assert elsewhere == set()
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [url for text in styles for url in re.findall(r"url\((?!data:)[\"']?((?:https?:)?//[^)]+)", text)] == []


def test_formulas_are_mathml_and_nothing_is_left_of_restructuredtext(site: Path) -> None:
    pages = pages_of(site)
    assert pages["how-step-works.html"].count("<math") > 20
    assert pages["api/functional.html"].count("<math") > 50
    left = ("arithmatex", ":math:", ".. math", ".. code-block", "`_", "[[names]]", "--8&lt;--")
    texts = {name: re.sub(r"<(pre|script)\b.*?</\1>", "", text, flags=re.DOTALL) for name, text in pages.items()}
    assert [(name, what) for name, text in texts.items() for what in left if what in text] == []


def test_every_link_within_the_site_leads_to_a_place_that_is_there(site: Path) -> None:
    known = {path: ids(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for name, text in pages_of(site).items():
        for url in re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', text):
            target, _, anchor = html.unescape(url).partition("#")
            if re.match(r"\w+:|//", target):
                continue
            path = (site / name).parent.joinpath(target or Path(name).name).resolve()
            if not path.exists() or (anchor and path in known and anchor not in known[path] | {"__top"}):
                broken.append((name, url))
    assert broken == []


def test_what_is_looked_for_is_found() -> None:
    text = (
        '<script src="https://a.b/c.js"></script><link rel=x href=//d.e/f.css><a href="https://g.h">i</a><img src="j.png">'
    )
    assert fetched(text) == ["https://a.b/c.js", "j.png", "//d.e/f.css"]


def test_a_docstring_becomes_markdown(hooks: ModuleType) -> None:
    text = (
        "Short: :math:`a_1`, see `STEP` and `lightning_step.strip`, not `nothing` nor ``STEP``.\n\n"
        ".. math:: a\n    + b\n\n.. code-block:: text\n\n    tree\n\nExample:\n    >>> 1\n    1\n\n"
        "References:\n    Lu et al., `A title of\n    two lines <https://example.org>`_, 2023.\n"
    )
    made = hooks.as_markdown(text)
    assert "$a_1$" in made
    assert "[`STEP`][lightning_step.recipes.STEP] and [`strip`][lightning_step.parametrization.strip]" in made
    assert "not `nothing` nor ``STEP``" in made
    assert "$$a + b$$" in made
    assert "```text\ntree\n```" in made
    assert "Examples:\n    >>> 1" in made
    assert "**References:**\n\nLu et al., [A title of two lines](https://example.org), 2023." in made


def test_a_link_to_a_test_leads_to_its_line(hooks: ModuleType) -> None:
    path = "tests/test_docs_site.py"
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = lines.index("def test_a_link_to_a_test_leads_to_its_line(hooks: ModuleType) -> None:") + 1
    assert hooks.line_of(path, "[`test_a_link_to_a_test_leads_to_its_line`]") == f"#__codelineno-0-{number}"
    assert hooks.line_of(path, "the site's tests") == ""
    assert hooks.target_of("api/index.md", "../../README.md") == "README.md"
    assert hooks.target_of("api/index.md", "../matrix.md") is None
