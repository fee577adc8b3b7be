"""Files that earlier versions wrote (tests/data/formats, a folder per format) are read, and gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import formats
import pytest
import torch

from ddfast.distill import checkpoints
from ddfast.errors import DDFastError
from ddfast.files import read_text
from ddfast.hub import Generator
from ddfast.models import checkpoint
from ddfast.models.checkpoint import load_tensors
from ddfast.ops import findings
from ddfast.trajectories import store

ALL = sorted(path.name for path in (Path(__file__).parents[1] / "data" / "formats").iterdir())


@pytest.fixture(params=ALL)
def folder(request, tmp_path) -> Path:
    source = Path(__file__).parents[1] / "data" / "formats" / request.param
    return Path(shutil.copytree(source, tmp_path / request.param))


def test_the_format_of_now_is_kept():
    assert ALL[-1] == str(checkpoint.FORMAT)


def test_tensors_are_what_was_written(folder):
    assert formats.numbers(folder) == json.loads(read_text(folder / formats.EXPECTED))


def test_a_hub_folder_is_loaded(folder):
    assert Generator.from_pretrained(folder / "hub").codes([1, 2, 3], seed=4).shape == (3, 16)


def test_a_run_goes_on(folder, server):
    """One that is done is left as it is; one that was stopped goes on from its checkpoint, with the cached teacher."""
    student, teachers = folder / "run" / "student.safetensors", list((folder / "cache").iterdir())
    before = student.read_bytes()
    ended = server.run("formats:train", folder, folder, below=folder)
    assert ended.code == 0, ended
    assert student.read_bytes() == before
    assert list((folder / "cache").iterdir()) == teachers

    stopped = folder / "stopped" / "run"
    (logged,) = read_text(stopped / "metrics.jsonl").splitlines()
    ended = server.run("formats:stopped", folder, folder / "stopped", below=folder)
    assert ended.code == 0, ended
    lines = read_text(stopped / "metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 12]
    assert lines[0] == logged  # with its times: it was not done again
    assert load_tensors(stopped / "student.safetensors")[0].keys() == load_tensors(student)[0].keys()


def test_sampling_goes_on(folder, server):
    first = load_tensors(folder / ".codes.safetensors.parts" / "000000000.safetensors")[0]["codes"]
    ended = server.run("formats:sample", folder, folder, below=folder)
    assert ended.code == 0, ended
    codes = load_tensors(folder / "codes.safetensors")[0]["codes"]
    assert torch.equal(codes[: len(first)], first)
    assert len(codes) == 24


def test_findings_are_read(folder, monkeypatch):
    monkeypatch.setenv("DDFAST_CACHE", str(folder / "cache"))
    (machine,) = findings._load(findings.path()).values()
    assert machine["verdicts"].keys() == {f"op {number}" for number in range(3)}


def test_what_is_of_a_later_format_is_refused(folder, server, monkeypatch, capsys):
    """By a line that says so; what is found about kernels is found again."""
    for module in (checkpoint, store, checkpoints):
        monkeypatch.setattr(module, "FORMAT", 0)
    monkeypatch.setattr(findings, "_FORMAT", 0)
    later = folder.name != "0"
    if later:
        with pytest.raises(DDFastError, match="of format 1, this ddfast reads 0"):
            load_tensors(folder / "run" / "student.safetensors")
    with pytest.raises(DDFastError, match="of format 1"):
        store.TrajectoryStore.open(folder / "run" / "trajectories")
    kept = checkpoints.Checkpoints(folder / "stopped" / "run", "distillation", "other settings")
    with pytest.raises(DDFastError, match="of format 1, this ddfast reads 0" if later else "other settings"):
        kept.newest()
    assert findings._load(folder / "cache" / "kernels.json") == {}
