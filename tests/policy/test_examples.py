"""The examples that people copy run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from ddfast.ops import dispatch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/adding-a-teacher.md", "docs/adding-an-op.md"])
def test_pages(page, monkeypatch):
    """All Python of a page, one block after the other."""
    monkeypatch.setattr(dispatch, "KERNELS", dict(dispatch.KERNELS))  # a page adds an op, for other tests there is none
    names: dict[str, object] = {"__name__": page}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("module", ["ddfast.ops.nearest_code", "ddfast.ops.noise"])
def test_docstrings(module):
    # importlib: the package's attribute of that name is the function.
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": __import__("torch")})
    assert result.attempted > 0
    assert result.failed == 0
