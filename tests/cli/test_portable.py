"""What leaves the machine names neither its folders nor its user nor itself, and is read elsewhere all the same."""

import base64
import getpass
import gzip
import html
import io
import json
import platform
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
import torch
from commands import in_this_process
from official import var_teacher_like
from PIL import Image

from ddfast.files import file_sha256
from ddfast.hub import Generator
from ddfast.models.checkpoint import load_tensors, read_checkpoint, save_tensors
from ddfast.models.converting import export_teacher
from ddfast.models.official import STUDENT_FILE
from ddfast.portable import base_name, portable, portable_command
from ddfast.recipes import get_recipe
from ddfast.runs import hashed_files

SETTINGS = {
    "recipe": "var-d16",
    "teacher": {"depth": 2, "num_classes": 5, "patch_nums": [1, 2, 3], "shared_aln": False},
    "trajectories": {"count": 24, "shard_size": 12},
    "dd1": {"iterations": 4, "batch_size": 6, "warmup": 1, "log_every": 2, "point": 2, "split": 1},
    "dd2": {
        "head_width": 16, "head_depth": 1,
        "match": {
            "iterations": 2, "guidance_updates": 1, "align_iterations": 0, "later_iterations": 0, "batch_size": 4,
            "log_every": 2, "watch_every": 4, "guidance_start": "teacher",
        },
    },
    "evaluation": {"samples": 100, "batch_size": 50, "batch_sizes": [1], "paths": 0},
}  # fmt: skip

TELLTALE = "telltale"
"""In the names of home folder, user and machine, and in nothing that a file should hold."""

LOCAL = {"config.toml", "settings.toml"}
"""A run's settings, by which it goes on, and the user's own file."""


class Machine:
    """A home folder with the teacher's files, and what the commands made in it."""

    def __init__(self, home: Path) -> None:
        self.home, self.weights, self.tokenizer = home, home / "models" / "var_tiny.pth", home / "models" / "vae.pth"

    def run(self, *arguments: object) -> None:
        assert in_this_process(self.home / "cache", *arguments) == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("disk") / f"{TELLTALE}-home")
    runs, to = made.home / "runs", made.home / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(made.home))
        for variable in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(variable, f"{TELLTALE}-user")
        for module, function in ((platform, "node"), (socket, "gethostname")):
            patch.setattr(module, function, lambda: f"{TELLTALE}-host")
        assert getpass.getuser() == f"{TELLTALE}-user"
        made.home.mkdir()
        export_teacher(var_teacher_like(), made.weights, made.tokenizer)
        files = {"teacher": {"weights": str(made.weights)}, "tokenizer": {"weights": str(made.tokenizer)}}
        settings = {**SETTINGS, **files, "teacher": SETTINGS["teacher"] | files["teacher"]}
        (made.home / "settings.toml").write_text(tomli_w.dumps(settings))
        train = ("train", "--config", made.home / "settings.toml")
        made.run(*train, f"--out={runs}/dd1", "--profile-steps=1:2", "--trajectories.store-noise")
        made.run(*train, "--out", runs / "dd2", "--method=dd2", f"--init=dd1:{runs}/dd1")
        for form in ("grid", "files", "npz", "codes"):
            made.run("sample", "--student", runs / "dd1", "--format", form, "--count=5", "--to", to / form)
        made.run("sample", "--student", runs / "dd2", "--count=4")
        made.run("evaluate", "--student", runs / "dd1", "--json", to / "evaluation.json")
        for method, form in (("dd1", "ddfast"), ("dd2", "ddfast"), ("dd1", "official")):
            files = ("--teacher", made.weights, "--tokenizer", made.tokenizer, "--student", runs / method)
            made.run("convert", *files, "--form", form, "--to", to / f"{method}-{form}")
            if form == "ddfast":
                Generator.from_run(runs / method).save_pretrained(to / f"{method}-hub")
        yield made


def all_of(data: bytes) -> Iterator[bytes]:
    """A file's bytes, and those that it holds compressed or encoded, at any depth."""
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield from all_of(gzip.decompress(data))
    if data.startswith(b"\x89PNG"):
        yield repr(Image.open(io.BytesIO(data)).info).encode()
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield archive.comment
            for name in archive.namelist():
                yield name.encode()
                yield from all_of(archive.read(name))
    for encoded in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from all_of(base64.b64decode(encoded))


def told(folder: Path) -> list[str]:
    """Names of the files that hold a telltale, or a folder above the home."""
    marks = [TELLTALE.encode(), str(folder.parent).encode()]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and any(mark in part for part in (path.name.encode(), *all_of(path.read_bytes())) for mark in marks)
    ]


def test_nothing_that_is_written_tells_where(machine):
    there = {path.name for path in machine.home.rglob("*") if path.is_file()}
    assert {
        "student.safetensors", "report.html", "report.md", "metrics.json", "metrics.jsonl", "stages.json",
        "samples.png", "manifest.json", "shard-000000.safetensors", "throughput.jsonl", "distillation-rank0.json.gz",
        "README.md", "model.safetensors", "config.json", "grid.png", "samples.json", "npz.npz", "codes.safetensors",
        "evaluation.json", "student.pth", "samples-1.png", ".lock",
    } <= there  # fmt: skip
    assert told(machine.home) == ["runs/dd1/config.toml", "runs/dd2/config.toml", "settings.toml"]
    trace = json.loads(gzip.decompress((machine.home / "runs/dd1/profile/distillation-rank0.json.gz").read_bytes()))
    assert not trace.get("host_name") and not trace.get("traceName")


def test_the_search_finds_what_is_packed(tmp_path):
    """It must be able to fail."""
    home = tmp_path / "home"
    home.mkdir()
    secret = f"/{TELLTALE}/".encode()
    (home / "trace.json.gz").write_bytes(gzip.compress(secret))
    with zipfile.ZipFile(home / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.json.gz", gzip.compress(secret))
    with zipfile.ZipFile(home / "b.npz", "w") as archive:
        archive.comment = secret
    (home / "page.html").write_bytes(b'<img src="data:x;base64,' + base64.b64encode(gzip.compress(secret)) + b'">')
    (home / "innocent").write_text("nothing")
    assert told(home) == ["a.npz", "b.npz", "page.html", "trace.json.gz"]


def test_base_names_and_hashes_are_kept(machine):
    sha256 = file_sha256(machine.weights)
    header = read_checkpoint(machine.home / "runs/dd1" / STUDENT_FILE)[1]
    assert header["config"]["teacher"]["weights"] == "var_tiny.pth"
    assert header["config"]["out"] == "dd1"
    assert header["files"]["teacher.weights"] == {"file": "var_tiny.pth", "sha256": sha256}
    assert header["files"].keys() == {"teacher.weights", "tokenizer.weights"}
    start = read_checkpoint(machine.home / "runs/dd2" / STUDENT_FILE)[1]
    assert start["config"]["init"] == "dd1:dd1"
    assert start["files"]["init"]["sha256"] == file_sha256(machine.home / "runs/dd1" / STUDENT_FILE)
    converted = read_checkpoint(machine.home / "out/dd1-ddfast" / STUDENT_FILE)[1]
    assert {name: converted[name] for name in ("config", "files", "learnt_from")} == {
        name: header[name] for name in ("config", "files", "learnt_from")
    }
    report = html.unescape((machine.home / "runs/dd1/report.html").read_text())
    for words in ("train --config settings.toml --out=dd1 ", 'weights = "vae.pth"', f"var_tiny.pth, SHA-256 {sha256}"):
        assert words in report, words
    assert f"# teacher.weights: var_tiny.pth, SHA-256 {sha256}" in (machine.home / "out/dd1-hub/README.md").read_text()


def test_a_run_goes_on_where_its_settings_name_folders(machine, capsys):
    settings = (machine.home / "runs/dd1/config.toml").read_text()
    assert settings.startswith("# Of this machine: it names folders")
    assert f'weights = "{machine.weights}"' in settings
    arguments = ("--out", machine.home / "runs/dd1", "--resume", "--profile-steps=1:2", "--trajectories.store-noise")
    machine.run("train", "--config", machine.home / "settings.toml", *arguments)
    assert "student.safetensors exists, skipped" in capsys.readouterr().out


# A student elsewhere ----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(machine, tmp_path, monkeypatch) -> Path:
    """A folder with the student's file alone, where its teacher's are gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    shutil.copy(machine.home / "runs/dd1" / STUDENT_FILE, tmp_path / "shared")
    return tmp_path / "shared"


def codes(folder: Path, to: Path, *arguments: object) -> tuple[int, torch.Tensor | None]:
    done = in_this_process(
        folder / "cache", "sample", "--student", folder, "--format=codes", "--count=5", "--to", to, *arguments
    )
    return done, None if done else load_tensors(to.with_suffix(".safetensors"))[0]["codes"]


def test_its_teacher_is_found_where_the_user_says(machine, elsewhere, tmp_path, capsys):
    expected = load_tensors(machine.home / "out/codes.safetensors")[0]["codes"]
    code, _ = codes(elsewhere, tmp_path / "none")
    (line,) = capsys.readouterr().err.strip().splitlines()
    sha256 = file_sha256(machine.weights)
    assert code == 1
    assert line == (
        f"ddfast sample: error: --student {elsewhere}: its teacher.weights, var_tiny.pth (SHA-256 {sha256}), is not in "
        "this folder: give --teacher.weights FILE"
    )
    given = (f"--teacher.weights={machine.weights}", "--tokenizer.weights", machine.tokenizer)
    assert torch.equal(codes(elsewhere, tmp_path / "given", *given)[1], expected)
    assert "warning" not in capsys.readouterr().err
    generator = Generator.from_run(elsewhere, weights=machine.weights, tokenizer=machine.tokenizer)
    assert torch.equal(generator.codes([0, 1, 2, 3, 4]), expected)
    for path in (machine.weights, machine.tokenizer):
        shutil.copy(path, elsewhere)
    assert torch.equal(codes(elsewhere, tmp_path / "beside")[1], expected)


def test_a_run_that_was_moved(machine, elsewhere, tmp_path, capsys):
    settings = (machine.home / "runs/dd1/config.toml").read_text()
    (elsewhere / "config.toml").write_text(settings.replace(str(machine.home), "/gone"))
    assert codes(elsewhere, tmp_path / "none")[0] == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "var_tiny.pth (SHA-256 " in line
    assert "is neither at /gone/models/var_tiny.pth nor in this folder: give --teacher.weights FILE" in line
    assert codes(elsewhere, tmp_path / "some", "--teacher.weights", machine.weights)[0] == 1
    assert "its tokenizer.weights, vae.pth (SHA-256 " in capsys.readouterr().err


def test_another_teacher_is_warned_of(machine, elsewhere, tmp_path, capsys):
    teacher = var_teacher_like()
    with torch.no_grad():
        teacher.head.weight[0, 0] += 1
    export_teacher(teacher, tmp_path / "other.pth", tmp_path / "vae.pth")
    given = ("--teacher.weights", tmp_path / "other.pth", "--tokenizer.weights", tmp_path / "vae.pth")
    assert codes(elsewhere, tmp_path / "given", *given)[0] == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "its student learnt from other weights than this teacher's (float32 " in line
    assert f"var_tiny.pth, SHA-256 {file_sha256(machine.weights)}" in line


def test_files_of_before_with_folders_are_read_and_not_passed_on(machine, elsewhere, tmp_path, capsys):
    tensors, header = load_tensors(elsewhere / STUDENT_FILE)
    del header["files"], header["learnt_from"]
    header["config"]["teacher"]["weights"] = f"/Users/{TELLTALE}/var_tiny.pth"
    header["config"] |= {"out": f"C:\\Users\\{TELLTALE}\\runs\\x", "init": f"dd1:../{TELLTALE}/run"}
    save_tensors(elsewhere / STUDENT_FILE, tensors, header)
    code, _ = codes(elsewhere, tmp_path / "none")
    assert code == 1
    assert "its teacher.weights, var_tiny.pth, is not in this folder" in capsys.readouterr().err
    files = ("--teacher", machine.weights, "--tokenizer", machine.tokenizer)
    machine.run("convert", *files, "--student", elsewhere, "--to", tmp_path / "converted")
    written = read_checkpoint(tmp_path / "converted" / STUDENT_FILE)[1]["config"]
    assert (written["teacher"]["weights"], written["out"], written["init"]) == ("var_tiny.pth", "x", "dd1:run")


def test_what_is_given_and_not_read_is_refused(machine, tmp_path, capsys):
    hub = machine.home / "out/dd1-hub"
    assert codes(hub, tmp_path / "any", "--teacher.weights", machine.weights)[0] == 1
    assert "--teacher.weights: has no effect: " in capsys.readouterr().err


# The rule itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/Users/alice/var_d16.pth", "var_d16.pth"), ("~/models/llamagen/", "llamagen"), ("../alice/x.pt", "x.pt"),
        ("C:\\Users\\alice\\x.pth", "x.pth"), ("dd1:/Users/alice/runs/digits", "dd1:digits"), ("dd1:run", "dd1:run"),
        ("teacher", "teacher"), ("mine:recipe", "mine:recipe"), ("", ""), ("10:13", "10:13"),
        ("/Users/Alice B. Smith/x y.pth", "x y.pth"),
    ],
)  # fmt: skip
def test_base_names(text, expected):
    assert base_name(text) == expected


def test_the_home_folders_name_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/alice")
    assert [base_name(text) for text in ("/Users/alice", "/Users/alice/", "dd1:/Users/alice")] == ["~", "~", "dd1:~"]


def test_settings_and_command_lines():
    values = {"out": "/a/b", "nested": {"files": ["/c/d", 1], "share": 0.5}, "none": None}
    assert portable(values) == {"out": "b", "nested": {"files": ["d", 1], "share": 0.5}, "none": None}
    line = "python -m ddfast.train --out='/a b/c d' --teacher.weights /e/f.pth --dd1.point=5 --init dd1:/g/h"
    assert (
        portable_command(line)
        == "python -m ddfast.train '--out=c d' --teacher.weights f.pth --dd1.point=5 --init dd1:h"
    )


def test_every_file_of_the_settings_is_hashed(tmp_path):
    config = get_recipe("llamagen-xl-t2i")
    expected = {}
    for name in (
        "teacher.weights",
        "teacher.captions",
        "tokenizer.weights",
        "dd1.lpips_vgg",
        "evaluation.lpips_linear",
    ):
        table, _, field = name.partition(".")
        path = tmp_path / f"{table}-{field}.pth"
        path.write_bytes(name.encode())
        setattr(getattr(config, table), field, str(path))
        expected[name] = {"file": path.name, "sha256": file_sha256(path)}
    config.dd1.lpips_linear = str(tmp_path / "gone.pth")
    assert hashed_files(config) == expected
    sums = subprocess.run(["sha256sum", tmp_path / "dd1-lpips_vgg.pth"], capture_output=True, text=True, check=True)
    assert sums.stdout.split()[0] == expected["dd1.lpips_vgg"]["sha256"]
