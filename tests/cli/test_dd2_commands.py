"""`--method dd2` as a user runs it, at tiny sizes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpointed import last_step
from commands import TINY, command, in_this_process, refused
from safetensors.torch import load_file

SIZES = [
    *TINY,
    "--method", "dd2", "--init", "stage1", "--dd2.head-width=16", "--dd2.head-depth=1",
    "--dd2.tune.iterations=20", "--dd2.tune.batch-size=16", "--dd2.tune.log-every=10",
    "--dd2.tune.checkpoint-every=5",
    "--dd2.match.start-iterations=20", "--dd2.match.iterations=10", "--dd2.match.guidance-first=3",
    "--dd2.match.batch-size=16", "--dd2.match.log-every=10", "--dd2.match.checkpoint-every=5",
    "--dd2.match.watch-every=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert in_this_process(cache, "train", *SIZES) == 0
    return folder / "runs" / "digits-dd2"  # not DD1's default folder


def test_train_writes_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.toml", "metrics.jsonl", "metrics.json", "student.safetensors", "guidance.safetensors",
        "ar-diffusion.safetensors", "report.md", "report.html", "samples.png",
    }  # fmt: skip
    assert "checkpoints" not in names
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["method"] == "dd2"
    assert {"teacher", "student_1step", "student_2step", "independent_marginals", "ar_diffusion"} <= set(metrics)
    assert set(metrics["student_2step"]["speedup_vs_ar"]) == {"1", "4"}
    report = (finished / "report.md").read_text()
    assert "| DD2 student | 1 |" in report
    assert "| AR-diffusion model (stage 1) | 16 x 10 |" in report


@pytest.mark.full
def test_killed_in_every_stage_and_run_again_is_the_same_run(environment, run, finished, tmp_path):
    out = tmp_path / "killed"
    arguments = command("train", "--out", out, *SIZES)
    tuned = out / "ar-diffusion.safetensors"
    for moment in (lambda: last_step(out) >= 0, tuned.exists, lambda: tuned.exists() and last_step(out) >= 0):
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not moment():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "student.safetensors").exists()
    run("train", "--out", out, *SIZES)
    for name in ("student.safetensors", "guidance.safetensors", "ar-diffusion.safetensors"):
        ours, theirs = load_file(out / name), load_file(finished / name)
        assert all((value == theirs[key]).all() for key, value in ours.items()), name


def test_samples_in_any_number_of_steps(run, finished, tmp_path):
    made = []
    for steps in (1, 3):
        target = tmp_path / f"codes-{steps}"
        run("sample", "--student", finished, "--steps", steps, "--count", 20, "--format", "codes", "--to", target)
        made.append(load_file(target.with_suffix(".safetensors"))["codes"])
    assert (made[0][:, :14] == made[1][:, :14]).all()
    assert (made[0] != made[1]).any()


def test_evaluate_and_profile(run, finished, tmp_path):
    done = run("evaluate", "--student", finished, "--evaluation.samples", 200, "--evaluation.batch-sizes", 1)
    assert "| DD2 student | 1 + 1 AR |" in done.stdout
    sizes = [option for option in SIZES if option.startswith("--teacher.") or option.startswith("--dd2.head")]
    arguments = ["--method", "dd2", "--random-weights", "--rounds", 1, "--out", tmp_path, *sizes]
    assert "1 step" in run("profile", *arguments).stdout


def test_a_start_from_the_teacher_needs_no_stage_1(run, tmp_path):
    done = run("train", "--out", tmp_path, *SIZES, "--init", "teacher")
    assert {path.name for path in tmp_path.iterdir()} >= {"student.safetensors", "guidance.safetensors"}
    assert not {"ar-diffusion.safetensors", "trajectories"} & {path.name for path in tmp_path.iterdir()}
    assert "DD2 student" in done.stdout
    assert "stage 1" not in done.stdout


@pytest.mark.full
def test_starting_from_a_dd1_student(run, tmp_path):
    run("train", "--out", tmp_path / "dd1", *TINY, "--dd1.iterations=10", "--dd1.batch-size=16")
    done = run("train", "--out", tmp_path / "dd2", *SIZES, "--init", f"dd1:{tmp_path / 'dd1'}")
    assert "DD2 student" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--init", "nowhere"], "--init: got 'nowhere', expected stage1, teacher, scratch or dd1:PATH"),
        (["--init", "dd1:nowhere"], "no student.safetensors at nowhere; `ddfast train --method dd1` makes it"),
        (["--method", "dd3"], "unknown method 'dd3'; known: dd1, dd2"),
    ],
)
def test_errors_in_one_line(run, arguments, words, tmp_path):
    refused(run, words, "train", "--out", tmp_path / "run", *SIZES, *arguments)
    assert not (tmp_path / "run").exists()
