"""A self-contained HTML page: text is escaped here, pictures are inline, and nothing is asked of any network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NewType

from lightning_step.reports.curves import Picture
from lightning_step.reports.drawing import COLOURS
from lightning_step.reports.saving import inline_svg
from lightning_step.reports.style import STYLE

__all__ = ["Markup", "figure", "figures", "paragraph", "preformatted", "problems", "render", "swatch", "table", "text"]

Markup = NewType("Markup", str)
"""A piece of HTML, in which everything that a user named is escaped."""


def text(value: object) -> Markup:
    """Any text, escaped.

    Args:
        value: Shown as ``str`` shows it; control characters and halves of characters become a replacement sign.

    Returns:
        What a browser shows as that text.

    Example:
        >>> text("<b> & 'x'")
        '&lt;b&gt; &amp; &#x27;x&#x27;'
    """
    return Markup(html.escape(_clean(str(value))))


def _clean(value: str) -> str:
    return "".join(letter if letter.isprintable() or letter in " \n\t" else "\N{REPLACEMENT CHARACTER}" for letter in value)


def paragraph(*parts: str, muted: bool = False) -> Markup:
    """A paragraph of plain text.

    Args:
        parts: Sentences.
        muted: Small and grey.

    Returns:
        The element.

    Example:
        >>> paragraph("a < b")
        '<p>a &lt; b</p>'
    """
    kind = ' class="muted"' if muted else ""
    return Markup(f"<p{kind}>{text(' '.join(parts))}</p>")


def preformatted(title: str, content: str) -> Markup:
    """A long text that opens on a click.

    Args:
        title: What is seen before.
        content: The text.

    Returns:
        The element.

    Example:
        >>> preformatted("recipe", "STEP")
        '<details><summary>recipe</summary><pre>STEP</pre></details>'
    """
    return Markup(f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>")


def table(head: Sequence[str], rows: Iterable[Sequence[Markup | str]], numbers: Iterable[int] = ()) -> Markup:
    r"""A table.

    Args:
        head: Names of the columns.
        rows: Cells; `Markup` made by the other functions is kept, any other string must have gone through `text`.
        numbers: Columns that are aligned to the right.

    Returns:
        The element.

    Example:
        >>> table(["run", "steps"], [[text("a"), text(3)]], numbers=[1])[-53:]
        '<td class="number">3</td></tr>\n</tbody></table></div>'
    """
    right = set(numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        opened = [f'<{tag} class="number">' if i in right else f"<{tag}>" for i in range(len(cells))]
        return "".join(f"{begin}{cell}</{tag}>" for begin, cell in zip(opened, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    header = line("th", [text(name) for name in head])
    return Markup(f'<div class="scroll"><table><thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def problems(found: Sequence[str]) -> Markup:
    """A box with what a reader should know before trusting the rest.

    Args:
        found: One sentence each.

    Returns:
        The element; nothing if there is nothing.

    Example:
        >>> problems(["a file is damaged"])
        '<div class="problems"><ul><li>a file is damaged</li></ul></div>'
    """
    items = "".join(f"<li>{text(problem)}</li>" for problem in found)
    return Markup(f'<div class="problems"><ul>{items}</ul></div>' if found else "")


def swatch(index: int) -> Markup:
    """The colour of a run.

    Args:
        index: Its place among the runs.

    Returns:
        The element.

    Example:
        >>> swatch(9)
        '<span class="swatch" style="background: var(--series-1)"></span>'
    """
    return Markup(f'<span class="swatch" style="background: var(--series-{index % len(COLOURS)})"></span>')


def figure(picture: Picture, title: bool = True) -> Markup:
    """A picture with its caption.

    Args:
        picture: The picture; its name must be fit for an id.
        title: Whether its title stands above it.

    Returns:
        The element.

    Example:
        >>> from lightning_step.figures import blank_figure
        >>> figure(Picture("a", "A", blank_figure(4, 3), "shows a"))[:40]
        '<figure id="a" style="max-width: 384px">'
    """
    width = round(picture.figure.get_size_inches()[0] * 96)
    head = f"<h3>{text(picture.title)}</h3>" if title else ""
    caption = f"<figcaption>{text(picture.caption)}</figcaption>" if picture.caption else ""
    svg = inline_svg(picture.figure, f"f-{picture.name}", _clean(picture.title))
    return Markup(f'<figure id="{picture.name}" style="max-width: {width}px">{head}{svg}{caption}</figure>')


def figures(pictures: Iterable[Picture]) -> Markup:
    """Small pictures, two beside each other where there is room.

    Args:
        pictures: The pictures.

    Returns:
        The element.

    Example:
        >>> figures([])
        '<div class="columns"></div>'
    """
    return Markup(f'<div class="columns">{"".join(figure(picture) for picture in pictures)}</div>')


def render(title: str, lead: Markup, sections: Sequence[tuple[str, Sequence[Markup]]]) -> str:
    """The whole page.

    Args:
        title: Of the page.
        lead: What stands below it.
        sections: Heading and content of each.

    Returns:
        An HTML document that loads nothing.

    Example:
        >>> page = render("Report", paragraph("Two runs."), [("Summary", [paragraph("All well.")])])
        >>> page.startswith("<!DOCTYPE html>"), ">Summary</h2>" in page
        (True, True)
    """
    parts = list(enumerate(sections, 1))
    links = " ".join(f'<a href="#s-{i}">{text(name)}</a>' for i, (name, _) in parts)
    bodies = [f'<section>\n<h2 id="s-{i}">{text(name)}</h2>\n' + "\n".join(body) for i, (name, body) in parts]
    # The policy makes a browser refuse what this page never asks for; the empty icon keeps it from asking by itself.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
{lead}
<nav>{links}</nav>
</header>
<main>
{"".join(body + chr(10) + "</section>" + chr(10) for body in bodies)}</main>
</body>
</html>
"""
