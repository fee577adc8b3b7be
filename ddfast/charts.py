"""Charts of a report, as SVG that takes its colours from the page: training, quality against speed, classes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias

from ddfast.evaluation.sources import SOURCES
from ddfast.page import Chart
from ddfast.tables import FIGURES, by_class, compared_classes, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_COLOURS = {
    name: f"#0101{number:02x}"
    for number, name in enumerate(("ink", "soft", "line", "ground", "s1", "s2", "s3", "s4", "s5", "s6"), 1)
}
"""What a variable of the page's style is drawn in, to be replaced by it."""

_SERIES = [_COLOURS[f"s{number}"] for number in range(1, 7)]
_TARGET: dict[str, Any] = {"color": _COLOURS["soft"], "linestyle": "--", "linewidth": 1.2, "zorder": 1}
_MARKS = "os^Dvp"
_DASHES = ("-", "--", ":", "-.")
_SIZE = (5.4, 3.5)  # inches of 72 units: on a phone a unit is a little less than a pixel

_LARGEST_CURVE = 240
"""Points of a curve; of more lines of the log, each is the mean of as many."""

_MARKED_CURVE = 24
"""Points up to which a curve shows them."""

_INFINITE = 1e30
"""What no axis reaches; NaN is not below it either."""

_DECADES = 10.0
"""The largest value over the smallest from which on an axis is logarithmic."""


# Curves of training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Figures of the log that share a chart: those whose whole name `pattern` matches, called by its first group."""

    title: str
    pattern: str
    axis: str
    timed: bool = False
    positive: bool = False


_GROUPS = (
    _Group(title="Loss", pattern=r"(?:(.+)_)?loss", axis="loss", positive=True),
    _Group(
        title="Parts of the loss", axis="before their weights", positive=True,
        pattern=r"(cross_entropy|embedding_distance|lpips|anchor|lookahead|score_distance)",
    ),
    _Group(
        title="Score discrepancy by flow time t (1: noise)", pattern=r"score_discrepancy_t(.+)",
        axis="squared distance", positive=True,
    ),
    _Group(title="Gradient norm before clipping", pattern=r"(?:(.+)_)?gradient_norm", axis="L2 norm", positive=True),
    _Group(title="Negative log-likelihood", pattern=r"(.+)_nll", axis="nats per token"),
    _Group(title="Diversity and averaging", pattern=r"(diversity|ema_distance)", axis="share of the teacher's"),
    _Group(title="Learning rate", pattern=r"(?:(.+)_)?learning_rate", axis="learning rate"),
    _Group(title="Pace", pattern=r"(sequences)_per_second", axis="sequences per second", timed=True),
    _Group(title="Peak memory of the GPU", pattern=r"(peak_memory)_gib", axis="GiB", timed=True),
    _Group(title="Work of the GPU", pattern=r"(gpu_utilisation)", axis="share of the time", timed=True),
)  # fmt: skip
_REST = _Group(title="Other figures", pattern=r"(.+)", axis="value")
_LEFT_OUT = {"stage", "step", "steps_per_second"}


def training(stage: str, lines: Sequence[Mapping[str, Any]], targets: Mapping[str, float]) -> list[Chart]:
    """The charts of a stage's log, one for every kind of figure that it holds.

    Args:
        stage: its name.
        lines: of the log, by step; figures that are not finite are left out, and counted.
        targets: figure of the log, measured on the student's samples -> the teacher's own, drawn as a line.
    """
    names = dict.fromkeys(
        name
        for line in lines
        for name, value in line.items()
        if isinstance(value, (int, float)) and name not in _LEFT_OUT
    )
    charts = []
    for group in (*_GROUPS, _REST):
        mine = {name: found for name in names if (found := re.fullmatch(group.pattern, name))}
        for name in mine:
            del names[name]
        curves, lost, each = [], 0, 1
        for name, found in mine.items():
            points, missing, merged = _curve(lines, name)
            lost, each = lost + missing, max(each, merged)
            label = found[1] or name
            label = f"t = {label}" if name.startswith("score_discrepancy_t") else label.replace("_", " ")
            if points:
                curves.append(("the student's samples" if name in targets else label, points, targets.get(name)))
        if curves:
            charts.append(_training_chart(stage, group, curves, lost, each))
    return charts


_Curve: TypeAlias = tuple[str, list[tuple[float, float]], float | None]
"""Label, points, and the teacher's own figure."""


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[tuple[float, float]], int, int]:
    """Steps and values of a figure, how many cannot be drawn, and how many lines a point is of."""
    told = [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
    finite = [(step, value) for step, value in told if abs(value) < _INFINITE]
    each = -(-len(finite) // _LARGEST_CURVE) or 1
    parts = [finite[first : first + each] for first in range(0, len(finite), each)]
    points = [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
    return points, len(told) - len(finite), each


def _training_chart(stage: str, group: _Group, curves: list[_Curve], lost: int, each: int) -> Chart:
    values = [value for _, points, target in curves for value in (*(y for _, y in points), target) if value is not None]
    is_log = group.positive and _spans_decades(values)

    def draw(axes: Axes) -> None:
        for number, (label, points, target) in enumerate(curves):
            style = {
                "color": _SERIES[number % len(_SERIES)],
                "linestyle": _DASHES[number // len(_SERIES) % len(_DASHES)],
            }
            mark = {"marker": _MARKS[number % len(_MARKS)], "markersize": 4} if len(points) <= _MARKED_CURVE else {}
            axes.plot(*zip(*points, strict=True), linewidth=1.5, label=label, **style, **mark)  # type: ignore[arg-type]
            if target is not None:
                axes.axhline(
                    target, color=_COLOURS["soft"], linestyle="--", linewidth=1.2, label="teacher's own samples"
                )
        _scale(axes, "y", values, is_log)
        _scale(axes, "x", [x for _, points, _ in curves for x, _ in points], False)
        axes.set_xlabel(f"step of {stage}")
        axes.set_ylabel(group.axis + (" (log)" if is_log else ""))
        _legend(axes)

    told = [f"{label} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points, _ in curves]
    steps = f"steps {curves[0][1][0][0]:.0f} to {curves[0][1][-1][0]:.0f}"
    notes = [f"A point is the mean of up to {each} lines of the log."] if each > 1 else []
    notes += [f"{lost} values that are not finite are left out."] if lost else []
    return Chart(
        title=group.title,
        svg=_drawn(draw, f"{stage} {group.title}"),
        told=f"{group.title} of {stage}, {steps}: {', '.join(told)}.",
        timed=group.timed,
        notes=" ".join(notes),
    )


# Quality against speed -----------------------------------------------------------------------------------------------


def quality_against_speed(metrics: Mapping[str, Any], names: Mapping[str, Any]) -> list[Chart]:
    """Every source that has both, for the figures whose target is the teacher and the smallest and largest batch.

    Args:
        metrics: content of metrics.json.
        names: what the texts of `SOURCES` hold.
    """
    rows, charts = rows_of(metrics), []
    for figure, told in FIGURES.items():
        placed = {
            name: row for name, row in rows.items() if row.get("seconds_per_image") and _is_number(row.get(figure))
        }
        if not told.target or len(placed) < 2:
            continue
        batches = sorted({batch for row in placed.values() for batch in row["seconds_per_image"]}, key=int)
        for batch in dict.fromkeys((batches[0], batches[-1])):
            points = [
                (row["seconds_per_image"][batch] * 1e3, float(row[figure]), _short(name, names), name)
                for name, row in placed.items()
                if batch in row["seconds_per_image"]
            ]
            target = rows.get("teacher", {}).get(figure)
            target = target if _is_number(target) else None
            charts.append(_speed_chart(told.axis, batch, points, target, names["sample"]))
    return charts


_Point: TypeAlias = tuple[float, float, str, str]
"""Milliseconds, figure, label, source."""


def _short(name: str, names: Mapping[str, Any]) -> str:
    """What a source is called beside its point."""
    source = SOURCES[name]
    return (source.picture or source.profile or source.label.removeprefix("baseline ")).format(**names)


def _speed_chart(axis: str, batch: str, points: list[_Point], target: float | None, sample: str) -> Chart:
    values = [y for _, y, _, _ in points] + ([target] if target is not None else [])
    is_log = _spans_decades(values)

    def draw(axes: Axes) -> None:
        if target is not None:
            axes.axhline(target, **_TARGET)
        for x, y, _, name in points:
            source = SOURCES[name]
            mark, colour = "D", _COLOURS["soft"]
            if source.by_student:
                mark, colour = "o", _COLOURS["s1"]
            elif name == "teacher":
                mark, colour = "s", _COLOURS["s2"]
            axes.plot([x], [y], marker=mark, markersize=8, color=colour, linestyle="none")
        _scale(axes, "x", [x for x, _, _, _ in points], True, margin=0.18)
        _scale(axes, "y", values, is_log, margin=0.14)
        axes.set_xlabel(f"ms per {sample} (log), image decoding left out")
        axes.set_ylabel(f"{axis}{' (log)' if is_log else ''}, lower is better")
        place_labels(axes, [(x, y, label) for x, y, label, _ in points], target)

    title = f"{axis} against time, batch {batch}"
    told = [f"{label} {y:.3g} in {x:.3g} ms" for x, y, label, _ in points]
    return Chart(
        title=title,
        svg=_drawn(draw, title),
        told=f"{title}: {', '.join(told)}" + (f"; the teacher's own is {target:.3g}." if target is not None else "."),
        timed=True,
    )


_BESIDE = 14.0
"""How far from its point a label needs no line to it."""


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str]], line: float | None = None) -> list[Any]:
    """Write a label beside each point (x, y, text), none over another, over a point, or outside; returns the texts.

    Nor over a horizontal line, where there is one. Each takes the nearest free place, with a line to its point where
    that is not beside it; the drawing's size and scales are fixed from then on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    drawing = axes.figure
    canvas = FigureCanvasAgg(drawing)  # type: ignore[arg-type]
    drawing.draw_without_rendering()  # type: ignore[union-attr]
    drawing.set_layout_engine("none")  # type: ignore[union-attr]
    renderer, inside = canvas.get_renderer(), axes.get_window_extent()
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    marks = [Bbox.from_bounds(cx - 6, cy - 6, 12, 12) for cx, cy in centres]
    taken = [*marks]
    if line is not None:
        height = axes.transData.transform((points[0][0], line))[1]
        taken.append(Bbox.from_extents(inside.x0, height - 1, inside.x1, height + 1))
    texts: list[Any] = []
    made: list[Any] = []
    lines: list[Any] = []
    for (x, y, text), centre in zip(points, centres, strict=True):
        label = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", color=_COLOURS["ink"], fontsize=10.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _COLOURS["soft"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip
        others = [box for box in [*marks, *texts] if not box.contains(*centre)]
        size = _text_box(label, renderer)
        costs: dict[tuple[float, float, str, str], float] = {}
        for place in _places():
            box, lead = _placed(size, centre, place)
            away = math.hypot(*place[:2])
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            overlaps = outside + sum(box.overlaps(other) for other in taken)
            crossings = sum(other.intersects_bbox(box) for other in lines)
            crossings += sum(lead.intersects_bbox(other) for other in others) if away > _BESIDE else 0
            costs[place] = 1e6 * overlaps + 1e3 * crossings + away  # an overlap is worse, and a way the least of all
        best = min(costs, key=costs.__getitem__)
        label.set_position(best[:2])
        label.set(ha=best[2], va=best[3])
        box, lead = _placed(size, centre, best)
        far = math.hypot(*best[:2]) > _BESIDE
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(far)
        taken.append(box)
        texts.append(box)
        lines += [lead] if far else []
        made.append(label)
    return made


def _placed(box: Any, centre: Any, place: tuple[float, float, str, str]) -> tuple[Any, Any]:
    """What a label takes up in a place, and the line from its point to it.

    Args:
        box: what it takes up anywhere.
        centre: of its point.
        place: one of `_places`; a point is a pixel here.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    dx, dy, across, along = place
    x, y = centre[0] + dx, centre[1] + dy
    left = x - box.width * {"left": 0.0, "center": 0.5, "right": 1.0}[across]
    low = y - box.height * {"bottom": 0.0, "center": 0.5, "top": 1.0}[along]
    return Bbox.from_bounds(left, low, box.width, box.height), Path([centre, (x, y)])


def _text_box(label: Any, renderer: Any) -> Any:
    """Of an annotation, without its line."""
    from matplotlib.text import Text

    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def _places() -> Iterable[tuple[float, float, str, str]]:
    """Where a label may be, seen from its point: offsets and alignments, the nearest first."""
    for distance in (9.0, 18.0, 30.0, 44.0, 60.0, 80.0, 104.0):
        aside = distance * 0.75
        yield from (
            (distance, 0.0, "left", "center"), (-distance, 0.0, "right", "center"),
            (0.0, distance, "center", "bottom"), (0.0, -distance, "center", "top"),
            (aside, aside, "left", "bottom"), (aside, -aside, "left", "top"),
            (-aside, aside, "right", "bottom"), (-aside, -aside, "right", "top"),
        )  # fmt: skip


# Classes -------------------------------------------------------------------------------------------------------------


def classes(metrics: Mapping[str, Any], names: Mapping[str, Any]) -> list[Chart]:
    """A chart for every figure by class: a line per class, a mark per source."""
    found, charts = by_class(metrics), []
    if "teacher_nll" not in found:
        return []
    labels = compared_classes(found["teacher_nll"])
    for figure, by_source in found.items():
        told = FIGURES[figure].axis or FIGURES[figure].label
        charts.append(_class_chart(told, labels, {_short(name, names): values for name, values in by_source.items()}))
    return charts


def _class_chart(axis: str, labels: list[str], by_source: Mapping[str, Mapping[str, float]]) -> Chart:
    def draw(axes: Axes) -> None:
        for place, label in enumerate(labels):
            values = [by[label] for by in by_source.values() if label in by]
            if values:
                axes.plot([min(values), max(values)], [place, place], color=_COLOURS["line"], linewidth=3, zorder=1)
        for number, (name, by) in enumerate(by_source.items()):
            points = [(by[label], place) for place, label in enumerate(labels) if label in by]
            mark = {"marker": "so^"[number % 3], "color": _SERIES[(1, 0, 2)[number % 3]]}
            axes.plot(*zip(*points, strict=True), linestyle="none", markersize=6.5, label=name, **mark)  # type: ignore[arg-type]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.yaxis.grid(False)
        _scale(axes, "x", [by[label] for by in by_source.values() for label in labels if label in by], False)
        axes.set_xlabel(axis)
        axes.set_ylabel("class")
        _legend(axes)

    told = []
    for name, by in by_source.items():
        there = [label for label in labels if label in by]
        low, high = (pick(there, key=lambda label: by[label]) for pick in (min, max))
        told.append(f"{name} from {by[low]:.3g} (class {low}) to {by[high]:.3g} (class {high})")
    title = f"{axis} by class"
    height = max(2.6, 1.1 + 0.22 * len(labels))
    return Chart(title=title, svg=_drawn(draw, title, (_SIZE[0], height)), told=f"{title}: {'; '.join(told)}.")


# Drawing -------------------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _DECADES


def _scale(axes: Axes, which: str, values: Sequence[float], is_log: bool, margin: float = 0.05) -> None:
    """Scale, limits and ticks of an axis for these values, so that it has numbers whatever they are."""
    from matplotlib import ticker

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    if is_log and low > 0:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        ratio = max(high / low, 1.05)
        low, high = low / ratio**margin, high * ratio**margin
        subs = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
        few = ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8) if high / low > 4 else few)
        axis.set_minor_locator(ticker.NullLocator())
    else:
        room = (high - low) * margin or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_formatter(ticker.FuncFormatter(_tick))


def _tick(value: float, place: int | None) -> str:
    """A tick's number, short: 20k, 1.5, 2e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{round(value, 10):g}".replace("-", "−" if "e" not in f"{value:g}" else "-")


def _legend(axes: Axes) -> None:
    """Above the axes, where there is more than one curve."""
    handles, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    if len(kept) > 1:
        columns = 4 if max(map(len, kept)) <= 9 else 3 if max(map(len, kept)) <= 14 else 2
        axes.figure.legend(
            kept.values(), kept.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=10.5,
            handlelength=1.6, columnspacing=1.2, borderpad=0, borderaxespad=0.2,
        )  # fmt: skip


def _drawn(draw: Callable[[Axes], None], salt: str, size: tuple[float, float] = _SIZE) -> str:
    """What `draw` draws, as one line of SVG in the page's colours; the same for the same."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 11,
        "text.color": _COLOURS["ink"], "axes.labelcolor": _COLOURS["soft"], "axes.edgecolor": _COLOURS["line"],
        "xtick.color": _COLOURS["line"], "ytick.color": _COLOURS["line"], "xtick.labelcolor": _COLOURS["soft"],
        "ytick.labelcolor": _COLOURS["soft"], "grid.color": _COLOURS["line"], "grid.linewidth": 0.6,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "axes.labelsize": 10.5,
        "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawing: Drawing = Drawing(figsize=size, dpi=72, layout="constrained")
        FigureCanvasSVG(drawing)
        draw(drawing.add_subplot())
        written = BytesIO()
        drawing.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _for_a_page(written.getvalue().decode())


def _for_a_page(svg: str) -> str:
    """A drawing as a part of a page: no head, no metadata, no names but those that it asks for itself."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    wanted = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in wanted else "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)  # a hundredth of a pixel does
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return " ".join(svg.split())
