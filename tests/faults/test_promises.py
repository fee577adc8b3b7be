"""The page on what is promised is that of the tests, and they are there."""

from __future__ import annotations

import ast
from pathlib import Path

import promises
import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = sorted({test for row in promises.rows() for test in row.tests})


def test_the_page_is_made_from_the_tests():
    assert promises.PAGE.read_text() == promises.page(), "python tests/faults/promises.py writes it anew"


@pytest.mark.parametrize("name", TESTS)
def test_a_named_test_is_there(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_cells_say_what_is_meant():
    assert {cell for row in promises.rows() for cell in row.cells.values()} <= promises.MEANING.keys()
