"""Weights that hold NaN, in files that are whole: what is made of them is an error, not a result."""

from __future__ import annotations

import math
import shutil

import pytest
from operations import OPERATIONS, result, run, start

from ddfast.models.checkpoint import load_tensors, save_tensors

TEACHER, STUDENT = "cache/digits-teacher-*.safetensors", "run/student.safetensors"

READ = {
    "pairs": TEACHER,
    "dd1": TEACHER,
    "dd2": TEACHER,
    "evaluate": STUDENT,
    "convert": "hub/model.safetensors",
    "sample_codes": STUDENT,
    "sample_npz": STUDENT,
    "sample_files": STUDENT,
    "sample_grid": STUDENT,
    "hub_save": STUDENT,
    "hub_load": "hub/student.safetensors",
}
"""Which file is spoilt, by the operation that reads it."""

QUICK = ("sample_codes",)


def cells() -> list:
    return [
        pytest.param(name, value, id=f"{name} {value}", marks=() if name in QUICK else pytest.mark.full)
        for name in READ
        for value in (math.nan, math.inf)
    ]


@pytest.mark.parametrize(("name", "value"), cells())
def test_weights_that_diverged_are_refused(server, base, tmp_path, name, value):
    spoilt = tmp_path / "base"
    shutil.copytree(base, spoilt)
    operation, (path,) = OPERATIONS[name], spoilt.glob(READ[name])
    work = start(operation, base, tmp_path / "work")
    before = result(work)
    tensors, config = load_tensors(path)
    for tensor in tensors.values():  # live weights and averaged ones
        if tensor.dim() == 2:
            tensor[0, 0] = value
    save_tensors(path, tensors, config)

    ended = run(server, operation, spoilt, work)
    if READ[name] == TEACHER:  # only ddfast writes that one
        assert ended.code == 0, ended
        assert "it is made again" in ended.errors + ended.out
        return
    assert ended.code == 1, ended
    assert ended.errors.count("error:") == 1, ended
    assert path.name in ended.errors, ended
    assert "NaN or infinite" in ended.errors, ended
    assert result(work) == before
