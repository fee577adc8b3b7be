"""The CUDA kernels, compiled by g++ for the emulator."""

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
    path = tmp_path_factory.mktemp("emulator") / "emulated.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-DDDFAST_EMULATE", "-U_FORTIFY_SOURCE"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'kernels'}"]
    source = str(ROOT / "tests" / "cuda" / "emulated.cpp")
    subprocess.run(["g++", *flags, *warnings, *include, "-o", str(path), source], check=True)
    return Emulator(path)


@pytest.fixture
def emulator(library: Emulator) -> Emulator:
    library.configure()
    return library
