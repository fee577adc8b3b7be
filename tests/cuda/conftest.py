"""The CUDA kernels, compiled by g++ for the emulator."""

import fcntl
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from emulation import Emulator

ROOT = Path(__file__).parents[2]

SANITIZERS = [
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fno-sanitize-recover=all",
]  # fmt: skip
"""The checks whose findings emulator.h makes errors of a launch: it has the functions of their library itself."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulated kernels with")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the processes of this run share: one of them compiles
    path = folder / "emulated.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-DDDFAST_EMULATE", "-U_FORTIFY_SOURCE"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'kernels'}"]
    source = str(ROOT / "tests" / "cuda" / "emulated.cpp")
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = path.with_suffix(".o")
            subprocess.run(["g++", *flags, *SANITIZERS, *warnings, *include, "-c", "-o", str(made), source], check=True)
            # Linked by itself, for with the sanitizers' flags the compiler would add their library.
            linked = path.with_suffix(".tmp")
            subprocess.run(["g++", "-shared", "-Wl,-z,defs", "-o", str(linked), str(made)], check=True)
            linked.rename(path)
    return Emulator(path)


@pytest.fixture
def emulator(library: Emulator, request: pytest.FixtureRequest) -> Emulator:
    """Every test with an order of threads of its own, the same in every run."""
    library.drawn = zlib.crc32(request.node.name.encode()) | 1
    library.configure()
    return library
