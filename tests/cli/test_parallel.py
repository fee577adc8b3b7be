"""`ddfast sample` and `ddfast evaluate` in several processes: the same images and figures, and errors said once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import in_this_process
from launching import launch, launched

from ddfast import processes, saving
from ddfast.errors import DDFastError
from ddfast.evaluation import sources
from ddfast.report import write_pictures
from ddfast.runs import open_student
from ddfast.sampling import sample_student

SPEEDS = {"seconds_per_image", "seconds_per_image_decoded", "speedup_vs_ar", "speedup_vs_plain_ar"}


def everything(cache: Path, student: Path, folder: Path) -> dict:
    """All that processes share, into the folder; what a process gets of it."""
    sample = ("sample", "--student", student, "--count=23", "--batch-size=4")
    for form, steps in (("files", 1), ("grid", 2), ("codes", 0)):
        to = ("--format", form, "--steps", steps, "--to", folder / form)
        assert in_this_process(cache, *sample, *to) == 0
    few = ("--evaluation.samples=100", "--evaluation.batch-size=30", "--evaluation.batch-sizes", 1)
    assert in_this_process(cache, "evaluate", "--student", student, *few, "--json", folder / "figures.json") == 0
    with processes.together("cpu", 60):
        config, teacher, network = open_student(student, "cpu", lambda *_: None)
        config.evaluation.batch_size = 7
        whole = sample_student(teacher, network, count=23, seed=3, batch_size=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "_LARGEST_TABLE", 0)  # without marginals
            write_pictures(config, teacher, network, folder / "pictures.png", columns=2)
        saving.save_samples(whole, teacher, "codes", folder / "whole")
    return {"codes": whole.codes, "number": whole.number}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def figures(folder: Path) -> dict:
    """Of every source, and the names of its timings; Fréchet distances and errors up to the rounding of their sums."""
    rows = json.loads((folder / "figures.json").read_text())
    return {
        source: {
            name: name if name in SPEEDS else round(value, 6) if name.startswith("frechet") else value
            for name, value in row.items()
        }
        for source, row in rows.items()
        if isinstance(row, dict)
    }


def test_any_number_of_processes_makes_the_same(cache, generators, tmp_path):
    (whole,) = launch(1, everything, cache, generators / "digits", tmp_path / "one")
    ended = launch(3, everything, cache, generators / "digits", tmp_path / "many")
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert len(one) == 23 + 6
    assert figures(tmp_path / "one") == figures(tmp_path / "many")
    assert {**one, "figures.json": b""} == {**many, "figures.json": b""}
    for end in ended:
        assert end["codes"].equal(whole["codes"])
        assert end["number"].tolist() == list(range(23))


def test_torchrun(cache, environment, generators, tmp_path):
    """Each image once, and one line that says so."""
    sample = ["sample", "--student", str(generators / "var"), "--count=7", "--batch-size=2", "--format=files", "--to"]
    assert in_this_process(cache, *sample, tmp_path / "one") == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    made = [*start, "ddfast.sample", *sample[1:], str(tmp_path / "two")]
    done = subprocess.run(made, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"7 images in {tmp_path / 'two'}") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def command(cache: Path, *arguments: object) -> None:
    sys.exit(in_this_process(cache, *arguments))


def full_disk(cache: Path, *arguments: object) -> None:
    """Where process 1 writes."""

    def failing(*_: object, **__: object) -> None:
        raise DDFastError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_PATIENCE", 1.0)
        if os.environ["RANK"] == "1":
            patch.setattr(saving, "write_png", failing)
        command(cache, *arguments)


def test_what_ends_all_is_said_once_and_what_ends_one_by_that_one(cache, generators, tmp_path):
    sample = ("sample", "--count=4", "--batch-size=1", "--format=files", "--to", tmp_path / "x", "--student")
    with (
        launched(2, command, cache, *sample, tmp_path / "nowhere") as alike,
        launched(2, full_disk, cache, *sample, generators / "var") as one,
    ):
        alike, one = (running.ended(together=True) for running in (alike, one))
    assert {end.code for end in alike} <= {1, -signal.SIGTERM}  # whichever ended first ended the other
    assert alike[0].errors.startswith("ddfast sample: error: --student")
    assert alike[1].errors == ""
    assert one[1].code == 1
    assert one[1].errors.startswith("ddfast sample: process 1 of 2: error: no space left; ")
    assert one[0].code in (1, -signal.SIGTERM)  # it lost the other, or was ended before it knew
    assert not one[0].errors or "process 1 of 2 has ended: DDFastError: no space left" in one[0].errors
