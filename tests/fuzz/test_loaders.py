"""Whatever a file holds, its loader reads it, or refuses it in one line: valid files with a few changes, by a seed."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import kind_of, mutated
from targets import TARGETS, prepared
from trial import little_memory, refused

CASES = 40
"""Of a target; `coverage_guided.py` takes as many as there is time for."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, list[bytes]]]:
    """Of every target: its folder, and valid files."""
    made = {}
    for name, target in TARGETS.items():
        folder = tmp_path_factory.mktemp("target")
        made[name] = (folder, prepared(target, folder))
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_read(folders, name):
    folder, seeds = folders[name]
    for data in seeds:
        assert refused(TARGETS[name], folder, data) == ""


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(folders, name):
    folder, seeds = folders[name]
    target = TARGETS[name]

    @settings(
        max_examples=CASES, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(seeds), st.randoms(use_true_random=True))
    def case(data, draw):
        refused(target, folder, mutated(data, draw, target.kind))

    with little_memory():
        case()


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.sealed])
def test_a_changed_byte_of_a_sealed_file_is_refused(folders, name):
    folder, (data, *_) = folders[name]
    target = TARGETS[name]
    changes = (0x01, 0x80, 0x20)
    for place in range(len(data)):
        change = changes[place % len(changes)]
        assert refused(target, folder, data[:place] + bytes((data[place] ^ change,)) + data[place + 1 :]), place


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_of_no_kind_are_read_or_refused(folders, name):
    folder, seeds = folders[name]
    for data in (b"", b"\0", os.linesep.encode(), seeds[0][: len(seeds[0]) // 2], seeds[0] * 2, b"[" * 100_000):
        refused(TARGETS[name], folder, data)


WRONG = (None, [], {}, "x", -1, 1e999, 10**30, True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from places(part, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    made = copy.copy(value)
    made[path[0]] = replaced(value[path[0]], path[1:], other)
    return made


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.file.endswith(".json")])
def test_json_of_another_type_anywhere(folders, name):
    """Every place of a valid file, with what is not meant there."""
    folder, (data, *_) = folders[name]
    value = json.loads(data)
    heavy = 4 if name.startswith("hub") else 1  # a case loads a generator
    for number, path in enumerate(places(value)):
        for other in WRONG[number % heavy :: heavy]:
            refused(TARGETS[name], folder, json.dumps(replaced(value, path, other)).encode())


def damaged_archives(data: bytes) -> Iterator[bytes]:
    """What zipfile has errors of several classes for."""
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    version, flags, method, checksum, extra, name = 6, 8, 10, 16, 30, 46
    for at, change in (
        (version, 99), (flags, 1), (method, 99), (method, 12), (method, 14), (checksum, 1), (extra, 0xFF), (name, 0xFF),
    ):  # fmt: skip
        made = bytearray(data)
        made[central + at] = change
        if at in (flags, method):  # both headers say it
            made[local + at - 2] = change
        yield bytes(made)
    end = data.rindex(b"PK\x05\x06")  # of several disks, it says: with a locator of a large archive's end
    yield data[:end] + b"PK\x06\x07" + bytes(12) + b"\x02\0\0\0" + data[end:]


HEADERS = (
    "", "{", "(" * 9000, "'''", "{'descr': '|O', 'fortran_order': False, 'shape': ()}", "x" * 60_000, "\0", "[" * 300,
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -1, 16, 3)}",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.file.endswith((".npz", ".pth"))])
def test_damaged_archives_and_arrays(folders, name):
    folder, seeds = folders[name]
    archives = [data for data in seeds if data.startswith(b"PK")]
    assert archives
    for data in archives:
        for made in damaged_archives(data):
            refused(TARGETS[name], folder, made)
    for header in HEADERS if TARGETS[name].file.endswith(".npz") else ():
        member = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(96)
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            for array in ("arr_0", "mu", "sigma"):
                archive.writestr(f"{array}.npy", member)
        assert refused(TARGETS[name], folder, held.getvalue())


def test_kinds_are_told():
    assert {kind_of(seed) for seed in (b"{}", b"a", b"PK..data.pkl", b"PK", b"\x80\x02", b"\x89PNG")} == {
        "json", "text", "pytorch", "npz", "pickle", "picture",
    }  # fmt: skip
