"""Files made to harm: nothing in them runs, leaves its folder, or is given the memory that it claims."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from launching import launched

from ddfast.config import read_toml
from ddfast.errors import DDFastError
from ddfast.models import checkpoint
from ddfast.models.checkpoint import load_tensors, read_checkpoint, read_tensor, save_tensors, tensors_of
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
