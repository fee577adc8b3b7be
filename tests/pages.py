"""An HTML page as a browser reads it: what the tests of reports look at."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Read(HTMLParser):
    """A page: its elements with their attributes, and its texts; raises `AssertionError` where tags do not match."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> of nothing"
        opened = self.open.pop()
        assert opened == tag, f"<{opened}> ended by </{tag}>"

    def handle_data(self, text: str) -> None:
        if text.strip() and self.open[-1:] != ["style"]:
            self.texts.append(text.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a name."""
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(html: str) -> Read:
    """A page that stands alone and can be read by everybody; else an `AssertionError`."""
    page = Read()
    page.feed(html)
    page.close()
    assert not page.open
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if name in attributes:
                assert re.match(r"data:|#", attributes[name] or ""), f"{tag} {name}={attributes[name]!r:.80}"
        if tag == "img":
            assert attributes.get("alt")
        if attributes.get("role") in ("img", "region"):
            assert attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    assert all(target.startswith(("#", "'#", '"#')) for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    named = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(named) == len(set(named)), "an id is there twice"
    (root,) = page.all("html")
    assert root["lang"] == "en"
    assert html.startswith("<!DOCTYPE html>")
    return page
