"""What mkdocs does besides: formulas as MathML, source files as pages, and docstrings' reStructuredText as Markdown.

mkdocs loads this file as a hook, and mkdocstrings as an extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import html
import posixpath
import re
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_step"
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")  # its text, and where it leads; an anchor is dropped
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


# --- mkdocs -----------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Called with all files of the site. Adds a page for every source file that a page links to."""
    from mkdocs.structure.files import File

    linked = {
        target
        for file in list(files.documentation_pages())
        for target in linked_sources(Path(file.abs_src_path).read_text(encoding="utf-8"), file.src_uri)
    }
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.md", content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called with the text of a page. Lets links to source files lead to their pages in the site."""

    def local(match: re.Match[str]) -> str:
        path = target_of(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"[{match[1]}]({posixpath.relpath(f'source/{path}.md', start)}{line_of(path, match[1])})"

    # Without a prompt, a console block would be coloured as if it were all output.
    markdown = re.sub(r"^```console$", "```bash", markdown, flags=re.MULTILINE)
    return LINK.sub(local, markdown.replace("[[names]]", table_of_names()))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Called with the HTML of a page. Turns formulas into MathML, which browsers show without any script."""
    return FORMULA.sub(mathml, html)


def linked_sources(markdown: str, src_uri: str) -> set[str]:
    """Paths, from the root of the project, of the files outside of docs/ that a page links to."""
    found = {target_of(src_uri, match[2]) for match in LINK.finditer(markdown)}
    return {path for path in found if path is not None}


def target_of(src_uri: str, link: str) -> str | None:
    """What a relative link of a page in docs/ means, if that is outside of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(src_uri), link))
    return None if path.startswith(("docs/", "..")) or not (ROOT / path).exists() else path


def line_of(path: str, text: str) -> str:
    """The anchor of the line where the first test that a link names is defined; nothing if there is none."""
    named = re.search(r"test_\w+", text)
    if named is None or not path.endswith(".py"):
        return ""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next((f"#__codelineno-0-{i}" for i, line in enumerate(lines, 1) if f"def {named[0]}(" in line), "")


def source_page(path: str) -> str:
    """A page that shows a file, or what is in a folder."""
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path}\n\n"
    file = ROOT / path
    if file.is_dir():
        return head + "\n".join(f"- `{child.name}`" for child in sorted(file.iterdir()) if child.name[0] not in "._") + "\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return head + text
    language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(file.suffix, "text")
    return f'{head}``````{language} linenums="1"\n{text}``````\n'


def mathml(match: re.Match[str]) -> str:
    """A formula as MathML."""
    return str(convert(html.unescape(match[3]), display="inline" if match[2] == "(" else "block"))


# --- griffe -----------------------------------------------------------------------------------------------------------


class Docstrings(griffe.Extension):
    """Rewrites the reStructuredText of docstrings, which Python's own tools show well, as the Markdown that mkdocs reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that was read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
        elif obj.is_attribute and obj.parent is not None and obj.name in (obj.parent.exports or ()):
            # mkdocstrings leaves out what has none; a public constant is to be listed all the same.
            obj.docstring = griffe.Docstring("A constant.", parent=obj)


def as_markdown(docstring: str) -> str:
    """Formulas, links, code blocks, and names of this package in backticks.

    Args:
        docstring: As Python has it.

    Returns:
        The same in Markdown.
    """
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)  # the name under which griffe knows doctests
    text = re.sub(r"^References:\n((?: {4}.*\n?|\n)+)", _references, text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", _display, text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)", _fence, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"`([^`<]+?)\s+<(https?://[^>]+)>`_", lambda m: f"[{' '.join(m[1].split())}]({m[2]})", text)
    return re.sub(r"(?<![`\w\[])`(?:lightning_step(?:\.\w+)*\.)?(\w+)((?:\.\w+)*)`(?!`)", _reference, text)


def _display(match: re.Match[str]) -> str:
    indent, formula = match[1], " ".join(line.strip() for line in match[2].splitlines())
    return f"{indent}$${formula}$$"


def _references(match: re.Match[str]) -> str:
    return f"**References:**\n\n{textwrap.dedent(match[1])}"


def _fence(match: re.Match[str]) -> str:
    body = textwrap.indent(textwrap.dedent(match[3]).strip("\n"), match[1])
    return f"{match[1]}```{match[2]}\n{body}\n{match[1]}```\n\n"


def _reference(match: re.Match[str]) -> str:
    name, member = match[1], match[2]
    where = public_names().get(name)
    return match[0] if where is None else f"[`{name}{member}`][{where}{member}]"


def table_of_names() -> str:
    """What the package itself offers, one row for each name, with a link to where it is documented."""
    package, where = loaded(), public_names()
    rows = ["| name | what it is |", "|---|---|"]
    for name in sorted((str(name) for name in package.exports or () if name in where), key=str.lower):
        docstring = package[name].docstring
        first = as_markdown(docstring.value.splitlines()[0]) if docstring else ""
        rows.append(f"| [`{name}`][{where[name]}] | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


@lru_cache
def loaded() -> griffe.Module:
    """The package as griffe reads it, without importing it."""
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)])
    assert isinstance(package, griffe.Module)
    return package


@lru_cache
def public_names() -> dict[str, str]:
    """Every name that a public module lists, and the path it is documented under."""
    package = loaded()
    names: dict[str, str] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for module in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            listed = package[module.removeprefix(f"{PACKAGE}.")] if module != PACKAGE else package
            names |= {str(name): f"{module}.{name}" for name in listed.exports or ()}
    return names
