"""The parts of a report: its forms, tables and charts."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pages import read_page

from ddfast import charts, tables
from ddfast.distill.tracking import read_log
from ddfast.gallery import data_uri
from ddfast.models.toy import ToyTeacher
from ddfast.page import Card, Charts, Code, Facts, Galleries, Gallery, Page, Section, Strip, Table, Text, html, markdown
from ddfast.recipes import get_recipe

HOSTILE = '</style><script>alert(1)</script><img src=x onerror="y"> & "q" | {{ 7 * 7 }}'


def test_what_a_user_names_is_never_markup():
    strip = Strip(name=HOSTILE, images=2 * [data_uri(torch.zeros(3, 4, 4, dtype=torch.uint8))], told=HOSTILE)
    chart = charts.training(HOSTILE, [{"step": 1, HOSTILE: 2.0, "$x$_loss": 1.0, "_loss": 1.0}], {})
    blocks = [
        Text(text=HOSTILE), Code(text=HOSTILE), Code(text=HOSTILE, title=HOSTILE), Facts(facts={HOSTILE: HOSTILE}),
        Table(head=[HOSTILE, HOSTILE], rows=[[HOSTILE, HOSTILE]], title=HOSTILE, notes=HOSTILE),
        Charts(charts=chart, title=HOSTILE),
        Galleries(galleries=[Gallery(title=HOSTILE, strips=[strip])]),
    ]  # fmt: skip
    card = Card(name=HOSTILE, value=HOSTILE, beside=HOSTILE)
    page = Page(
        title=HOSTILE, name=HOSTILE, lead=HOSTILE, cards=[card], sections=[Section(title=HOSTILE, blocks=blocks)]
    )
    read = read_page(html(page))
    assert len(read.all("img")) == 2  # ours
    assert sum(HOSTILE in text for text in read.texts) > 15
    assert "49" not in read.texts
    assert markdown(page).count("\n| ") == 4  # a pipe in a cell makes no cell


def test_what_both_forms_hold():
    facts = Facts(facts={"machine": "two cores", "seconds": "5"}, timed=("seconds",))
    table = Table(head=["model", "NLL", "ms"], rows=[["teacher", "1.5", "9"]], timed=(2,), notes="Nats.")
    sections = [
        Section(title="Figures", blocks=[table]),
        Section(title="Pictures", blocks=[Text(text="only with pictures"), Galleries(galleries=[])]),
        Section(title="Origin", blocks=[Code(text="python -m ddfast.train"), facts, Code(text="a = 1", title="All")]),
    ]
    page = Page(title="DD1 on", name="digits", lead="A student.", picture="samples.png", sections=sections)
    text = markdown(page)
    assert "# DD1 on `digits`" in text
    assert "| model | NLL | ms |\n|---|---|---|\n| teacher | 1.5 | 9 |\n\nNats." in text
    assert "    python -m ddfast.train" in text
    assert "- seconds: 5" in text
    assert "![samples](samples.png)" in text
    assert "only with pictures" not in text
    assert "a = 1" not in text
    made = html(page)
    assert made == html(page)
    read = read_page(made)
    assert {"Figures", "Pictures", "only with pictures", "a = 1", "two cores"} <= set(read.texts)
    timed = [line for line in made.splitlines() if "data-time" in line]
    assert [line.replace(" data-time", "") for line in timed] == ["<td>9</td>", "<dd>5</dd>"]


def log(steps: range, **figures: float) -> list[dict]:
    return [{"stage": "s", "step": step, **{name: value / step for name, value in figures.items()}} for step in steps]


def test_curves_of_dd1():
    lines = log(
        range(1, 100), loss=3.0, cross_entropy=2.0, embedding_distance=1.0, gradient_norm=5.0, learning_rate=1e-3,
        steps_per_second=3.0, sequences_per_second=20.0,
    )  # fmt: skip
    made = {chart.title: chart for chart in charts.training("distillation", lines, {})}
    assert list(made) == ["Loss", "Parts of the loss", "Gradient norm before clipping", "Learning rate", "Pace"]
    assert [title for title, chart in made.items() if chart.timed] == ["Pace"]
    loss = made["Loss"]
    assert loss.told == "Loss of distillation, steps 1 to 99: loss from 3 to 0.0303."
    for words in ("step of distillation", "loss (log)", "var(--s1)", "var(--soft)"):
        assert words in loss.svg
    assert "learning rate" in made["Learning rate"].svg
    assert "cross entropy" in made["Parts of the loss"].svg
    assert "#0101" not in loss.svg
    assert charts.training("distillation", lines, {})[0].svg == loss.svg


def test_curves_of_dd2():
    lines = [
        {"step": 1, "guidance_loss": 0.5, "guidance_gradient_norm": 1.0, "guidance_learning_rate": 1e-4},
        {"step": 2, "student_loss": -0.25, "student_gradient_norm": 0.1, "score_distance": -0.5, "anchor": 1.0},
        {"step": 3, "score_discrepancy_t0.125": 4.0, "score_discrepancy_t0.875": 0.01, "peak_memory_gib": 2.5},
        {"step": 4, "teacher_nll": 2.0, "diversity": 0.9, "ema_distance": 0.01, "of_ones_own": 7.0},
    ]
    made = {chart.title: chart for chart in charts.training("matching", lines, {"teacher_nll": 1.5})}
    assert list(made) == [
        "Loss", "Parts of the loss", "Score discrepancy by flow time t (1: noise)", "Gradient norm before clipping",
        "Negative log-likelihood", "Diversity and averaging", "Learning rate", "Peak memory of the GPU",
        "Other figures",
    ]  # fmt: skip
    assert "loss (log)" not in made["Loss"].svg  # a negative value has none
    by_time = made["Score discrepancy by flow time t (1: noise)"].svg
    assert "t = 0.125" in by_time
    assert "squared distance (log)" in by_time
    for words in ("teacher's own samples", "the student's samples"):
        assert words in made["Negative log-likelihood"].svg
    assert "of ones own from 7 to 7" in made["Other figures"].told


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-300, 1e300, -5.0, 3.0])
def test_any_value_is_drawn_or_counted(value):
    for lines in ([{"step": 1, "loss": value}], [{"step": 1, "loss": value}, {"step": 2, "loss": 1.0}]):
        made = charts.training("distillation", lines, {})
        if abs(value) < 1e30:
            assert made[0].notes == ""
        elif len(lines) == 1:
            assert made == []
        else:
            assert made[0].notes == "1 values that are not finite are left out."


def test_a_long_log_is_drawn_in_few_points():
    made = charts.training("distillation", log(range(1, 5001), loss=1.0), {})[0]
    assert len(made.svg) < 20_000
    assert made.notes == "A point is the mean of up to 21 lines of the log."
    assert "steps 21 to 5000" in made.told


def test_nothing_is_drawn_of_nothing():
    assert charts.training("distillation", [], {}) == []
    assert charts.training("distillation", [{"step": 1, "note": "text", "loss": None}], {}) == []


def test_a_resumed_log_is_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == {}
    path.write_text("")
    assert read_log(path) == {}
    lines = [
        {"stage": "tuning", "step": 5, "loss": 9.0}, {"stage": "tuning", "step": 10, "loss": 8.0},
        {"stage": "matching", "step": 1, "loss": math.nan},
        {"stage": "tuning", "step": 10, "loss": 7.0}, {"stage": "tuning", "step": 7, "loss": 6.0},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '[1]\n{"step": 3}\n{"stage": "tuning", "step": 15, "lo')  # killed while it wrote
    read = read_log(path)
    assert list(read) == ["tuning", "matching"]
    assert [(line["step"], line["loss"]) for line in read["tuning"]] == [(5, 9.0), (7, 6.0), (10, 7.0)]


STUDENT = SimpleNamespace(method="dd1", two_steps="2", teacher=SimpleNamespace(has_decoder=True))


def metrics(**rows: dict) -> dict:
    own = {"teacher_nll": 1.5, "seconds_per_image": {"1": 0.01, "64": 0.001}}
    speed = {"speedup_vs_ar": {"1": 10.0, "64": 3.0}}
    made = {"teacher": own, "student_1step": own | speed | {"teacher_nll": 2.5}, **rows}
    return {"method": "dd1", "recipe": "digits", "num_groups": 16, **made}


def told(**rows: dict) -> Table:
    config = get_recipe("digits")
    config.evaluation.batch_sizes = (1, 64)
    return tables.quality(config, metrics(**rows), STUDENT)


def test_a_table_shows_what_the_rows_hold():
    few = told()
    assert few.head[:3] == ["model", "steps", "NLL/token"]
    assert few.rows[0][:3] == ["teacher, AR decoding", "16", "1.500"]
    assert few.rows[1] == ["DD1 student", "1", "2.500", "10.000", "1.000", "10.0x", "3.0x"]
    assert few.timed == (3, 4, 5, 6)
    assert few.own == (1,)
    more = {"frechet": 3.14159, "frechet_error": 0.123, "path_length": 7231.9, "of_ones_own": 5, "by_class": {}}
    more |= {"passes": 9.0}
    table = told(teacher=more)
    assert table.head == ["model", "steps", "Fréchet", "NLL/token", "of ones own", *few.head[3:]]
    assert table.rows[0] == ["teacher, AR decoding", "16", "3.14 ± 0.12", "", "5", "", "", "", ""]


def test_paths_have_a_table_of_their_own():
    assert tables.paths(metrics(), STUDENT) is None
    row = {"path_length": 30.0, "path_length_error": 12.3, "path_length_clipped": 20.0, "teacher_nll": 1.0}
    row |= {"path_length_continuous": 7.0, "path_length_continuous_error": 0.5}
    made = metrics(student_1step=row) | {"path_distance": "features"}
    table = tables.paths(made, STUDENT)
    assert table.rows == [
        ["DD1 student", "1", "30 ± 12", "20"],
        ["DD1 student, before codes are taken", "1", "7 ± 0.5", ""],
    ]
    assert "classifier's features" in table.notes
    quality = told(student_1step=row)
    assert not [label for label in quality.head if "path" in label]


def test_cards_say_what_matters_most():
    nll, speed = tables.cards(metrics(independent_marginals={"teacher_nll": 6.0}), STUDENT)
    assert (nll.value, nll.beside) == ("2.500", "teacher's own 1.500, independent marginals 6.000")
    assert (speed.value, speed.timed) == ("10.0x", True)
    assert speed.beside == "at batch 1, 3.0x at batch 64; 16 steps became 1"
    better = {"teacher_nll": 2.0, "frechet": 5.0, "frechet_error": 0.25}
    names = [card.name for card in tables.cards(metrics(teacher=better, student_1step=better), STUDENT)]
    assert names == ["Fréchet distance, one step", "NLL, nats per token, one step"]


@pytest.mark.parametrize("count", [2, 20, 21, 1000])
def test_few_classes_are_all_told_and_of_many_the_ends(count):
    values = {str(label): float((label * 11) % count) for label in range(count)}
    teacher, config = ToyTeacher(), get_recipe("digits")
    teacher.num_classes = count
    row = {"by_class": {"teacher_nll": values, "class_accuracy": {"0": 1.0}}}
    made = tables.classes(config, metrics(student_1step=row), teacher, STUDENT)
    labels = [cells[0] for cells in made.rows]
    if count <= 20:
        assert labels == [str(label) for label in range(count)]
        assert "worst" not in made.notes
    else:
        order = sorted(values, key=values.get)
        assert set(labels) == {*order[:10], *order[-10:]}
        assert values[labels[0]] == count - 1
        assert f"Of {count} classes the 10 worst" in made.notes
    names = tables.names_of(metrics(), STUDENT)
    nll, accuracy = charts.classes(metrics(student_1step=row), names)
    assert "nats per token" in nll.svg
    assert accuracy.told.startswith("accuracy by class: DD1, 1 step from 1 (class 0)")


def test_nothing_by_class_where_there_is_none():
    teacher = ToyTeacher()
    assert tables.classes(get_recipe("digits"), metrics(), teacher, STUDENT) is None
    assert charts.classes(metrics(), {}) == []


def test_quality_against_speed_has_every_timed_source():
    names = tables.names_of(metrics(), STUDENT)
    found = charts.quality_against_speed(metrics(skip_last={"teacher_nll": 3.0}), names)
    assert [chart.title for chart in found] == [f"NLL, nats per token against time, batch {batch}" for batch in (1, 64)]
    assert found[0].told.endswith("DD1, 1 step 2.5 in 10 ms; the teacher's own is 1.5.")
    assert found[0].timed
    assert charts.quality_against_speed(metrics(teacher={"teacher_nll": 1.0}), names) == []


@pytest.mark.parametrize("spread", [1.0, 1.001, 1.5, 100.0])
def test_labels_do_not_overlap(spread):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.5), dpi=72, layout="constrained")
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.add_subplot()
    points = [(spread**number, spread**-number, f"a source of samples {number}") for number in range(7)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    axes.set(xscale="log", yscale="log", xlim=(0.5, 2 * spread**6), ylim=(0.5 * spread**-6, 2))
    labels = charts.place_labels(axes, points, 1.0)
    boxes = [charts._text_box(label, renderer) for label in labels]
    assert not [(a, b) for a in range(7) for b in range(a) if boxes[a].overlaps(boxes[b])]
    inside, line = axes.get_window_extent(), axes.transData.transform((1, 1))[1]
    assert not [box for box in boxes if box.y0 < line < box.y1]
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_large_pictures_are_reduced():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, 256, 256), generator=generator, dtype=torch.uint8)
    assert data_uri(noise[:, :16, :16]).startswith("data:image/png;base64,")
    large = data_uri(noise)
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 50_000
