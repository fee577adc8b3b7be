"""Whatever a file holds, its loader reads it, or refuses it in one line: valid files with a few changes, by a seed."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_kinds_are_told():
    assert {kind_of(seed) for seed in (b"{}", b"a", b"PK..data.pkl", b"PK", b"\x80\x02", b"\x89PNG")} == {
        "json", "text", "pytorch", "npz", "pickle", "picture",
    }  # fmt: skip
