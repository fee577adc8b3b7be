"""`ddfast convert` as a user runs it, on the golden checkpoints."""

import subprocess
import sys

import pytest
import torch
from golden import Case

from ddfast.models.loading import load_student, load_teacher

VAR, VAR_DD, GPT, GPT_DD = Case("var_teacher"), Case("dd_var"), Case("llamagen_c2i"), Case("dd_llamagen")
GIVEN = {
    "var": ["--teacher", VAR.file("var.pth"), "--tokenizer", VAR.file("vae.pth"),
            "--student", VAR_DD.file("student.pth")],
    "llamagen": ["--teacher", GPT.file("gpt.pt"), "--tokenizer", GPT.file("vq.pt"), "--n-head", 4, "--image-size", 64,
                 "--student", GPT_DD.file("student.pt")],
}  # fmt: skip


def convert(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "ddfast.convert", *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("family", GIVEN)
def test_there_and_back(tmp_path, family):
    teacher_case, student_case = (VAR, VAR_DD) if family == "var" else (GPT, GPT_DD)
    ours, back, again = tmp_path / "ours", tmp_path / "official", tmp_path / "again"
    assert "model.safetensors: " in convert(*GIVEN[family], "--to", ours).stdout
    convert("--teacher", ours, "--student", ours, "--to", back, "--form", "official")
    extra = [] if family == "var" else ["--n-head", 4, "--image-size", 64]
    convert("--teacher", back / "teacher.pth", "--tokenizer", back / "tokenizer.pth", "--student", back / "student.pth",
            "--to", again, *extra)  # fmt: skip
    prefix = "" if family == "var" else "model"
    for name, official in (("teacher.pth", GIVEN[family][1]), ("tokenizer.pth", GIVEN[family][3])):
        mine, theirs = (torch.load(path, weights_only=True) for path in (back / name, official))
        mine, theirs = (mine[prefix], theirs[prefix]) if prefix else (mine, theirs)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key].to(value.dtype), value) for key, value in theirs.items())
    for folder in (ours, again):
        teacher = load_teacher(folder)
        teacher_case.check(tf_logits=teacher.logits(teacher_case["tf_label"], teacher_case["tf_idx"]))
        student_case.check(
            fwd_t0_logits=load_student(folder, teacher).predict(student_case["label"], student_case["noise"], 0)[0]
        )
        live = load_student(folder, teacher, ema=False).predict(student_case["label"], student_case["noise"], 0)[0]
        name = "fwd_t0_logits_var_wo_ddp" if family == "var" else "fwd_t0_logits_model"
        student_case.check(**{name: live})


def test_nothing_is_overwritten_and_errors_are_one_line(tmp_path):
    convert(*GIVEN["var"], "--to", tmp_path / "a")
    done = convert(*GIVEN["var"], "--to", tmp_path / "a", code=1)
    (line,) = done.stderr.strip().splitlines()
    assert "config.json, model.safetensors, student.safetensors exists; choose another folder" in line
    (line,) = convert("--teacher", tmp_path / "none.pth", "--to", tmp_path / "b", code=1).stderr.strip().splitlines()
    assert "no checkpoint at" in line
    assert not (tmp_path / "b").exists()
