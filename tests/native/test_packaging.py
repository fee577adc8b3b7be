"""What `pip install .` does without a compiler, and what a pure wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "runs", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def test_without_a_compiler_one_line_says_what_to_do(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "DDFAST_NO_NATIVE")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=source, env=environment | {"PATH": str(tmp_path / "empty")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ddfast: no C++ compiler found; install g++ or clang++ (Debian, Ubuntu: apt-get install g++), "
        "or set DDFAST_NO_NATIVE=1 to install without the native kernels"
    )


def test_pure_wheel(source: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=source, env=os.environ | {"DDFAST_NO_NATIVE": "1"}, check=True,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ddfast/py.typed", "ddfast/page.html"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ddfast", "ddfast_kernels"}
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h", ".cu"))]


def test_two_architectures_in_one_module_are_refused(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path)],
        env=os.environ | {"ARCHFLAGS": "-arch arm64 -arch x86_64"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "asked for arm64;x86_64 in one module; build for one at a time" in " ".join(done.stderr.split())
