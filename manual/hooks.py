"""MkDocs' hook: the repository's pages as pages of the site, their links turned, and what a built site must hold.

Every page is read on GitHub too, so links are written as they work there, and are turned here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/golden/README.md": "golden.md",
}
"""Pages that lie outside docs/, and what they are called on the site."""

SOURCES = {page: source for source, page in BESIDE.items()}

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^()\s#]+)(#[^()\s]*)?(?=\))")
"""Of a link in Markdown to a file: the file, the anchor."""

NAME = re.compile(r"(?<![`\[])`(ddfast(?:\.\w+)+)`(?!`)")


def source_of(page: str) -> str:
    """A page's file, from the root of the repository."""
    return SOURCES.get(page, f"docs/{page}")


def place_of(file: str) -> str:
    """Where the site has a file of the repository: a page, or a file to be kept."""
    return BESIDE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else f"files/{file.lstrip('.')}")


def linked(page: str, target: str) -> str | None:
    """The file, from the root of the repository, that a link of a page's source leads to; None: there is none."""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), unquote(target)))
    return file if (ROOT / file).is_file() else None


def turned(markdown: str, page: str) -> str:
    """A page's text with its links as they work on the site, and with names of the API linked."""

    def turn(found: re.Match[str]) -> str:
        file = linked(page, found[1])
        if file is None:  # MkDocs says so
            return found[0]
        return posixpath.relpath(place_of(file), posixpath.dirname(page) or ".") + (found[2] or "")

    def refer(found: re.Match[str]) -> str:
        return f'<autoref identifier="{found[1]}" optional><code>{found[1]}</code></autoref>'

    return NAME.sub(refer, LINK.sub(turn, markdown))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages outside docs/, and files that pages link to."""
    for source, page in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    kept = set()
    for page in files.documentation_pages():
        targets = LINK.findall(page.content_string)
        kept |= {file for target, _ in targets if (file := linked(page.src_uri, target))}
    for file in sorted(kept):
        if place_of(file).startswith("files/"):
            files.append(File.generated(config, place_of(file), content=(ROOT / file).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return turned(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Names for pages and their sections, by which docstrings cite them (manual/docstrings.py)."""
    source, headings = source_of(page.file.src_uri), list(page.toc)
    register = config.plugins["autorefs"].register_anchor
    register(page, source, headings[0].id)
    while headings:
        heading = headings.pop()
        register(page, f"{source}#{heading.id}", heading.id)
        headings += heading.children


def on_post_build(config: MkDocsConfig) -> None:
    faults = list(faults_of(Path(config.site_dir)))
    if faults:
        raise PluginError("\n".join(faults))


LOADED = {
    "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "video": ("src",),
    "audio": ("src",), "embed": ("src",), "object": ("data",), "image": ("href", "xlink:href"),
}  # fmt: skip
"""Attributes by which an element makes a browser fetch something; of `link` it depends on what it is."""

FOLLOWED = {"canonical", "prev", "next", "alternate", "edit"}
"""Kinds of `link` that a reader may follow, and a browser does not fetch."""


class Built(HTMLParser):
    """A built page: its anchors, what it links to, what it makes a browser fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of any element."""
        told = {name: value or "" for name, value in attrs}
        self.anchors |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a" and told.get("href"):
            self.links.append(told["href"])
        if tag == "link" and told.get("rel", "").split()[0] not in FOLLOWED:
            self.fetched.append(told.get("href", ""))
        for name in LOADED.get(tag, ()):
            several = told.get(name, "").split(",") if name == "srcset" else [told.get(name, "")]
            self.fetched += [one.split()[0] for one in several if one.strip()]


def faults_of(site: Path) -> Iterator[str]:
    """What is wrong with a built site: links and anchors that lead nowhere, anything that is fetched from elsewhere.

    MkDocs looks at the links of Markdown; these are all, those of docstrings among them.
    """
    pages = {path.relative_to(site).as_posix(): Built(path.read_text("utf-8")) for path in site.rglob("*.html")}
    for name, page in sorted(pages.items()):
        for target in page.fetched + page.links:
            to = urlsplit(target)
            if to.scheme or to.netloc:
                if target in page.fetched and to.scheme != "data":
                    yield f"{name}: fetches {target} from elsewhere"
                continue
            path = to.path.lstrip("/") if name == "404.html" else posixpath.join(posixpath.dirname(name), to.path)
            path = posixpath.normpath(unquote(path)) if to.path else name
            path = "index.html" if path == "." else path
            if not (site / path).is_file():
                yield f"{name}: no file {path} ({target})"
            elif to.fragment and path in pages and unquote(to.fragment) not in pages[path].anchors:
                yield f"{name}: {path} has no anchor {to.fragment}"
    for path in sorted(site.rglob("*.css")):
        for target in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']*)|@import", path.read_text("utf-8")):
            yield f"{path.relative_to(site)}: fetches {target} from elsewhere"
