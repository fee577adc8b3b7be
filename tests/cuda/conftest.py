"""The CUDA kernels, compiled by g++ for the emulator."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import Emulator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulated kernels with")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the processes of this run share: one of them compiles
    path = folder / "emulated.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-DDDFAST_EMULATE", "-U_FORTIFY_SOURCE"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'kernels'}"]
    source = str(ROOT / "tests" / "cuda" / "emulated.cpp")
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = path.with_suffix(".tmp")
            subprocess.run(["g++", *flags, *warnings, *include, "-o", str(made), source], check=True)
            made.rename(path)
    return Emulator(path)


@pytest.fixture
def emulator(library: Emulator) -> Emulator:
    library.configure()
    return library
