from __future__ import annotations

from html.parser import HTMLParser

from lightning_step.reports.html import paragraph, preformatted, problems, render, table, text
from tests.reports.conftest import NASTY

VOID = {"meta", "link", "br", "img"}


class Checker(HTMLParser):
    """Follows the tags of a page and notes what does not belong there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()
        self.wrong += [f"{tag} stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.links += [value or ""] * (name in ("src", "srcset", "href", "xlink:href", "action", "data"))
            self.ids += [value or ""] * (name == "id")
            self.wrong += [f"{name} of {tag}"] * name.startswith("on")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check_page(page: str) -> Checker:
    """A page is whole, loads nothing and runs nothing."""
    found = Checker(page)
    assert page.startswith("<!DOCTYPE html>")
    assert found.wrong == []
    assert len(found.ids) == len(set(found.ids)), "every id once"
    outside = [link for link in found.links if not link.startswith(("#", "data:"))]
    assert outside == []
    assert [link for link in found.links if link.startswith("#") and link[1:] not in found.ids] == []
    assert found.tags & {"script", "iframe", "object", "embed", "form"} == set()
    assert "@import" not in page
    assert "url(http" not in page
    return found


def test_whatever_a_user_names_is_text() -> None:
    blocks = [paragraph(NASTY), preformatted(NASTY, NASTY), problems([NASTY]), table([NASTY], [[text(NASTY)]])]
    found = check_page(render(NASTY, paragraph(NASTY), [(NASTY, blocks)]))
    shown = "".join(found.words)
    assert shown.count('<script>alert("x")</script> & "q" \'a\' $\\frac{1}$ é _\N{REPLACEMENT CHARACTER}\nend') == 11
    assert len(found.headings) == 1


def test_the_checker_finds_what_is_wrong() -> None:
    page = "<!DOCTYPE html><p onclick='a'><b></p><img src='https://x.org/a.png'>"
    found = Checker(page)
    assert found.wrong == ["onclick of p", "</p>", "p stays open"]
    assert found.links == ["https://x.org/a.png"]
