"""A self-contained HTML page: text is escaped here, pictures are inline, and nothing is asked of any network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NewType

from lightning_step.reports.curves import Picture
from lightning_step.reports.drawing import COLOURS, inline_svg

__all__ = ["Markup", "figure", "figures", "paragraph", "preformatted", "problems", "render", "swatch", "table", "text"]

Markup = NewType("Markup", str)
"""A piece of HTML, in which everything that a user named is escaped."""

_LIGHT = """
  --ink: #1f2933; --muted: #5f6b76; --grid: #dddddd; --paper: #ffffff; --shade: #f3f5f7; --warn: #fff4e0; --edge: #e2a33b;
  --pale: #9bb8d3; --strong: #1f4e79; --limit: #c0392b; --switch: #2e7d32;
  --series-0: #1f6fb4; --series-1: #d9730d; --series-2: #2a8c5a; --series-3: #b5403a;
  --series-4: #7d5ba6; --series-5: #8c6d46; --series-6: #c2528b; --series-7: #3c8f9b;
"""
_DARK = """
  --ink: #e4e8ec; --muted: #9aa6b2; --grid: #39434d; --paper: #15191d; --shade: #1f252b; --warn: #372c16; --edge: #b98a35;
  --pale: #4d6d8c; --strong: #8fc1ef; --limit: #f0776a; --switch: #74c27a;
  --series-0: #6cb2ee; --series-1: #f5a65b; --series-2: #68c79a; --series-3: #ec8a83;
  --series-4: #b99be0; --series-5: #c9ab82; --series-6: #ea92bd; --series-7: #7cc9d4;
"""
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} }} }}
body {{ margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 69rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--grid); }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }}
p, figcaption, li {{ max-width: 48rem; overflow-wrap: anywhere; }}
.muted, figcaption {{ color: var(--muted); font-size: .87rem; }}
nav {{ margin: .75rem 0 0; }} nav a {{ margin-right: 1rem; }} a {{ color: var(--series-0); }}
.scroll {{ overflow-x: auto; margin: .75rem 0; }}
table {{ border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid);
  max-width: 26rem; overflow-wrap: break-word; }}
th {{ color: var(--muted); font-weight: 600; white-space: nowrap; }} td.number {{ text-align: right; }}
th.number {{ text-align: right; }}
.whole {{ white-space: nowrap; }} .wide {{ min-width: 11rem; overflow-wrap: anywhere; }}
figure {{ margin: .75rem 0 1rem; }} figure svg {{ display: block; width: 100%; height: auto; }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }} svg text {{ fill: var(--ink); }}
svg image {{ image-rendering: pixelated; }}
.columns {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; }}
.swatch {{ display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 2px; }}
.problems {{ background: var(--warn); border-left: 4px solid var(--edge); padding: .5rem 1rem; margin: 1rem 0; }}
.problems ul {{ margin: .25rem 0; padding-left: 1.2rem; }}
pre {{ background: var(--shade); padding: .75rem 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }}
@media print {{ body {{ max-width: none; font-size: 11px; padding: 0; }} nav {{ display: none; }}
  figure, tr {{ break-inside: avoid; }} h2, h3 {{ break-after: avoid; }} .scroll {{ overflow: visible; }} }}
"""


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
<style>{_STYLE}</style>
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
