"""Files made to harm: nothing in them runs, leaves its folder, or is given the memory that it claims."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launching import launched
from official import digits_like
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from ddfast.config import read_toml
from ddfast.distill import checkpoints
from ddfast.errors import DDFastError
from ddfast.models import checkpoint
from ddfast.models.checkpoint import load_tensors, read_checkpoint, read_tensor, save_tensors, tensors_of
from ddfast.models.loading import load_student, load_teacher, save_student, save_teacher, start_student
from ddfast.runs import read_json
from ddfast.trajectories.store import TrajectoryStore

DEEP = "[" * 100_000


@pytest.fixture
def little_memory():
    """What this process has, and 2 GiB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def expanded(path: Path) -> None:
    """A tensor of 4 TB, all of whose elements are one number."""
    torch.save({"weight": torch.zeros(1, dtype=torch.float32).expand(10**12)}, path)


def strided(path: Path) -> None:
    """A view that claims to begin far behind its storage's end."""
    torch.save({"weight": torch.zeros(4, dtype=torch.float32)}, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"K\x04\x85", b"K\xff\x85"))  # the shape, a BININT1 in the pickle


def oversized(path: Path) -> None:
    """A safetensors header of a terabyte, without it."""
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


def many_keys(path: Path) -> None:
    """A header as long as 2**32 bytes, it says."""
    path.write_bytes((2**32 - 1).to_bytes(8, "little") + b'{"a' + b"\0" * 64)


@pytest.mark.parametrize("make", [expanded, strided, oversized, many_keys], ids=lambda make: make.__name__)
def test_what_a_file_claims_is_not_allocated(tmp_path, little_memory, make):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(DDFastError, match=r"weights\.pth"):
        for tensor in tensors_of(read_checkpoint(path)[0]).values():
            read_tensor(tensor)


def test_an_index_names_no_file_elsewhere(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_tensors(outside, {"weight": torch.zeros(2, dtype=torch.float32)}, {})
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("../outside.safetensors", str(outside), "x/../../outside.safetensors"):
        index = inside / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": name}}))
        with pytest.raises(DDFastError, match="outside"):
            read_checkpoint(index)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.json", read_json),
        ("a.toml", read_toml),
        ("model.safetensors.index.json", read_checkpoint),
        ("manifest.json", lambda path: TrajectoryStore.open(path.parent)),
    ],
)
def test_what_is_nested_deeply_is_no_crash(tmp_path, name, read):
    path = tmp_path / name
    path.write_text(f"a = {DEEP}" if name.endswith("toml") else DEEP)
    with pytest.raises(DDFastError):
        read(path)


@pytest.mark.parametrize("place", [20, 200, -1])
def test_a_sealed_file_tells_a_changed_byte(tmp_path, place):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"weight": torch.arange(8, dtype=torch.float32)}, {"what": "a student"})
    assert load_tensors(path)[1] == {"what": "a student"}
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DDFastError, match=r"a\.safetensors"):
        load_tensors(path)


def shared(path: Path, *, legacy: bool = False) -> None:
    """Forty dicts, each twice in the next: written out, a million millions."""
    inner: dict = {"x": 1}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save({"args": inner}, path, _use_new_zipfile_serialization=not legacy)


def shared_lists(path: Path) -> None:
    inner: list = [1]
    for _ in range(40):
        inner = [inner, inner]
    torch.save({"args": {"sizes": inner}}, path)


def in_itself(path: Path) -> None:
    inner: dict = {}
    inner["model"] = inner
    torch.save(inner, path)


@pytest.mark.parametrize(
    "make",
    [shared, lambda path: shared(path, legacy=True), shared_lists, in_itself],
    ids=["dicts", "legacy", "lists", "self"],
)
def test_what_is_shared_in_a_pickle_is_not_written_out(tmp_path, make):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(DDFastError, match=r"weights\.pth .*its containers hold each other"):
        read_checkpoint(path)


def test_a_dict_may_be_there_twice(tmp_path):
    path = tmp_path / "weights.pth"
    state = {"weight": torch.ones(2, dtype=torch.float32)}
    torch.save({"model": state, "ema": state}, path)
    content, _ = read_checkpoint(path)
    assert read_tensor(content["model"]["weight"]).tolist() == read_tensor(content["ema"]["weight"]).tolist() == [1, 1]


def test_an_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": index.name}}))
    with pytest.raises(DDFastError, match="is not there"):
        read_checkpoint(index)


class Harm:
    """What a pickle runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkpoint of a training."""
    tensors = {"weight": torch.ones(2, 3, dtype=torch.float32)}
    return checkpoints.Checkpoints(tmp_path, "distillation", "identity").save(tensors, {"step": 3})


def changed_index(place: Path, change: Callable[[Any], Any]) -> None:
    path = place / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))


def test_the_index_of_a_checkpoint_runs_nothing(tmp_path, place):
    """PyTorch itself unpickles it; a digest that lies beside tells accidents alone."""
    into = {"weight": torch.empty(2, 3, dtype=torch.float32)}
    checkpoints.load(place, into)
    assert checkpoints.names_in(place) == {"weight"} and into["weight"].eq(1).all()

    mark = tmp_path / "mark"
    changed_index(place, lambda index: Harm(mark))
    for read in (checkpoints.names_in, lambda place: checkpoints.load(place, into)):
        with pytest.raises(DDFastError, match=r"\.metadata .*refused, nothing of it was run"):
            read(place)
    assert not mark.exists()


def test_the_index_of_a_checkpoint_names_tensors_alone(place):
    """What is none, PyTorch unpickles too, from the other files."""

    def change(index):
        index.state_dict_metadata["weight"] = BytesStorageMetadata()
        return index

    changed_index(place, change)
    with pytest.raises(DDFastError, match=r"it names torch.*BytesStorageMetadata: refused"):
        checkpoints.names_in(place)


def test_the_index_of_a_checkpoint_names_files_of_its_folder(tmp_path, place):
    def change(index):
        for part in index.storage_data.values():
            part.relative_path = f"../{part.relative_path}"
        return index

    changed_index(place, change)
    with pytest.raises(DDFastError, match=r"'\.\./__0_0\.distcp', which is no tensor in this folder"):
        checkpoints.load(place, {"weight": torch.empty(2, 3, dtype=torch.float32)})


@pytest.mark.parametrize(("name", "value"), [("depth", 10**9), ("width", 10**9), ("depth", "x"), ("width", "x")])
def test_a_student_as_large_as_it_says_is_not_built(tmp_path, little_memory, name, value):
    teacher = digits_like()
    student = start_student(teacher)
    path = tmp_path / "student.safetensors"
    with mock.patch.object(type(student), "config", {**student.config, name: value}):
        save_student(path, student, {})
    with pytest.raises(DDFastError, match=r"student\.safetensors"):
        load_student(path, teacher)


@pytest.mark.parametrize(("name", "value"), [("depth", 10**9), ("width", 2**40), ("width", 64), ("heads", [])])
def test_a_teacher_as_large_as_it_says_is_not_built(tmp_path, little_memory, name, value):
    path = tmp_path / "model.safetensors"
    save_teacher(path, digits_like())
    tensors, said = load_tensors(path)
    said["teacher"][name] = value
    save_tensors(path, tensors, said)
    with pytest.raises(DDFastError, match=r"model\.safetensors"):
        load_teacher(path)


@pytest.mark.parametrize(
    ("name", "value"), [("method", None), ("family", []), ("student", 3), ("config", [1]), ("point", "x")]
)
def test_what_a_header_says_has_its_type(tmp_path, name, value):
    path = tmp_path / "student.safetensors"
    save_tensors(path, {"weight": torch.ones(2, dtype=torch.float32)}, {name: value})
    with pytest.raises(DDFastError, match=rf"what its header says of it: {name}: got"):
        read_checkpoint(path)


def test_whole_numbers_are_no_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_teacher(path, digits_like())
    tensors, said = load_tensors(path)
    name = next(name for name in tensors if name.startswith("body."))
    save_tensors(path, {**tensors, name: tensors[name].to(torch.int64)}, said)
    with pytest.raises(DDFastError, match=f"{name} holds int64 instead of floating-point numbers"):
        load_teacher(path)


def test_files_of_before_and_of_later(tmp_path, monkeypatch):
    """Without digests a file is read as it is; one of a later format is refused."""
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(2, dtype=torch.float32)}, path, {"config": json.dumps({"what": "before"})})
    assert load_tensors(path)[1] == {"what": "before"}

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        save_tensors(path, {"weight": torch.ones(2, dtype=torch.float32)}, {})
        load_tensors(path)
    with pytest.raises(DDFastError, match="of format 2, this ddfast reads 1: install a newer one"):
        load_tensors(path)


def ended_by_a_closed_pipe() -> int:
    import os
    import sys

    from ddfast.cli import main

    read, write = os.pipe()
    os.close(read)
    sys.stdout.flush()
    os.dup2(write, 1)
    return main(["doctor"])


def test_a_reader_who_has_enough_is_no_fault():
    with launched(1, ended_by_a_closed_pipe) as running:
        (ended,) = running.ended()
    assert (ended.value, ended.errors) == (141, "")
