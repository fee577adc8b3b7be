"""What an instrument said of images, as a JSON file keeps it, and several of them in one table.

A column holds figures of one instrument (network, weights, reference) and of one count of samples, or there is no
table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddfast.errors import DDFastError
from ddfast.files import expect, parse_json, read_text
from ddfast.portable import base_name

TITLES = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "clip_score": "CLIP score",
}  # fmt: skip
"""Figures as a table heads them; those that fall or rise with the count are told with it."""

_WITH_COUNT = ("fid", "sfid", "inception_score", "precision", "recall")
_FORMS = {"precision": ".4f", "recall": ".4f"}
_USUAL = {"clean": 30_000}
"""Images that an instrument's published figures are of; 50,000 elsewhere."""


@dataclass(kw_only=True)
class Judgement:
    """Figures, and what they are of.

    Attributes:
        instrument: adm, dd1 or clean.
        source: of the images: a folder or file (in a file: its base name), and how a student made them.
        count: of images.
        size: their height and width in pixels.
        figures: by name; a Fréchet distance has its standard error beside it, `_error`.
        inception, reference: name of the file, and its SHA-256.
        clip: of a CLIP score, name and SHA-256 of the model, and the SHA-256 of the captions; empty: there is none.
        preset: the published way in which they were made; empty: none.
        settings: labels, steps, seed, guidance, quantisation, ... of a student's images.
        versions: what they were measured with.
    """

    instrument: str
    source: str
    count: int
    size: tuple[int, int]
    figures: dict[str, float]
    inception: dict[str, str]
    reference: dict[str, str]
    clip: dict[str, str] = field(default_factory=dict)
    preset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """As a file holds it, which goes to others."""
        return json.dumps(dataclasses.asdict(self) | {"source": base_name(self.source)}, indent=2) + "\n"


def read_judgement(path: Path) -> Judgement:
    """What `ddfast evaluate --protocol ... --json FILE` wrote.

    Raises:
        DDFastError: it is no such file.
    """
    expected = "expected a file of `ddfast evaluate --protocol ... --json FILE`"
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise DDFastError(f"--beside {path}: is no JSON ({error}); {expected}") from error
    names = [one.name for one in dataclasses.fields(Judgement)]
    if not isinstance(values, dict) or not set(names[:7]) <= set(values):
        raise DDFastError(f"--beside {path}: names no instrument, reference and figures; {expected}")
    try:
        said = expect({name: values[name] for name in names if name in values}, Judgement)
        expect(said.settings.get("changed", []), list[str], "changed")
        parts = {"inception": said.inception, "reference": said.reference, **({"clip": said.clip} if said.clip else {})}
        for part, held in parts.items():
            if missing := {"file", "sha256", *(["captions"] if part == "clip" else [])} - held.keys():
                raise ValueError(f"{part}: {min(missing)} is missing")
        if said.count < 1:
            raise ValueError(f"count: got {said.count}, expected a positive number")
    except ValueError as error:
        raise DDFastError(f"--beside {path}: is damaged ({error}); {expected}") from error
    return said


def check_comparable(rows: Sequence[Judgement]) -> None:
    """Raise unless all rows are of one instrument, with the same weights, reference, and CLIP model and captions.

    Raises:
        DDFastError: figures that do not compare would share a column.
    """
    seen: dict[str, tuple[str, Judgement]] = {}
    for row in rows:
        made_with = {
            "instrument": row.instrument,
            "Inception of SHA-256": row.inception["sha256"],
            "reference of SHA-256": row.reference["sha256"],
        }
        if row.clip:
            made_with |= {
                "CLIP model of SHA-256": row.clip["sha256"],
                "CLIP captions of SHA-256": row.clip["captions"],
            }
        for what, value in made_with.items():
            before, first = seen.setdefault(what, (value, row))
            if value != before:
                raise DDFastError(
                    f"--beside: {row.source} was measured with the {what} {value[:12]}, {first.source} with "
                    f"{before[:12]}: their figures do not compare, and share no table"
                )


def table(rows: Sequence[Judgement]) -> list[str]:
    """Lines of a Markdown table, a row per judgement, and of what its figures are.

    Raises:
        DDFastError: the rows are not of one instrument.
    """
    check_comparable(rows)
    cells = [_cells(row) for row in rows]
    told = ["images", "preset", "labels", "count"]
    columns = list(dict.fromkeys(title for row in cells for title in row))
    figures = sorted((title for title in columns if title not in told), key=_place)
    used = [title for title in told if any(row.get(title) for row in cells)] + figures
    first = rows[0]
    lines = [
        f"Instrument {first.instrument}: reference {_file(first.reference)}, Inception {_file(first.inception)}.",
        "",
        "| " + " | ".join(used) + " |",
        "|" + "---|" * len(used),
        *("| " + " | ".join(row.get(title, "") for title in used) + " |" for row in cells),
        "",
        "±: standard error by the chance of the samples (jackknife over 5 groups of them), not of the reference.",
    ]
    usual = usual_count(first.instrument)
    few = sorted({row.count for row in rows if row.count < usual})
    if few:
        names, all_of_it = " and ".join(f"FID-{count_name(count)}" for count in few), count_name(usual)
        lines.append(f"{names} is no FID-{all_of_it}: few samples raise Fréchet distances, by more than ± says.")
    scored = next((row.clip for row in rows if row.clip), None)
    if scored:
        lines.append(f"CLIP score: 100 max(cos, 0) by {_file(scored)}.")
    return lines


def usual_count(instrument: str) -> int:
    """How many images an instrument's published figures are of."""
    return _USUAL.get(instrument, 50_000)


def count_name(count: int) -> str:
    """A count of samples as the field says it: 50k, 5k, 300."""
    return f"{count // 1000}k" if count % 1000 == 0 and count else str(count)


def _cells(row: Judgement) -> dict[str, str]:
    cells = {
        "images": row.source,
        "preset": ", but ".join(filter(None, (row.preset, ", ".join(row.settings.get("changed", []))))),
        "labels": str(row.settings.get("labels", "")),
        "count": str(row.count),
    }
    for name, title in TITLES.items():
        if name in row.figures:
            text = format(row.figures[name], _FORMS.get(name, ".2f"))
            if f"{name}_error" in row.figures:
                text += f" ± {row.figures[f'{name}_error']:.2f}"
            cells[f"{title}-{count_name(row.count)}" if name in _WITH_COUNT else title] = text
    return cells


def _place(title: str) -> tuple[int, int]:
    """Of a column: by its figure, then by its count."""
    name, _, count = title.partition("-")
    number = int(count.removesuffix("k")) * (1000 if count.endswith("k") else 1) if count else 0
    return list(TITLES.values()).index(name), number


def _file(said: dict[str, str]) -> str:
    return f"{said['file']} ({said['sha256'][:8]})"
