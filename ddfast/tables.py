"""The figures of a run as tables: what `metrics.json` holds, in the words of a report, a card or a terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ddfast.config import TrainConfig
from ddfast.evaluation.sources import SOURCES
from ddfast.files import expect
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.page import Card, Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How a figure of a source is told.

    Attributes:
        label: what a column is called.
        form: of the number.
        axis: what an axis of a chart is called.
        target: the teacher's own figure is what a student can reach.
    """

    label: str
    form: str
    axis: str = ""
    target: bool = False


FIGURES = {
    "fid": Figure(label="FID", form=".2f", axis="FID", target=True),
    "frechet": Figure(label="Fréchet", form=".2f", axis="Fréchet distance", target=True),
    "sfid": Figure(label="sFID", form=".2f"),
    "inception_score": Figure(label="IS", form=".1f"),
    "precision": Figure(label="precision", form=".3f"),
    "recall": Figure(label="recall", form=".3f"),
    "class_accuracy": Figure(label="accuracy", form=".3f"),
    "teacher_nll": Figure(label="NLL/token", form=".3f", axis="NLL, nats per token", target=True),
    "pair_tv": Figure(label="pair TV", form=".3f", axis="pair TV", target=True),
    "count": Figure(label="samples", form="d"),
    "accepted_per_pass": Figure(label="accepted per pass", form=".3g"),
}
"""Known figures, in the order of a table's columns; one that is not here is told by its name."""

TIMES = {
    "seconds_per_image": ("ms/{sample}", 1e3, "{:.3f}"),
    "seconds_per_image_decoded": ("with image decoding", 1e3, "{:.3f}"),
    "speedup_vs_ar": ("speed-up over AR", 1, "{:.1f}x"),
}
"""Timings by batch size that a table has, with their columns' name, scale and form."""

MOST_CLASSES = 20
"""Classes that are told one by one; of more, the ten at either end."""


def checked_metrics(metrics: Any) -> dict[str, Any]:
    """What `metrics.json` holds, if it does: `num_groups`, and figures by source.

    Raises:
        ValueError: it is something else; the message names the figure.
    """
    found = expect(metrics, dict[str, Any])
    if expect(found.get("num_groups"), int, "num_groups") < 1:
        raise ValueError(f"num_groups: got {found['num_groups']}, expected a positive number")
    expect(found.get("path_distance", ""), str, "path_distance")
    for source in ("teacher", "student_1step", *SOURCES):
        for name, value in expect(found.get(source, {}), dict[str, Any], source).items():
            times = dict[str, float] if name.startswith(("seconds_", "speedup_")) else float
            expect(value, _KINDS.get(name, times), f"{source}.{name}")
        for label in (label for values in found.get(source, {}).get("by_class", {}).values() for label in values):
            int(label)
    return found


_KINDS = {
    "count": int,
    "by_class": dict[str, dict[str, float]],
    "least_likely": dict[str, list[float]],
}
"""Of figures that are not one number, nor by batch size."""


def rows_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of metrics.json that a table has, by source."""
    return {name: metrics[name] for name, source in SOURCES.items() if source.label and metrics.get(name)}


def names_of(metrics: Mapping[str, Any], student: Student) -> dict[str, Any]:
    """What the texts of `SOURCES` may hold."""
    groups = metrics["num_groups"]
    quarter = max(groups // 4, 1)
    steps = {"n": groups, "quarter": quarter, "kept": groups - quarter}
    sample = "image" if student.teacher.has_decoder else "sample"
    return {"method": student.method.upper(), "two": student.two_steps, "sample": sample, **steps}


def figures_of(rows: Collection[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures that are numbers in any row, known ones first; spreads (`x_error`) go with what they are of.

    Paths have a table of their own; a count that all have is told below the table, and passes are a source's steps.
    """
    found: dict[str, None] = {}
    for row in rows:
        found |= {name: None for name, value in row.items() if isinstance(value, (int, float))}
    elsewhere = {"passes", *(name for name in found if name.startswith("path_length"))}
    if len({row.get("count") for row in rows}) == 1:
        elsewhere.add("count")
    found = {name: None for name in found if name not in elsewhere}
    spreads = {name for name in found if name.endswith("_error") and name.removesuffix("_error") in found}
    order = [*(name for name in FIGURES if name in found), *(name for name in found if name not in FIGURES)]
    return {
        name: FIGURES.get(name) or Figure(label=name.replace("_", " "), form=".4g")
        for name in order
        if name not in spreads
    }


def cell(row: Mapping[str, Any], name: str, form: str) -> str:
    """A figure, with its spread where it has one; empty: the row has none."""
    if name not in row:
        return ""
    spread = row.get(f"{name}_error")
    return format(row[name], form) + ("" if spread is None else f" ± {_spread(spread)}")


def _spread(value: float) -> str:
    """Two digits, and no power of ten where it can be helped."""
    return f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"


def quality(config: TrainConfig, metrics: Mapping[str, Any], student: Student) -> Table:
    """A row per source of samples: quality, steps, time and speed-up side by side.

    Its form: docs/method.md section 18 (Published results).
    """
    batches = [str(batch) for batch in config.evaluation.batch_sizes]
    rows, names = rows_of(metrics), names_of(metrics, student)
    figures = figures_of(rows.values())
    times = [
        (name, batch, f"{label.format(**names)}, batch {batch}", scale, form)
        for name, (label, scale, form) in TIMES.items()
        if any(name in row for row in rows.values())
        for batch in batches
    ]
    table = Table(
        head=[
            "model",
            "steps",
            *(figure.label for figure in figures.values()),
            *(label for _, _, label, _, _ in times),
        ],
        rows=[],
        timed=tuple(range(2 + len(figures), 2 + len(figures) + len(times))),
        own=tuple(number for number, name in enumerate(rows) if SOURCES[name].by_student and SOURCES[name].timed),
        notes=_notes(config, metrics, figures, batches, names["sample"]),
    )
    for name, row in rows.items():
        source = SOURCES[name]
        cells = [source.label.format(**names), source.steps.format(**{**row, **names})]
        cells += [cell(row, figure, told.form) for figure, told in figures.items()]
        cells += [
            form.format(row[time][batch] * scale) if batch in row.get(time, {}) else ""
            for time, batch, _, scale, form in times
        ]
        table.rows.append(cells)
    return table


def _notes(
    config: TrainConfig, metrics: Mapping[str, Any], figures: Mapping[str, Figure], batches: list[str], sample: str
) -> str:
    """What has to be known to read the table."""
    notes = [f"Quality from {config.evaluation.samples} samples each."]
    if "frechet" in figures:
        notes.append("Fréchet: in the features of a small classifier, to real images of the training split.")
    notes.append("NLL: nats under the teacher with its guidance, unfiltered.")
    if "pair_tv" in figures:
        notes.append("Pair TV: to fresh samples of the teacher, whose own row is the floor.")
    if "precision" in figures:
        notes.append("Precision, recall: manifolds of the third nearest neighbour in the same features.")
    if any(f"{figure}_error" in row for row in rows_of(metrics).values() for figure in figures):
        notes.append("±: standard error by the chance of the samples (delete-a-group jackknife).")
    if "accepted_per_pass" in figures:
        notes.append("Accepted per pass: tokens over passes of the network, speculative decoding's.")
    notes.append("Times: medians, all sources in turn in one run; AR decoding is this package's KV-cached decoder with")
    notes.append("guidance.")
    plain = metrics.get("teacher_plain", {}).get("seconds_per_image", {})
    if plain:
        each = (f"{plain[batch] * 1e3:.2f} ms/{sample} at batch {batch}" for batch in batches if batch in plain)
        notes.append("The same in plain PyTorch takes " + ", ".join(each) + ".")
    return " ".join(notes)


_PATH_DISTANCES = {
    "lpips": "perceptual (PPL), by LPIPS",
    "features": "as PPL, by the squared distance of a small classifier's features instead of LPIPS",
}
"""What `path_distance` of metrics.json stands for."""


def paths(metrics: Mapping[str, Any], student: Student) -> Table | None:
    """How far images move along paths in noise: mean, and clipped mean as StyleGAN has it; None: not measured."""
    names, rows = names_of(metrics, student), []
    for source, row in rows_of(metrics).items():
        title = SOURCES[source].label.format(**names)
        steps = SOURCES[source].steps.format(**{**row, **names})
        for figure, what in (("path_length", ""), ("path_length_continuous", ", before codes are taken")):
            if figure in row:
                clipped = f"{figure}_clipped"
                rows.append([f"{title}{what}", steps, cell(row, figure, ".4g"), cell(row, clipped, ".4g")])
    if not rows:
        return None
    notes = [f"Path length: {_PATH_DISTANCES.get(metrics.get('path_distance', ''), 'perceptual')} (docs/method.md)."]
    notes.append(
        "A map to codes moves in jumps: its mean rests on the few short steps that meet one, and 0 says that none did. "
        "The continuous map before codes are taken is what compares."
    )
    return Table(head=["model", "steps", "path length", "path length, clipped"], rows=rows, notes=" ".join(notes))


def cards(metrics: Mapping[str, Any], student: Student) -> list[Card]:
    """What matters most: how good one step is beside the teacher, how fast, and how likely."""
    one, teacher = metrics["student_1step"], metrics["teacher"]
    baseline = metrics.get("independent_marginals", {})
    made: list[Card] = []
    best = next((name for name in FIGURES if FIGURES[name].target and name in one and name in teacher), "")
    for name in dict.fromkeys((best, "teacher_nll")):
        if name not in one:
            continue
        form = FIGURES[name].form
        beside = f"teacher's own {cell(teacher, name, form)}"
        if name in baseline:
            beside += f", independent marginals {cell(baseline, name, form)}"
        made.append(Card(name=f"{FIGURES[name].axis}, one step", value=cell(one, name, form), beside=beside))
    speed = {batch: f"{value:.1f}x" for batch, value in one.get("speedup_vs_ar", {}).items()}
    if speed:
        (batch, value), *others = speed.items()
        beside = ", ".join([f"at batch {batch}", *(f"{other} at batch {at}" for at, other in others)])
        beside += f"; {metrics['num_groups']} steps became 1"
        made.insert(1, Card(name="speed-up over AR, one step", value=value, beside=beside, timed=True))
    return made


_COMPARED = ("teacher", "student_1step", "student_2step")
"""Sources whose figures are told class by class."""


def by_class(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each figure that is told by class: source -> class -> value, for the sources that are compared."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for source in _COMPARED:
        for name, values in metrics.get(source, {}).get("by_class", {}).items():
            if values:
                found.setdefault(name, {})[source] = values
    return found


def compared_classes(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The classes to tell: all in their order, or of many the ten worst and the ten best of one step, worst first."""
    one = values.get("student_1step") or next(iter(values.values()))
    if len(one) <= MOST_CLASSES:
        return sorted(one, key=int)
    order = sorted(one, key=lambda label: (-one[label], int(label)))
    return order[: MOST_CLASSES // 2] + order[-(MOST_CLASSES // 2) :]


def classes(config: TrainConfig, metrics: Mapping[str, Any], teacher: Teacher, student: Student) -> Table | None:
    """A row per class, or for the worst and the best ones, of teacher and student; None: nothing is told by class."""
    found = by_class(metrics)
    if "teacher_nll" not in found or teacher.num_classes < 2:
        return None
    names = names_of(metrics, student)
    labels = compared_classes(found["teacher_nll"])
    columns = [(figure, source) for figure, values in found.items() for source in values]
    titles = {source: (SOURCES[source].picture or source).format(**names) for source in _COMPARED}
    told = {name: FIGURES.get(name) or Figure(label=name.replace("_", " "), form=".4g") for name in found}
    notes = [f"About {max(config.evaluation.samples // teacher.num_classes, 1)} samples of each class."]
    if len(labels) < teacher.num_classes:
        half = len(labels) // 2
        notes.append(f"Of {teacher.num_classes} classes the {half} worst by the NLL of one step, and the {half} best.")
    return Table(
        head=["class", *(f"{told[figure].label}, {titles[source]}" for figure, source in columns)],
        rows=[
            [label, *(cell({figure: found[figure][source].get(label, float("nan"))}, figure, told[figure].form)
                      for figure, source in columns)]
            for label in labels
        ],
        notes=" ".join(notes),
    )  # fmt: skip
