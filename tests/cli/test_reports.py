"""The report of every method and kind of teacher, whole, of untrained students."""

import json
from pathlib import Path

import pytest
from commands import as_a_process
from launching import launch
from pages import read_page

from ddfast import gallery, processes, report
from ddfast.config import TrainConfig
from ddfast.evaluation import protocol
from ddfast.models.llamagen.captions import give_captions
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.runs import open_student

ALWAYS = {
    "Quality and speed", "Samples from the same noise", "Interpolations in noise", "Failures", "Training",
    "What produced it",
}  # fmt: skip
SPEEDS = ("teacher", "teacher_plain", "student_1step", "student_2step", "independent_marginals", "image_decoder")

LOG = {
    "digits": [{"stage": "distillation", "step": 10, "loss": 2.0, "gradient_norm": 1.0, "learning_rate": 1e-3}],
    "dd2": [
        {"stage": "tuning", "step": 10, "full_loss": 0.5, "full_gradient_norm": 0.1},
        {"stage": "matching", "step": 5, "student_loss": 0.5, "score_discrepancy_t0.125": 2.0, "teacher_nll": 3.0,
         "diversity": 0.9, "ema_distance": 0.1, "sequences_per_second": 30.0},
    ],
}  # fmt: skip


def opened(root: Path, name: str) -> tuple:
    """Settings, teacher and student, with a handful of samples to measure."""
    if name == "toy":
        teacher = ToyTeacher()
        student = TransformerStudent(teacher, width=16, depth=1, heads=2).eval()
        student.point = 2
        config = TrainConfig(recipe="toy")
    else:
        config, teacher, student = open_student(root / name, "cpu", lambda *_: None)
    if name == "text":
        give_captions(teacher, root / "captions.safetensors", device="cpu")
    config.evaluation.samples, config.evaluation.batch_size, config.evaluation.batch_sizes = 30, 8, (1,)
    config.evaluation.paths = 4
    return config, teacher, student


def made(cache: Path, root: Path, name: str, out: Path) -> None:
    """A report, as `train` ends with it."""
    with as_a_process(cache, "train"), pytest.MonkeyPatch.context() as patch, processes.together("cpu", 60):
        patch.setattr(protocol, "measure_speed", lambda *_, **__: {source: {1: 0.001} for source in SPEEDS})
        patch.setattr(report, "command_line", lambda command: f"python -m ddfast.{command}")
        config, teacher, student = opened(root, name)
        config.out = out
        if processes.rank() == 0:
            out.mkdir(parents=True)
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG.get(name, [])))
        metrics = protocol.evaluate(config, teacher, student, lambda *_: None)
        report.write_report(config, metrics, student, {"distillation": 5.0})
        if processes.rank() == 0:
            (out / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize("name", ["digits", "dd2", "llamagen", "text", "toy"])
def test_all_of_it(cache, generators, tmp_path, name):
    made(cache, generators, name, tmp_path / name)
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    assert len(metrics["student_1step"]["least_likely"]["number"]) == 12
    html = (tmp_path / name / "report.html").read_text()
    read = read_page(html)
    sections = {text for text in read.texts if text in {*ALWAYS, "Class by class"}}
    wanted = ALWAYS | {"Class by class"}
    wanted -= {"Training"} if name not in LOG else set()
    wanted -= {"Interpolations in noise"} if name == "toy" else set()
    wanted -= {"Class by class"} if name in ("text", "toy") else set()  # captions; one class
    assert sections == wanted
    assert len(html) < 1_500_000
    teacher = opened(generators, name)[1]
    groups = min(teacher.num_conditions, 10)
    pictures = groups * 6 * 3 + min(groups, 4) * 8 * 2 + 12 * 2
    assert len(read.all("img")) == (pictures if teacher.has_decoder else 0)
    if name == "toy":
        assert "there are no pictures of them" in html
        assert "NLL/token, DD1, 1 step" in html
    if name == "text":
        assert "caption 2" in read.texts
    if name == "digits":
        assert {"path length", "DD1 student, before codes are taken"} <= set(read.texts)
    if name == "dd2":
        assert "t = 0.125" in html
        assert "DD2 distilled the var teacher" in html
    text = (tmp_path / name / "report.md").read_text()
    assert "## What produced it" in text
    assert "svg" not in text


def test_failures_are_the_least_likely_and_their_own_values(cache, generators, tmp_path):
    made(cache, generators, "digits", tmp_path / "one")
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    worst = metrics["student_1step"]["least_likely"]
    assert worst["teacher_nll"] == sorted(worst["teacher_nll"], reverse=True)
    by_class = metrics["student_1step"]["by_class"]
    assert by_class.keys() == {"teacher_nll", "class_accuracy"}
    assert list(by_class["teacher_nll"]) == [str(label) for label in range(10)]
    mean = sum(by_class["teacher_nll"].values()) / 10  # of as many samples each
    assert mean == pytest.approx(metrics["student_1step"]["teacher_nll"])
    read = read_page((tmp_path / "one" / "report.html").read_text())
    for value in worst["teacher_nll"]:
        assert f"{value:.3f}" in read.texts  # made again, they are the same


@pytest.mark.full
def test_processes_share_the_work_and_make_the_same(cache, generators, tmp_path):
    for count, name in ((1, "one"), (3, "many")):
        launch(count, made, cache, generators, "digits", tmp_path / name / "run")
    one, many = (
        [line for line in (tmp_path / name / "run" / "report.html").read_text().splitlines() if "data-time" not in line]
        for name in ("one", "many")
    )
    assert one == many


def test_metrics_of_before_make_a_report_too(cache, generators, tmp_path):
    """What an older ddfast measured has no tables by class, and says not which samples were the worst."""
    config, _, student = opened(generators, "digits")
    config.out = tmp_path
    row = {"teacher_nll": 2.0}
    metrics = {"method": "dd1", "recipe": "digits", "num_groups": 16, "teacher": row, "student_1step": row}
    report.write_report(config, metrics, student, {})
    read = read_page((tmp_path / "report.html").read_text())
    assert "Quality and speed" in read.texts
    assert not {"Failures", "Class by class", "Training"} & set(read.texts)


def test_conditions_are_spread_over_all(generators, monkeypatch):
    config, teacher, student = opened(generators, "digits")
    shown, found = gallery.same_noise(config, teacher, student, columns=2)
    assert shown == list(range(10))
    assert list(found) == ["teacher", "DD1, 1 step", "DD1, 2 steps"]
    assert all(one.shape == (20, 3, 16, 16) for one in found.values())
    teacher.num_classes = 1000
    monkeypatch.setattr(gallery, "stream", lambda *_, **__: iter(()))
    shown, _ = gallery.same_noise(config, teacher, student)
    assert shown == list(range(0, 1000, 100))
