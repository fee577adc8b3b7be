"""Whatever is typed, a command ends with 0, 1 and one line, or 2, and writes nothing outside its folder."""

from __future__ import annotations

import random

import pytest
from command_lines import drawn, ended, place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = 60


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with place(tmp_path_factory.mktemp("commands")):
        yield


@settings(max_examples=CASES, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_a_command_line_ends_with_a_code_and_one_line(seed):
    ended(drawn(random.Random(seed)))


@pytest.mark.parametrize(
    "line",
    [
        ["sample", "--student", "hub", "--count", "99999999999999"],
        ["sample", "--student", "hub", "--count", str(2**63), "--batch-size", "1"],
        ["sample", "--student", "hub", "--classes", "9" * 30],
        ["train", "--config", "npz/a.npz"],
        ["train", "--out", "y" * 300],
        ["train", "--seed", "9" * 5000],
        ["convert", "--teacher", "~nobody/x", "--to", "out"],
        ["train", "--recipe", "\udcff"],
        ["plan", "--json", "x/" * 3000],
    ],
    ids=lambda line: " ".join(line)[:40],
)
def test_what_cannot_be_is_refused_in_one_line(line):
    assert ended(line) in (1, 2)
