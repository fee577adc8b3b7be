"""Builds the native module with CMake and ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class CMakeExtension(Extension):
    """A module that CMake builds: the name is that of the CMake target."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            sys.exit(
                "ddfast: no C++ compiler found; install g++ or clang++ "
                "(Debian, Ubuntu: apt-get install g++), or set DDFAST_NO_NATIVE=1 to install without the native kernels"
            )
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDDFAST_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        for command in (configure, [cmake, "--build", str(build), "--target", ext.name]):
            if subprocess.run(command).returncode != 0:
                sys.exit(f"ddfast: building {ext.name} failed (messages above): {' '.join(command)}")


def tool(name: str) -> str:
    """cmake and ninja of the build environment (their Python packages), else those of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"ddfast: {name} not found; install it (pip install {name}), or set DDFAST_NO_NATIVE=1")
    return found


setup(
    ext_modules=[] if flag("DDFAST_NO_NATIVE") else [CMakeExtension("ddfast_native")],
    cmdclass={"build_ext": CMakeBuild},
)
