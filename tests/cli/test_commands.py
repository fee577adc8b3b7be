"""The commands as a user runs them, at tiny sizes.

`process` where it is the process that is tested: of every command at least once (`convert`: tests/cli/test_convert.py).
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from checkpointed import last_step
from commands import TINY, command, in_this_process, refused
from safetensors.torch import load_file

from ddfast.config import read_toml
from ddfast.portable import portable_command

SIZES = [
    *TINY,
    "--dd1.iterations=60", "--dd1.batch-size=32", "--dd1.warmup=5", "--dd1.log-every=10", "--dd1.checkpoint-every=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert in_this_process(cache, "train", "--out", out, *SIZES) == 0
    return out


def test_train_writes_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.toml", "metrics.jsonl", "metrics.json", "student.safetensors", "report.md", "report.html",
        "samples.png", "trajectories",
    }  # fmt: skip
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["method"] == "dd1"
    assert metrics["recipe"] == "digits"
    for row in ("teacher", "student_1step", "student_2step", "independent_marginals"):
        keys = {"frechet", "frechet_error", "precision", "recall", "class_accuracy", "teacher_nll", "pair_tv", "count"}
        assert keys | {"seconds_per_image"} <= set(metrics[row])
        assert set(metrics[row]["seconds_per_image"]) == {"1", "4"}
        assert ("speedup_vs_ar" in metrics[row]) == row.startswith("student")
    steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40, 50, 60]
    report = (finished / "report.md").read_text()
    assert "| DD1 student | 1 |" in report
    assert "independent marginals" in report
    assert portable_command(shlex.join(["python", *command("train", "--out", finished, *SIZES)[1:]])) in report
    assert (finished / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_repeated(run, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    done = run("train", "--out", finished, *SIZES)
    assert done.stdout.count("skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_other_settings_are_refused_and_nothing_is_lost(run, finished):
    before = (finished / "config.toml").read_bytes()
    refused(run, "dd1.iterations is 60, not 70", "train", "--out", finished, *SIZES, "--dd1.iterations=70")
    assert (finished / "config.toml").read_bytes() == before


def test_a_setting_that_fails_early_claims_nothing(run, tmp_path):
    refused_settings = [*SIZES, "--dd1.point=99", "--out", str(tmp_path / "run")]
    refused(run, "point: got 99, expected a trajectory point in 1..15", "train", *refused_settings)
    assert not (tmp_path / "run" / "trajectories").exists()
    refused(run, "point: got 98", "train", *refused_settings, "--dd1.point=98")


def kill(arguments: list[str], environment: dict[str, str], moment) -> None:
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not moment():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_twice_and_run_again_is_the_same_run(environment, finished, tmp_path):
    out = tmp_path / "killed"
    arguments = command("train", "--out", out, *SIZES)
    kill(arguments, environment, (out / "trajectories" / "shard-000002.safetensors").exists)
    kill(arguments, environment, lambda: last_step(out) >= 0)
    assert not (out / "student.safetensors").exists()
    # As `ddfast train` is: everywhere else the tests use `python -m ddfast.train`.
    resumed = [sys.executable, "-m", "ddfast", "train", "--out", str(out), *SIZES, "--resume"]
    resumed += ["--trajectories.batch-size=20"]  # no matter to pairs that are there
    subprocess.run(resumed, env=environment, check=True, capture_output=True)
    told = portable_command(shlex.join(["python", *command("train", *resumed[4:])[1:]]))
    assert told in (out / "report.md").read_text()
    for shard in sorted((finished / "trajectories").glob("shard-*.safetensors")):
        assert (out / "trajectories" / shard.name).read_bytes() == shard.read_bytes()
    ours, whole = load_file(out / "student.safetensors"), load_file(finished / "student.safetensors")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


def test_a_run_of_before_is_measured_and_told_anew(environment, finished, tmp_path):
    """Its config.toml lacks what evaluation has learnt since; a report is of the figures that are there."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    settings = read_toml(out / "config.toml")
    for name in ("paths", "lpips_vgg", "lpips_linear"):
        del settings["evaluation"][name]
    (out / "config.toml").write_text(tomli_w.dumps(settings))
    (out / "metrics.json").unlink()
    (out / "report.html").write_text("of another student")
    subprocess.run(command("train", "--out", out, *SIZES), env=environment, check=True, capture_output=True)
    assert "of another student" not in (out / "report.html").read_text()


def test_interrupted_it_says_how_to_go_on(environment, tmp_path):
    out = tmp_path / "run"
    arguments = command("train", "--out", out, *SIZES, "--dd1.iterations=100000")
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell has SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and last_step(out) < 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; the same command continues where it stopped" in errors
    assert "Traceback" not in errors


def test_trajectories_extend(run, process, tmp_path):
    assert "100 pairs in" in process("trajectories", "--out", tmp_path, "--count=80", *SIZES).stdout
    first = (tmp_path / "trajectories" / "shard-000000.safetensors").read_bytes()
    assert "150 pairs in" in run("trajectories", "--out", tmp_path, "--count=150", *SIZES).stdout
    assert (tmp_path / "trajectories" / "shard-000000.safetensors").read_bytes() == first
    throughput = [json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines()]
    assert [line["pairs"] for line in throughput] == [100, 50]
    refused(
        run, "seed is 0, not 5", "trajectories", "--out", tmp_path, "--count=150", *SIZES, "--trajectories.steps=20",
        "--seed=5",
    )  # fmt: skip


def test_a_damaged_shard_is_named(environment, run, finished, tmp_path):
    out = tmp_path / "run"
    arguments = command("train", "--out", out, *SIZES)
    kill(arguments, environment, lambda: last_step(out) >= 0)
    path = out / "trajectories" / "shard-000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)
    refused(run, "shard-000003.safetensors is damaged", "train", "--out", out, *SIZES)
    path.unlink()
    run("train", "--out", out, *SIZES)
    assert path.read_bytes() == (finished / "trajectories" / path.name).read_bytes()


@pytest.mark.parametrize("form", ["grid", "files", "codes"])
def test_sample(run, process, finished, tmp_path, form):
    target = tmp_path / "made"
    call = process if form == "codes" else run
    call("sample", "--student", finished, "--steps=2", "--classes=1,3", "--count=6", "--format", form, "--to", target)
    if form == "codes":
        codes = load_file(target.with_name("made.safetensors"))
        assert codes["codes"].shape == (6, 16)
        assert codes["condition"].tolist() == [1, 3, 1, 3, 1, 3]
    elif form == "grid":
        assert target.with_name("made.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert sorted(path.name for path in target.iterdir())[1] == "00001-class3.png"


def test_sample_with_the_teachers_help(run, finished, tmp_path):
    for steps in (0, 4):
        run("sample", "--student", finished, "--teacher-steps", steps, "--format=codes", "--to", tmp_path / str(steps))
    without, with_help = (load_file(tmp_path / f"{steps}.safetensors")["codes"] for steps in (0, 4))
    assert not torch.equal(without, with_help)


def test_evaluate(process, finished, tmp_path):
    done = process(
        "evaluate", "--student", finished, "--json", tmp_path / "e.json", "--evaluation.samples=150",
        "--evaluation.batch-sizes", "2",
    )  # fmt: skip
    assert "| DD1 student | 1 |" in done.stdout
    assert set(json.loads((tmp_path / "e.json").read_text())["teacher"]["seconds_per_image"]) == {"2"}


def test_profile(process, tmp_path):
    done = process("profile", "--random-weights", "--out", tmp_path, "--rounds=2", *SIZES)
    assert "image decoding excluded" in done.stdout
    own = shlex.join(["python", *command("profile", "--random-weights", "--out", tmp_path, "--rounds=2", *SIZES)[1:]])
    nsight = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(("nsys ", "ncu "))]
    assert len(nsight) == 2
    assert all(line.endswith(f" {own} --device cuda") for line in nsight)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"teacher AR", "student 1 step", "image decoding"} <= {event.get("name") for event in events}


def test_doctor(process):
    text = process("doctor").stdout
    assert "several processes: gloo" in text
    for word in ("torch", "CPU kernels", "DDFAST_BACKEND", "flow_sample", "float32 tensors on cuda"):
        assert word in text


def test_config_file(run, finished, tmp_path):
    (tmp_path / "c.toml").write_text((finished / "config.toml").read_text())
    out = tmp_path / "pairs"
    run("trajectories", "--config", tmp_path / "c.toml", "--out", out, "--count=50")
    shard = "trajectories/shard-000000.safetensors"
    assert (out / shard).read_bytes() == (finished / shard).read_bytes()
    (tmp_path / "c.toml").write_text("[dd1]\nspeed = 9\n")
    refused(run, "unknown key dd1.speed", "train", "--config", tmp_path / "c.toml", "--out", tmp_path / "x")
    (tmp_path / "c.toml").write_text("dd1 = 3\n")
    refused(run, "dd1: got 3, expected a table", "train", "--config", tmp_path / "c.toml", "--out", tmp_path / "x")
    (tmp_path / "c.toml").write_text("[dd1]\niterations = 'many'\n")
    refused(run, "dd1.iterations: got 'many'", "train", "--config", tmp_path / "c.toml", "--out", tmp_path / "x")
    (tmp_path / "c.toml").write_text("[dd1]\niterations = 0\n")
    refused(run, "iterations: got 0, expected a positive", "train", "--config", tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text("[dd1\n")
    refused(run, "is not TOML", "train", "--config", tmp_path / "c.toml", "--out", tmp_path / "x")
    refused(run, "cannot read", "train", "--config", tmp_path / "none.toml", "--out", tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("unknown recipe 'cats'; known: digits", ["train", "--recipe", "cats"]),
        ("unknown method 'dd9'", ["train", "--method", "dd9"]),
        ("--resume: no run in", ["train", "--resume", "--out", "{tmp}/new"]),
        ("cannot write {tmp}/file/run/.lock: Not a directory", ["train", "--out", "{tmp}/file/run"]),
        ("count: got 0", ["trajectories", "--count", "0", "--out", "{tmp}/a"]),
        ("no student.safetensors there", ["sample", "--student", "{tmp}"]),
        ("no student.safetensors there", ["evaluate", "--student", "{tmp}"]),
        ("give --student DIR, or --random-weights", ["profile", "--out", "{tmp}"]),
        ("PyTorch sees no GPU here", ["train", "--device", "cuda", "--out", "{tmp}/b"]),
        ("--device: got 'banana', expected cpu, cuda", ["train", "--device", "banana", "--out", "{tmp}/c"]),
        ("--device: got 'meta', expected cpu, cuda", ["profile", "--random-weights", "--device", "meta"]),
        ("unknown option", ["doctor", "--all"]),
    ],
)
def test_one_line_errors(run, tmp_path, words, arguments):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "file").write_text("")
    refused(run, words.format(tmp=tmp_path), *(argument.format(tmp=tmp_path) for argument in arguments))


def test_damaged_files_of_a_run_are_named(run, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "metrics.json").write_text('{"method": "dd1", ')
    refused(run, f"{out}/metrics.json is damaged", "train", "--out", out, *SIZES)
    assert (out / "metrics.json").read_text() == '{"method": "dd1", '
    (out / "student.safetensors").write_bytes((finished / "student.safetensors").read_bytes()[:1000])
    refused(run, f"{out}/student.safetensors is not a readable safetensors file", "sample", "--student", out)
    (out / "config.toml").write_text("seed = 3\n")
    refused(run, f"{out}/config.toml names no recipe", "sample", "--student", out)


def test_wrong_labels_are_refused(run, finished):
    refused(run, "classes: got [12]", "sample", "--student", finished, "--classes=12")
    refused(run, "--classes: got '1;2'", "sample", "--student", finished, "--classes=1;2")


def test_an_unknown_flag_is_bad_usage(run, tmp_path):
    assert "--speeed" in run("train", "--speeed=3", "--out", tmp_path / "x", code=2).stderr


def test_one_entry_point(environment, here):
    call = [sys.executable, "-m", "ddfast", "--help"]
    assert "trajectories" in subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    assert here("doctor")[0] == 0
    code, _, errors = here("fly")
    assert code == 2
    assert "unknown command 'fly'; known: train" in errors


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("train", "--recipe=cats", "--debug", code=1).stderr
