"""Builds the native module with CMake and ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class CMakeExtension(Extension):
    """A module that CMake builds: the name is that of the CMake target."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        for stale in Path(self.build_lib).glob("ddfast_*"):  # of an earlier build with other modules
            if stale.is_file():
                stale.unlink()
        super().run()

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
        # The cache names tools of the last build environment, which may be gone; objects are still reused without it.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
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
            f"-DDDFAST_CUDA={'ON' if ext.name == 'ddfast_cuda' else 'OFF'}",
        ]
        if ext.name == "ddfast_cuda":
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
        for command in (configure, [cmake, "--build", str(build), "--target", ext.name]):
            if subprocess.run(command).returncode != 0:
                without = "DDFAST_NO_CUDA=1" if ext.name == "ddfast_cuda" else "DDFAST_NO_NATIVE=1"
                sys.exit(f"ddfast: building {ext.name} failed (messages above); {without} installs without it")
        # A copy that an editable install left in the source folder would shadow this module there: keep it the same.
        in_place = ROOT / Path(self.get_ext_filename(ext.name)).name
        if in_place.exists() and in_place.resolve() != (output / in_place.name):
            in_place.unlink()  # not overwritten: a process that runs keeps the one it has
            shutil.copyfile(output / in_place.name, in_place)


def nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, on the path, or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def modules() -> list[Extension]:
    if flag("DDFAST_NO_NATIVE"):
        return []
    cuda = nvcc() is not None and not flag("DDFAST_NO_CUDA")
    return [CMakeExtension("ddfast_native")] + ([CMakeExtension("ddfast_cuda")] if cuda else [])


def tool(name: str) -> str:
    """cmake and ninja of the build environment (their Python packages), else those of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"ddfast: {name} not found; install it (pip install {name}), or set DDFAST_NO_NATIVE=1")
    return found


setup(
    packages=[*find_packages(include=["ddfast", "ddfast.*"]), "ddfast_kernels"],
    package_dir={"ddfast_kernels": "kernels"},
    ext_modules=modules(),
    cmdclass={"build_ext": CMakeBuild},
)
