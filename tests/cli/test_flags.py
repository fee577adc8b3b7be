"""Every command's flags and files: what is typed has an effect or is a one-line error, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused_here

from ddfast import env
from ddfast.cli import parse, typed
from ddfast.config import TrainConfig, read_toml
from ddfast.errors import DDFastError
from ddfast.recipes import get_recipe

OUT = ("--out", "{tmp}/run")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--dd2.time: has no effect: --method dd1", ["train", *OUT, "--dd2.time=0.5"]),
        ("--dd2.match.form: has no effect: --method dd1", ["train", *OUT, "--dd2.match.form", "sid"]),
        ("--dd1.point: has no effect: --method dd2", ["train", *OUT, "--method=dd2", "--dd1.point=3"]),
        ("--init: has no effect: only --method dd2", ["train", *OUT, "--init=stage1"]),
        ("only --method dd2 starts from a DD1 student", ["train", *OUT, "--init=dd1:somewhere"]),
        ("--dd2.adapt.iterations: has no effect", ["train", *OUT, "--method=dd2", "--dd2.adapt.iterations=5000"]),
        (
            "--teacher.weights: has no effect: --teacher.random-weights",
            ["train", *OUT, "--recipe=var-d16", "--teacher.weights=x", "--teacher.random-weights"],
        ),
        (
            "--tokenizer.blocks: has no effect: the tokenizer's file decides",
            ["trajectories", *OUT, "--recipe=var-d16", "--teacher.weights=x", "--tokenizer.blocks=3"],
        ),
        ("captions: got 'x', expected none", ["train", *OUT, "--recipe=llamagen-b", "--teacher.captions=x"]),
        ("--resume: has no effect", ["trajectories", *OUT, "--resume"]),
        ("--resume: has no effect", ["profile", *OUT, "--random-weights", "--resume"]),
        ("--captions: has no effect", ["profile", *OUT, "--random-weights", "--captions=x"]),
        ("--random-weights: has no effect", ["profile", *OUT, "--student={var}", "--random-weights"]),
        ("--recipe: has no effect", ["profile", *OUT, "--student={var}", "--recipe=digits"]),
        ("--teacher.width: has no effect", ["profile", *OUT, "--student={var}", "--teacher.width=64"]),
        ("--dd1.point: has no effect", ["profile", *OUT, "--student={var}", "--dd1.point=1"]),
        ("--seed: has no effect", ["profile", *OUT, "--student={var}", "--seed=1"]),
        ("--rounds: got 0, expected at least 1", ["profile", *OUT, "--random-weights", "--rounds=0"]),
        ("--json {tmp}/there exists; choose another name", ["evaluate", "--student={var}", "--json={tmp}/there"]),
        ("there is not a directory", ["evaluate", "--student={var}", "--json={tmp}/there/x"]),
        ("VARTeacher is conditioned on class labels", ["evaluate", "--student={var}", "--captions={captions}"]),
        ("conditioned on text: give captions", ["evaluate", "--student={text}"]),
        ("conditioned on text: give captions", ["profile", *OUT, "--student={text}"]),
        ("--out: has no effect: nothing is run or written", ["plan", *OUT]),
        ("memory: got 'much'", ["plan", "--memory=much"]),
        ("devices: got 3, expected a multiple of the 2 nodes", ["plan", "--devices=3", "--nodes=2"]),
        ("seed: got -5, expected 0 to 2^64 - 1", ["train", *OUT, "--seed=-5"]),
        ("seed: got -5, expected 0 to 2^64 - 1", ["trajectories", *OUT, "--seed", "-5"]),
        ("seed: got -5, expected 0 to 2^64 - 1", ["profile", *OUT, "--random-weights", "--seed=-5"]),
        ("iterations: got 0, expected a positive number", ["train", *OUT, "--dd1.iterations=0"]),
        ("steps: got -1, expected a positive number", ["trajectories", *OUT, "--trajectories.steps=-1"]),
        ("samples: got 3, expected at least 100", ["evaluate", "--student={var}", "--evaluation.samples=3"]),
        ("track: got 'tensorbord', expected tensorboard or wandb", ["train", *OUT, "--track", "tensorbord"]),
        ("profile_steps: got '13:10', expected FIRST:END", ["train", *OUT, "--profile-steps=13:10"]),
        ("--track: has no effect: only `ddfast train` trains", ["trajectories", *OUT, "--track=wandb"]),
        ("--profile-steps: has no effect", ["profile", *OUT, "--random-weights", "--profile-steps=1:2"]),
        ("--method: got '../x', expected a name", ["plan", "--method", "../x"]),
        ("--lr: here it is called --dd1.learning-rate", ["train", *OUT, "--lr", "0.1"]),
        ("--gpt-ckpt: here it is called --teacher.weights", ["train", *OUT, "--gpt-ckpt", "x"]),
        ("--cfg-scale: here it is called --teacher.cfg-scale", ["trajectories", *OUT, "--cfg_scale=4"]),
        (
            "--num-fid-samples: here it is called --count of --protocol, or --evaluation.samples",
            ["evaluate", "--num-fid-samples=9"],
        ),
    ],
)
def test_one_line_and_nothing_written(here, generators, tmp_path, words, arguments):
    (tmp_path / "there").write_text("mine")
    places = {"tmp": tmp_path, "var": generators / "var", "text": generators / "text"}
    places["captions"] = generators / "captions.safetensors"
    refused_here(here, words.format(**places), *(argument.format(**places) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_a_value_of_a_recipe_or_a_file_was_not_typed(here, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("ddfast.train.train", lambda config, progress_bar: asked.append(config))
    (tmp_path / "c.toml").write_text("init = 'stage1'\n[dd2]\ntime = 0.5\n[dd1]\npoint = 3\n")
    assert here("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "run", "--dd1.iterations=5")[0] == 0
    assert (asked[0].dd2.time, asked[0].dd1.point, asked[0].dd1.iterations) == (0.5, 3, 5)


def test_names_of_typed_flags():
    arguments = ["--out", "x", "--dd1.point=3", "--dd1.batch_size", "5", "-h", "--no-resume"]
    assert list(typed(arguments)) == ["out", "dd1.point", "dd1.batch-size", "no-resume"]


def test_evaluate_keeps_the_runs_settings_but_for_typed_ones(here, tmp_path, generators, monkeypatch):
    opened = get_recipe("var-d16")  # whose batches are of 64
    monkeypatch.setattr("ddfast.evaluate.open_student", lambda *_, **__: (opened, None, None))
    monkeypatch.setattr("ddfast.evaluate.evaluate", lambda config, *_: {})
    monkeypatch.setattr("ddfast.evaluate.quality_table", lambda *_: ["table"])
    assert here("evaluate", "--student", tmp_path, "--evaluation.samples=700")[0] == 0
    assert (opened.evaluation.batch_size, opened.evaluation.samples) == (64, 700)


def test_evaluate_takes_captions(here, generators, tmp_path, monkeypatch):
    monkeypatch.setattr("ddfast.evaluation.protocol.add_speed", lambda *_: None)
    monkeypatch.setattr("ddfast.evaluate.quality_table", lambda *_: ["table"])
    flags = (
        "--captions",
        generators / "captions.safetensors",
        "--evaluation.samples=100",
        "--json",
        tmp_path / "e.json",
    )
    assert here("evaluate", "--student", generators / "text", *flags)[0] == 0
    assert json.loads((tmp_path / "e.json").read_text())["student_2step"]["teacher_nll"] > 0


# Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["profile", "convert"])
def test_torchrun_is_refused_before_anything_is_written(here, generators, tmp_path, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    target = {"convert": "--to"}.get(command, "--out")
    source = {"convert": ("--teacher", generators / "var")}.get(command, ("--student", generators / "var"))
    words = f"`{command}` runs in one process, and torchrun started 2 (WORLD_SIZE): start it without torchrun; "
    words += "only train, trajectories, sample, evaluate, doctor run in several"
    refused_here(here, words, command, *source, target, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_torchrun_of_one_process_is_none(here, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused_here(here, "no student.safetensors there", "sample", "--student", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert here("doctor")[0] == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_shows_help(rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        parse("train", TrainConfig, ["--help"], "")
    assert not end.value.code
    assert ("--parallel.strategy" in capsys.readouterr().out) == (rank == "0")


def test_a_typed_folder_is_taken_as_it_is():
    flags = ["--method=dd2", "--out=runs/digits"]
    assert parse("train", TrainConfig, flags, "").out == Path("runs/digits")
    assert parse("train", TrainConfig, flags[:1], "").out == Path("runs/digits-dd2")


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_what_is_no_number_of_processes_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(DDFastError, match=f"the environment variable WORLD_SIZE is '{value}', expected a number"):
        env.check_one_process("`plan`", several=["train"])


# Files of settings ------------------------------------------------------------------------------------------------

TEXT = '# größe\r\nrecipe = "digits"\r\nseed = 3\r\n\r\n[dd1]\r\npoint = 4\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\r\n", "\n"])
def test_marks_and_line_ends_of_editors(tmp_path, encoding, newline):
    path = tmp_path / "c.toml"
    path.write_bytes(TEXT.replace("\r\n", newline).encode(encoding))
    assert read_toml(path) == {"recipe": "digits", "seed": 3, "dd1": {"point": 4}}


@pytest.mark.parametrize("data", [TEXT.encode("latin-1"), b"\xff\xfea", b"\x80\x81\x00", TEXT.encode("utf-16")[2:]])
def test_what_is_no_text_is_one_line(here, tmp_path, data):
    (tmp_path / "c.toml").write_bytes(data)
    refused_here(here, f"{tmp_path}/c.toml is not", "train", "--config", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_setting_out_of_range_is_one_line_and_help_is_not(here, environment):
    call = [sys.executable, "-m", "ddfast.train", "--help"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--dd1.iterations" in done.stdout
    with pytest.raises(SystemExit) as stop:
        here("train", "--dd1.iterations=many")
    assert stop.value.code == 2
