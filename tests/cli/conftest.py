"""Commands run in processes of their own, with a cache of the module's own."""

import os
import subprocess
from pathlib import Path

import pytest
from commands import command


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "DDFAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(environment):
    def call(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, cwd=cwd)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call
