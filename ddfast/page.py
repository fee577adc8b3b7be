"""What a report holds, and its two forms: Markdown, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(kw_only=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str

    def markdown(self) -> Iterator[str]:
        """Its lines."""
        yield self.text


@dataclass(kw_only=True)
class Code:
    """Lines to copy; with a `title`, folded away under it, and in HTML alone."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""

    def markdown(self) -> Iterator[str]:
        """Its lines."""
        if not self.title:
            yield from (f"    {line}" for line in self.text.splitlines())


@dataclass(kw_only=True)
class Facts:
    """Names with their values; of those in `timed`, the value measures time."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, str]
    timed: tuple[str, ...] = ()

    def markdown(self) -> Iterator[str]:
        """A list."""
        yield from (f"- {name}: {value}" for name, value in self.facts.items())


@dataclass(kw_only=True)
class Table:
    """Rows of cells under a head, the first cell of each being its name.

    Attributes:
        title: tells what it is of, where no section does.
        timed: numbers of the columns that measure time: what two runs of the same settings may differ in.
        own: numbers of the rows that stand out.
        notes: what has to be known to read it.
    """

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[str]]
    title: str = ""
    timed: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    notes: str = ""

    def markdown(self) -> Iterator[str]:
        """A Markdown table, and its notes."""
        yield from ([self.title, ""] if self.title else [])
        yield _row(self.head)
        yield "|" + "---|" * len(self.head)
        yield from map(_row, self.rows)
        yield from (["", self.notes] if self.notes else [])


@dataclass(kw_only=True)
class Chart:
    """A drawing in lines, with what it says in words; `timed` as of a table, `notes` go below it."""

    title: str
    svg: str
    told: str
    timed: bool = False
    notes: str = ""


@dataclass(kw_only=True)
class Charts:
    """Charts side by side, in HTML alone."""

    kind: ClassVar[str] = "charts"
    charts: list[Chart]
    title: str = ""

    def markdown(self) -> Iterator[str]:
        """Nothing."""
        yield from ()


@dataclass(kw_only=True)
class Strip:
    """Pictures in a row, as data URIs, under one name and with what is told of them."""

    name: str
    images: list[str]
    told: str = ""


@dataclass(kw_only=True)
class Gallery:
    """Strips under each other, of the same number of pictures; `pixelated`: pictures so small are not smoothed."""

    title: str
    strips: list[Strip]
    pixelated: bool = False


@dataclass(kw_only=True)
class Galleries:
    """Galleries side by side, in HTML alone; `small`: as many in a row as of pairs of pictures fit."""

    kind: ClassVar[str] = "galleries"
    galleries: list[Gallery]
    small: bool = False

    def markdown(self) -> Iterator[str]:
        """Nothing."""
        yield from ()


Block: TypeAlias = Text | Code | Facts | Table | Charts | Galleries


@dataclass(kw_only=True)
class Section:
    """Blocks under a title."""

    title: str
    blocks: list[Block]

    def markdown(self) -> list[str]:
        """Its lines; none where nothing but a title and texts about pictures would be there."""
        shown = [block for block in self.blocks if not isinstance(block, Charts | Galleries)]
        if len(shown) < len(self.blocks) and all(isinstance(block, Text) for block in shown):
            return []
        lines = [f"## {self.title}", ""]
        for block in shown:
            if told := list(block.markdown()):
                lines += [*told, ""]
        return lines


@dataclass(kw_only=True)
class Card:
    """A figure that matters, what it is, and what to see it beside; `timed` as of a table."""

    name: str
    value: str
    beside: str
    timed: bool = False


@dataclass(kw_only=True)
class Page:
    """A report.

    Attributes:
        title, name: what it is of; the name is a user's.
        lead: the same in a sentence.
        cards: the figures that matter.
        picture: a file beside the Markdown form; empty: none.
        sections: all else.
    """

    title: str
    name: str
    lead: str
    cards: list[Card] = field(default_factory=list)
    picture: str = ""
    sections: list[Section] = field(default_factory=list)


def markdown(page: Page) -> str:
    """The page without charts and galleries."""
    cards = [_row([card.name for card in page.cards]), "|" + "---|" * len(page.cards)]
    cards.append(_row([f"{card.value}; {card.beside}" if card.beside else card.value for card in page.cards]))
    lines = [f"# {page.title} `{page.name}`", "", page.lead, "", *(cards if page.cards else []), ""]
    lines += [f"![samples]({page.picture})", ""] if page.picture else []
    for section in page.sections:
        lines += section.markdown()
    return "\n".join(lines)


def html(page: Page) -> str:
    """The page as one file: styles, charts and pictures are in it; what texts hold is never markup.

    A line that has the attribute `data-time` measures time: two runs of the same settings differ in it.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page=page)


def _row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
