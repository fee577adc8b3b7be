"""What every test of faults starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import injection
import pytest
from operations import Undisturbed


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("needs a C compiler")
    with injection.server(tmp_path_factory.mktemp("injector")) as running:
        yield running


@pytest.fixture(scope="session")
def base(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    ended = server.run("operations:prepare", folder, below=folder)
    assert ended.code == 0, ended.errors
    return folder


@pytest.fixture(scope="session")
def undisturbed(server, base, tmp_path_factory) -> Undisturbed:
    return Undisturbed(server, base, tmp_path_factory.mktemp("undisturbed"))
