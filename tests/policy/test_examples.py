"""The examples that people copy run."""

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import ddfast
from ddfast.cli import main
from ddfast.models import families
from ddfast.ops import dispatch

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's blocks of code."""
    return re.findall(r"```(python|sh)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def execute(page: str, folder: Path) -> list[str]:
    """All Python of a page, one block after the other, and its commands; returns these.

    Blocks that begin with the name of a file are in that file, all of them, before anything runs.
    """
    files, names, commands = defaultdict(str), {"__name__": page}, []
    for _, code in blocks(page):
        if file := re.match(r"# (\w+\.py)\n", code):
            files[file[1]] += code
    for name, code in files.items():
        (folder / name).write_text(code)
    for language, code in blocks(page):
        if language == "python" and not re.match(r"# \w+\.py\n", code):
            exec(compile(code, page, "exec"), names)
        elif language == "sh":
            commands += code.strip().splitlines()
            for command in code.strip().splitlines():
                name, *arguments = shlex.split(command)
                assert name == "ddfast"
                assert main(arguments) == 0, command
    return commands


@pytest.mark.parametrize("page", ["README.md", "docs/adding-an-op.md"])
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", dict(dispatch.KERNELS))  # a page adds an op, for other tests there is none
    assert any(language == "python" for language, _ in blocks(page))
    assert not execute(page, tmp_path)


def test_a_teacher_of_ones_own_reaches_every_command(tmp_path, monkeypatch, restored_families):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ran = execute("docs/adding-a-teacher.md", tmp_path)
    everything = {"train", "trajectories", "sample", "evaluate", "profile", "convert"}
    assert {command.split()[1] for command in ran} == everything
    assert not (tmp_path / "runs/gru/samples.png").exists()
    assert (tmp_path / "runs/gru-images/samples.png").exists()
    assert "samples.png" not in (tmp_path / "runs/gru/report.md").read_text()
    # A process that was not told to import the module does not, whatever a file says.
    environment = {**os.environ, "PYTHONPATH": str(Path(ddfast.__file__).parents[1])}
    for arguments in (["sample", "--student", "runs/gru"], ["sample", "--student", "shared/gru"]):
        command = [sys.executable, "-m", "ddfast", *arguments, "--format", "codes", "--to", "x"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert "--import" in done.stderr
    told = [*command, "--import", "my_teacher"]
    done = subprocess.run(told, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def restored_families():
    """What a page registers is forgotten."""
    before = dict(families._FAMILIES)
    yield
    families._FAMILIES.clear()
    families._FAMILIES.update(before)
    sys.modules.pop("my_teacher", None)


@pytest.mark.parametrize("module", ["ddfast.ops.nearest_code", "ddfast.ops.noise"])
def test_docstrings(module):
    # importlib: the package's attribute of that name is the function.
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": __import__("torch")})
    assert result.attempted > 0
    assert result.failed == 0


PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Names with dots, and imports, of any block or sentence."""
    text = (ROOT / page).read_text()
    names = set(re.findall(r"(?<![\w.])ddfast(?:\.[a-zA-Z]\w*)+(?![\w/])", text))
    for module, imported in re.findall(r"from (ddfast[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    placeholders = {name for name in names if name.rpartition(".")[2].isupper()}  # ddfast.COMMAND
    for name in sorted(names - placeholders):
        assert found(name), name


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return bool(module) and found(module) and hasattr(resolved(module), attribute)
    return True


def resolved(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError:
        module, _, attribute = name.rpartition(".")
        return getattr(resolved(module), attribute)
