"""Files that ddfast reads again, damaged at random places (by a seed): refused by name, or made again; never used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from injection import FAULTS
from operations import OPERATIONS, result, run, start

DAMAGE = ("truncated", "one bit", "zeros", "empty", "missing", "swapped")

PLACES = 2


def damage(path: Path, kind: str, other: Path, draw: random.Random) -> None:
    """Damage a file; `other` is one of the same kind that it might be taken for."""
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "swapped":
        data = bytearray(other.read_bytes())
    if kind == "one bit":
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
    if kind == "truncated":
        del data[draw.randrange(1, len(data)) :]
    if kind == "empty":
        data.clear()
    if kind == "zeros":
        first = draw.randrange(len(data) // 2)
        data[first : first + len(data) // 2] = bytes(len(data) // 2)
    path.unlink()  # not through a link to what others use
    path.write_bytes(data)


FILES = {
    "trained teacher": ("pairs", "base/cache/digits-teacher-*.safetensors", "base/run/student.safetensors"),
    "classifier": ("evaluate", "base/cache/digits-classifier-*.safetensors", "base/run/student.safetensors"),
    "shard": ("dd1", "work/run/trajectories/shard-000002.safetensors",
              "base/run/trajectories/shard-000003.safetensors"),
    "manifest": ("dd1", "work/run/trajectories/manifest.json", "base/hub/config.json"),
    "student": ("sample_codes", "base/run/student.safetensors", "base/hub/model.safetensors"),
    "checkpoint's tensors": ("dd1", "work/run/checkpoints/distillation-*/*.distcp", "base/run/student.safetensors"),
    "checkpoint's index": ("dd1", "work/run/checkpoints/distillation-*/.metadata", "base/run/student.safetensors"),
    "checkpoint's state": ("dd1", "work/run/checkpoints/distillation-*/state.json", "base/hub/config.json"),
    "stage 1": ("dd2", "work/run/ar-diffusion.safetensors", "base/run/student.safetensors"),
    "hub: teacher": ("hub_load", "base/hub/model.safetensors", "base/run/student.safetensors"),
    "hub: student": ("hub_load", "base/hub/student.safetensors", "base/hub/model.safetensors"),
    "hub: config": ("hub_load", "base/hub/config.json", "base/run/trajectories/manifest.json"),
    "samples kept": ("sample_codes", "work/.codes.safetensors.parts/000000008.safetensors",
                     "work/.codes.safetensors.parts/000000000.safetensors"),
    "verified kernels": ("verdicts", "work/cache/kernels.json", "base/hub/config.json"),
}  # fmt: skip
"""What is damaged: the operation that reads it, its path, and what it is swapped with."""

MADE_AGAIN = {"trained teacher", "classifier", "samples kept", "verified kernels"}
"""Of these; where another is not as it was written, it is refused, or a checkpoint before it is used."""

INTERRUPTED = {
    "checkpoint's tensors": 0.7,
    "checkpoint's index": 0.7,
    "checkpoint's state": 0.7,
    "stage 1": 0.7,
    "samples kept": 0.8,
}
"""Where the file is there after an interrupted operation alone: after which share of its events that was."""


QUICK = ("shard", "student", "checkpoint's state", "hub: config", "trained teacher", "samples kept")
"""Files of `make test`, one for every kind of damage."""


def cells() -> list:
    found = []
    for file in FILES:
        for number, kind in enumerate(DAMAGE):
            for place in range(PLACES if kind in ("truncated", "one bit", "zeros") else 1):
                quick = place == 0 and file == QUICK[number]
                mark = () if quick else pytest.mark.full
                found.append(pytest.param(file, kind, place, id=f"{file}-{kind}-{place}", marks=mark))
    return found


@pytest.mark.parametrize(("file", "kind", "place"), cells())
def test_damage_is_never_used(server, base, undisturbed, tmp_path, file, kind, place):
    name, path, other = FILES[file]
    operation = OPERATIONS[name]
    whole = undisturbed.of(operation)
    folders = {"base": tmp_path / "base", "work": tmp_path / "work"}
    shutil.copytree(base, folders["base"])
    start(operation, base, folders["work"])
    if file in INTERRUPTED:
        at = int(INTERRUPTED[file] * undisturbed.count(operation, FAULTS["SIGTERM"].kinds))
        assert run(server, operation, folders["base"], folders["work"], FAULTS["SIGTERM"], at).code == 75
    if file == "verified kernels":
        assert run(server, operation, folders["base"], folders["work"]).code == 0
    found = sorted(tmp_path.glob(path))
    assert found, path
    damaged = found[-1]
    damage(damaged, kind, tmp_path / other, random.Random(f"{file} {kind} {place}"))

    ended = run(server, operation, folders["base"], folders["work"])
    assert "Traceback" not in ended.errors, ended
    if ended.code == 0 or file in MADE_AGAIN:
        assert ended.code == 0, ended
        assert result(folders["work"]) == whole, (damaged, ended)
        return
    assert ended.code == 1, ended
    assert ended.errors.count("error:") == 1, ended
    (line,) = [line for line in ended.errors.splitlines() if "error:" in line]
    assert damaged.name in line or damaged.parent.name in line, ended
