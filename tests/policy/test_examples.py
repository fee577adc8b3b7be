"""The examples that people copy run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_readme():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("module", ["ddfast.ops.nearest_code", "ddfast.ops.noise"])
def test_docstrings(module):
    # importlib: the package's attribute of that name is the function.
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": __import__("torch")})
    assert result.attempted > 0
    assert result.failed == 0
