"""Griffe's extension: our docstrings as its Google style and Markdown take them, citations and names linked."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe
from pymdownx.slugs import slugify

TITLES = {"Args": "Parameters"}
"""What the site calls a section."""

SECTION = re.compile(
    r"^(Args|Returns|Yields|Raises|Attributes|Numerics|Memory|Autograd|Backends|Source|Dimensions):(?: (.*))?$"
)
CITED = re.compile(r"docs/([\w/-]+)\.md(?:\s+section\s+(\d+)\s+\(([^)]+)\))?")
CODE = re.compile(r"(`+[^`]+`+)")
NAME = re.compile(r"`([a-zA-Z_][\w.]*)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package that was read."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Of a module, a class, a function or an attribute; defaults by name get their values."""
        for parameter in obj.parameters if obj.is_function else ():
            parameter.default = value_of(parameter.default, obj)
        if obj.docstring:
            obj.docstring.value = marked_up(obj.docstring.value, obj)


def marked_up(text: str, obj: griffe.Object | None = None) -> str:
    """A docstring of ours as a Markdown docstring in Google's style.

    A section of sentences ("Numerics: ...", "Returns:") is a paragraph with a title; those with an item a line are
    griffe's.
    """
    parts: list[str] = []
    for block in blocks(text):
        head, _, rest = block.partition("\n")
        section = SECTION.match(head)
        if section and (section[2] or section[1] in ("Returns", "Yields")):
            told = linked(" ".join(f"{section[2] or ''} {rest}".split()), obj)
            title = TITLES.get(section[1], section[1])
            parts.append(f'<span class="doc-section-title">{title}:</span> {told}')
        elif section:
            parts.append(f"{head}\n{linked(rest, obj)}")
        elif head.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        else:
            parts.append(linked(block, obj))
    return "\n\n".join(parts)


def blocks(text: str) -> list[str]:
    """Paragraphs, sections and examples, in order."""
    found: list[list[str]] = [[]]
    for line in inspect.cleandoc(text).splitlines():
        inside = bool(found[-1]) and SECTION.match(found[-1][0])
        ends = not line.strip() if not inside else bool(line) and not line.startswith(" ")
        if ends or SECTION.match(line):
            found.append([])
        if line.strip() or inside:
            found[-1].append(line)
    return ["\n".join(lines).rstrip() for lines in found if any(line.strip() for line in lines)]


def linked(text: str, obj: griffe.Object | None) -> str:
    """Text whose pages and names are links, and in which nothing but code is Markdown."""
    parts = CODE.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            parts[number] = CITED.sub(cited, re.sub(r"([*[])", r"\\\1", part).replace("<", "&lt;"))
        elif (name := NAME.fullmatch(part)) and (path := path_of(name[1], obj)):
            parts[number] = f'<autoref identifier="{path}" optional><code>{name[1]}</code></autoref>'
    return "".join(parts)


def cited(found: re.Match[str]) -> str:
    """A link to a page, or to the section of it that is cited by number and title; manual/hooks.py names both."""
    page, number, title = found.groups()
    heading = " ".join(f"{number}. {title}".split())  # a citation may go on in the next line
    anchor = f"#{slugify(case='lower')(heading, '-')}" if number else ""
    return f"[{found[0]}][docs/{page}.md{anchor}]"


def value_of(default: Any, obj: griffe.Object) -> Any:
    """What a default stands for: the value of a constant, where it is a name of one."""
    if isinstance(default, griffe.ExprName):
        found = obj.package.parent or obj.package
        path = default.canonical_path.split(".")
        if path[0] == found.name:
            constant = found[path[1:]] if len(path) > 1 else found
            if constant.is_attribute and constant.value is not None:
                return constant.value
    return default


def path_of(name: str, obj: griffe.Object | None) -> str | None:
    """The full name of what a docstring calls by a name of its scope; None: it is nothing of ddfast's."""
    if name.startswith("ddfast."):
        return name
    first, _, rest = name.partition(".")
    if obj is None or (obj.is_function and first in [parameter.name for parameter in obj.parameters]):
        return None
    try:
        path = obj.resolve(first)
    except griffe.NameResolutionError:
        return None
    return ".".join(filter(None, (path, rest))) if path.startswith("ddfast.") else None
