"""`ddfast convert` as a user runs it, on the golden checkpoints."""

import contextlib
import io
import json
import subprocess

import matplotlib.image
import pytest
import torch
from commands import command, refused
from golden import Case
from official import llamagen_teacher_like, var_teacher_like
from safetensors.torch import load_file

import ddfast
from ddfast.convert import main
from ddfast.models.converting import export_teacher
from ddfast.models.loading import load_student, load_teacher
from ddfast.ops import nearest_code

VAR, VAR_DD, GPT, GPT_DD = Case("var_teacher"), Case("dd_var"), Case("llamagen_c2i"), Case("dd_llamagen")
GIVEN = {
    "var": ["--teacher", VAR.file("var.pth"), "--tokenizer", VAR.file("vae.pth"),
            "--student", VAR_DD.file("student.pth")],
    "llamagen": ["--teacher", GPT.file("gpt.pt"), "--tokenizer", GPT.file("vq.pt"), "--n-head", 4, "--image-size", 64,
                 "--student", GPT_DD.file("student.pt")],
}  # fmt: skip


def convert(*arguments: object) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([str(argument) for argument in arguments]) == 0
    return said.getvalue()


@pytest.mark.parametrize("family", GIVEN)
def test_there_and_back(tmp_path, family):
    teacher_case, student_case = (VAR, VAR_DD) if family == "var" else (GPT, GPT_DD)
    ours, back, again = tmp_path / "ours", tmp_path / "official", tmp_path / "again"
    if family == "var":
        call = command("convert", *GIVEN[family], "--to", ours)
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    else:
        said = convert(*GIVEN[family], "--to", ours)
    assert "model.safetensors: " in said
    convert("--teacher", ours, "--to", back, "--form", "official")  # the student in the folder goes along
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


def test_a_converted_folder_is_sampled(run, tmp_path):
    """Teacher alone, one step, two steps, and the teacher in between, as the official scripts run them."""
    folder = tmp_path / "dd"
    convert(*GIVEN["var"], "--point", 2, "--split", 2, "--to", folder)
    made = {}
    for name, options in {
        "teacher": ["--steps=0", "--guidance.cfg-scale=1.5", "--guidance.top-k=1"],
        "one": [],
        "two": ["--steps=2"],
        "combined": ["--teacher-steps=1", "--guidance.top-k=1", "--point=1"],
        "images": ["--steps=2", "--format=files"],
    }.items():
        target = ["--to", tmp_path / name] + ([] if name == "images" else ["--format=codes"])
        run("sample", "--student", folder, "--count=4", "--classes=1,7", *options, *target)
        if name != "images":
            made[name] = load_file(tmp_path / f"{name}.safetensors")["codes"]
    teacher = load_teacher(folder)
    student = load_student(folder, teacher)
    assert student.split == 2
    label = torch.tensor([1, 7, 1, 7])
    noise = ddfast.noise(0, torch.arange(4), (30, 8))
    assert torch.equal(made["teacher"], teacher.generate(label, sampler="greedy", cfg_scale=1.5, top_k=1, top_p=1.0))
    for name, settings in {
        "one": {}, "two": {"steps": (0, 2)}, "combined": {"teacher_range": (1, 2), "top_k": 1},
    }.items():  # fmt: skip
        assert torch.equal(made[name], nearest_code(student.sample(label, noise, **settings), teacher.codebook))
    files = sorted((tmp_path / "images").glob("*.png"))
    assert [path.name for path in files] == [f"0000{i}-class{c}.png" for i, c in enumerate((1, 7, 1, 7))]
    pixels = torch.from_numpy(matplotlib.image.imread(files[1])[..., :3].copy()).permute(2, 0, 1)
    expected = teacher.decode(student.sample(label, noise, steps=(0, 2)))[1]
    assert (pixels - expected).abs().max() <= 1.01 / 255


def test_nothing_is_overwritten_and_errors_are_one_line(run, tmp_path):
    convert(*GIVEN["var"], "--to", tmp_path / "a")
    words = "config.json, model.safetensors, student.safetensors exists; choose another folder"
    refused(run, words, "convert", *GIVEN["var"], "--to", tmp_path / "a")
    refused(run, "no checkpoint at", "convert", "--teacher", tmp_path / "none.pth", "--to", tmp_path / "b")
    assert not (tmp_path / "b").exists()


OPTIONS = {
    "var": (
        lambda: var_teacher_like(depth=3, attn_l2_norm=False),
        {"num_heads": 2, "norm_eps": 1e-4, "quant_resi": 0.25, "using_znorm": True},
    ),
    "llamagen": (
        lambda: llamagen_teacher_like(rope_base=500),
        {
            "n_head": 4,
            "block_size": 9,
            "rope_base": 500.0,
            "norm_eps": 1e-4,
            "codebook_l2_norm": False,
            "num_classes": 5,
        },
    ),
    "no label dropout": (
        lambda: llamagen_teacher_like(class_dropout_prob=0.0),
        {"n_head": 4, "image_size": 6, "class_dropout_prob": 0.0},
    ),
    "captions": (
        lambda: llamagen_teacher_like(model_type="t2i", cls_token_num=6),
        {"n_head": 4, "block_size": 9, "cls_token_num": 4},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", ["ddfast", "official"])
def test_every_option_reaches_the_folder_and_stays_there(tmp_path, capsys, name, form):
    """What is written is, loaded again with what cannot be written, the model that was read."""
    make, settings = OPTIONS[name]
    export_teacher(make(), tmp_path / "t.pth", tmp_path / "v.pth")
    wanted = load_teacher(tmp_path / "t.pth", tmp_path / "v.pth", **settings)
    flags = []
    for option, value in settings.items():
        flags += [f"--{option.replace('_', '-')}", str(value)]
    given = ["--teacher", str(tmp_path / "t.pth"), "--tokenizer", str(tmp_path / "v.pth"), *flags]
    capsys.readouterr()
    assert main([*given, "--to", str(tmp_path / "out"), "--form", form]) == 0
    said = capsys.readouterr().out
    if form == "ddfast":
        made = load_teacher(tmp_path / "out")
        about = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
        assert all(about[option] == value for option, value in settings.items() if option != "image_size")
    else:
        made = load_teacher(tmp_path / "out" / "teacher.pth", tmp_path / "out" / "tokenizer.pth", **settings)
        for option in {"rope_base", "quant_resi", "codebook_l2_norm", "using_znorm"} & settings.keys():
            assert f"{option}={settings[option]}" in said
    assert made.sizes == wanted.sizes
    assert made.tokenizer.config == wanted.tokenizer.config
    assert made.defaults == wanted.defaults
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in made.state_dict().items())
    assert made.state_dict().keys() == wanted.state_dict().keys()


def test_live_weights_of_a_student(tmp_path):
    for case, teacher_files, student, extra in (
        (VAR_DD, (VAR.file("var.pth"), VAR.file("vae.pth")), "student.pth", []),
        (GPT_DD, (GPT.file("gpt.pt"), GPT.file("vq.pt")), "student.pt", ["--n-head", "4", "--image-size", "64"]),
    ):
        out = tmp_path / student
        files = ["--teacher", str(teacher_files[0]), "--tokenizer", str(teacher_files[1])]
        call = [*files, "--student", str(case.file(student)), "--no-ema", "--to", str(out), *extra]
        assert main(call) == 0
        teacher = load_teacher(out)
        name = "fwd_t0_logits_var_wo_ddp" if case is VAR_DD else "fwd_t0_logits_model"
        case.check(**{name: load_student(out, teacher).predict(case["label"], case["noise"], 0)[0]})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-heads", "3"], "num_heads: got 3, but the tensors of"),
        (["--n-head", "4"], "n_head: not a setting of"),
        (["--point", "2"], "--point: has no effect without --student"),
        (["--no-ema"], "--no-ema: has no effect without --student"),
        (["--student", "{student}", "--point", "0"], "--point: got 0, expected a group in 1..3"),
        (["--student", "{student}", "--split", "9"], "--split: got 9, expected a group in 0..4"),
        (["--student", "{student}", "--point", "1", "--form", "official"], "--point: the official layout has no place"),
        (["--student", "{teacher}"], "is not a student's file: it is a VAR teacher"),
        (["--teacher-ema"], "holds live weights alone; ema=True asks for the averaged ones"),
    ],
)
def test_flags_that_cannot_be(tmp_path, capsys, flags, words):
    names = {"student": VAR_DD.file("student.pth"), "teacher": VAR.file("var.pth")}
    files = ["--teacher", str(VAR.file("var.pth")), "--tokenizer", str(VAR.file("vae.pth"))]
    assert main([*files, "--to", str(tmp_path / "x"), *(flag.format(**names) for flag in flags)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "x").exists()
