"""A method beside DD1 and DD2 is its own code and two lines, docs/adding-a-method.md: all else asks the student."""

import json

import pytest
import torch

from ddfast import pipeline
from ddfast.config import update
from ddfast.evaluation import protocol
from ddfast.hub import Generator
from ddfast.models import families
from ddfast.models.loading import load_student, save_student
from ddfast.models.official import STUDENT_FILE
from ddfast.models.student import TransformerStudent
from ddfast.models.var.network import VARStudent
from ddfast.recipes import get_recipe
from ddfast.runs import open_student
from ddfast.sampling import sample_student
from ddfast.saving import save_samples


class DD0Student(VARStudent):
    method, paper, two_steps = "dd0", "[DD0](https://example.org/dd0)", "1 + 1 of nothing"
    starts_anywhere = False


def train_dd0(config, teacher, stages, progress_bar):
    """The teacher's own weights, untrained."""
    torch.manual_seed(config.seed)
    student = DD0Student.from_teacher(teacher).eval()
    student.point = 1
    save_student(config.out / STUDENT_FILE, student, {})
    return student


def test_a_third_method(tmp_path, monkeypatch):
    family = families.named("var", "")
    monkeypatch.setitem(pipeline.METHODS, "dd0", train_dd0)
    monkeypatch.setattr(type(family), "students", {**family.students, "dd0": DD0Student})
    config = get_recipe("var-d16")
    sizes = {"num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32}
    teacher = {"depth": 2, "num_classes": 2, "patch_nums": [1, 2, 3], "random_weights": True}
    evaluation = {"samples": 100, "batch_size": 50, "batch_sizes": [1]}
    update(config, {"tokenizer": sizes, "teacher": teacher, "evaluation": evaluation})
    update(config, {"method": "dd0", "out": str(tmp_path / "run")})
    monkeypatch.setattr(protocol, "measure_speed", lambda *_, **__: speeds())

    metrics = pipeline.train(config, progress_bar=lambda title: lambda *_: None)
    assert metrics["method"] == json.loads((tmp_path / "run/metrics.json").read_text())["method"] == "dd0"
    assert "teacher_involved" not in metrics  # it starts from noise alone
    report = (tmp_path / "run/report.md").read_text()
    assert "# DD0 on the recipe" in report
    assert "| DD0 student | 1 + 1 of nothing |" in report

    _, teacher, student = open_student(tmp_path / "run", "cpu", lambda *_: None)
    assert type(student) is DD0Student
    assert student.point == 1
    made = sample_student(teacher, student, count=4, seed=0, steps=2)
    assert "4 images" in save_samples(made, teacher, "grid", tmp_path / "grid")[0]
    Generator.from_run(tmp_path / "run").save_pretrained(tmp_path / "hub")
    assert "DD0" in (tmp_path / "hub/README.md").read_text()
    assert type(Generator.from_pretrained(tmp_path / "hub").student) is DD0Student
    monkeypatch.undo()
    with pytest.raises(Exception, match="DD0 student of a VAR teacher"):
        load_student(tmp_path / "hub", teacher)
    assert not isinstance(student, TransformerStudent)


def speeds():
    names = ("teacher", "teacher_plain", "student_1step", "student_2step", "independent_marginals", "image_decoder")
    return {name: {1: 0.001} for name in names}
