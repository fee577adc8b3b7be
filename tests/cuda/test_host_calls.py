"""The host's side of a launch, by g++ on a stand-in for CUDA's runtime (stand_in/cuda_runtime_api.h)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CASES = re.findall(r"CASE\((?!name)(\w+)\)", (FOLDER / "host_calls.cpp").read_text())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the program with")
    path = tmp_path_factory.mktemp("host_calls") / "program"
    flags = ["-std=c++17", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER / 'stand_in'}"]
    subprocess.run(["g++", *flags, "-o", str(path), str(FOLDER / "host_calls.cpp")], check=True)
    return path


@pytest.mark.parametrize("case", CASES)
def test_host_calls(program, case):
    done = subprocess.run([program, case], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
