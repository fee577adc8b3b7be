"""Builds the native modules with CMake and ninja; everything else about the package is in pyproject.toml.

What an install leaves out, and why, is in left_out.txt beside the kernels, for `ddfast doctor`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip starts this file without it

import setup_cuda  # noqa: E402
from setup_cuda import LeftOut, flag, words  # noqa: E402


class CMakeExtension(Extension):
    """A module that CMake builds: the name is that of the CMake target."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


NATIVE = CMakeExtension("ddfast_native")
CUDA = CMakeExtension("ddfast_cuda")
STRICT = flag(os.environ, "DDFAST_CUDA")


class CMakeBuild(build_ext):
    def run(self) -> None:
        for stale in Path(self.build_lib).glob("ddfast_*"):  # of an earlier build with other modules
            if stale.is_file():
                stale.unlink()
        if self.editable_mode:  # not pip's own folder, which goes: what has not changed is not compiled again
            self.build_temp = str(
                ROOT / "build" / f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            )
        self.left_out: dict[str, str] = {}
        super().run()
        built = [ext.name for ext in self.extensions]
        record(self.left_out, built, None if self.inplace else Path(self.build_lib))

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except LeftOut as reason:
                if STRICT:
                    sys.exit(f"ddfast: DDFAST_CUDA=1 asks for {ext.name}: {reason}")
                self.extensions.remove(ext)
                self.left_out[ext.name] = str(reason)

    def build_extension(self, ext: Extension) -> None:
        if ext is NATIVE:
            if not self.compiled(ext):
                sys.exit(f"ddfast: building {ext.name} failed (messages above); DDFAST_NO_NATIVE=1 installs without it")
            return
        nvcc, plan = setup_cuda.decision(os.environ)
        architectures = ";".join(plan.architectures)
        definitions = (f"-DCMAKE_CUDA_COMPILER={nvcc.path}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        if not self.compiled(ext, nvcc.version, "-DDDFAST_CUDA=ON", *definitions):
            where = "messages above" if STRICT else "`DDFAST_CUDA=1 pip install .` shows where"
            raise LeftOut(f"compiling it by {nvcc} failed ({where}); DDFAST_NO_CUDA=1 does not try")
        if plan.left_out:
            self.left_out[ext.name] = plan.left_out

    def compiled(self, ext: Extension, tools: str = "", *definitions: str) -> bool:
        """Configure and build a target; whether that went well.

        Args:
            tools: what compilers besides C++'s say of themselves; objects of others are not used again.
            definitions: for CMake.
        """
        tools += setup_cuda.output_of([*cxx(), "--version"], os.environ)[1]
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        made_by = build / "made_by.txt"
        if not made_by.exists() or made_by.read_text() != tools:
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            made_by.write_text(tools)
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
            "-DCMAKE_BUILD_TYPE=Release",
            *words(os.environ, "CMAKE_ARGS"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDDFAST_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            *definitions,
        ]
        jobs = setup_cuda.jobs(os.environ, *setup_cuda.resources())
        # Where there are more jobs than files, nvcc compiles for several architectures at once.
        threads = max(1, jobs // len(list(ROOT.glob("kernels/*.cu"))))
        flags = f"--threads={threads} {os.environ.get('NVCC_PREPEND_FLAGS', '')}".strip()
        for command in (configure, [cmake, "--build", str(build), "--target", ext.name, "--parallel", str(jobs)]):
            if subprocess.run(command, env={**os.environ, "NVCC_PREPEND_FLAGS": flags}).returncode != 0:
                return False
        # A copy that an editable install left in the source folder would shadow this module there: keep it the same.
        in_place = ROOT / Path(self.get_ext_filename(ext.name)).name
        if in_place.exists() and in_place.resolve() != (output / in_place.name):
            in_place.unlink()  # not overwritten: a process that runs keeps the one it has
            shutil.copyfile(output / in_place.name, in_place)
        return True


class PythonBuild(build_py):
    """Says of an install without native modules what it leaves out, as `CMakeBuild` does of others."""

    def run(self) -> None:
        super().run()
        if not self.distribution.has_ext_modules():
            reason = "DDFAST_NO_NATIVE=1 was set; without it `pip install .` builds the module"
            left_out = {ext.name: reason for ext in (NATIVE, CUDA)}
            record(left_out, [], None if self.editable_mode else Path(self.build_lib))


def record(left_out: dict[str, str], built: list[str], build_lib: Path | None) -> None:
    """Say what is left out, why and what to do, here and in the folder of the kernels.

    Args:
        left_out: a line for each module that is not whole.
        built: those that are there.
        build_lib: what will be installed; None: the source folder, from which other modules of an earlier install go.
    """
    lines = [f"{name}: {reason}" for name, reason in left_out.items()]
    if build_lib is None:
        lines = [line.replace("pip install .", "pip install -e .") for line in lines]
        for ext in (NATIVE, CUDA):
            if ext.name not in built:
                (ROOT / f"{ext.name}{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    for line in lines:
        print(f"ddfast: left out: {line}", file=sys.stderr)
    folder = ROOT / "kernels" if build_lib is None else build_lib / "ddfast_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "left_out.txt").write_text("".join(f"{line}\n" for line in lines))


def cxx() -> list[str]:
    """The command of the C++ compiler, as CMake finds it."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not os.environ.get("CXX") and found is None:
        sys.exit(
            "ddfast: no C++ compiler found; install g++ or clang++ "
            "(Debian, Ubuntu: apt-get install g++), or set DDFAST_NO_NATIVE=1 to install without the native kernels"
        )
    return words(os.environ, "CXX") or [str(found)]


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
    ext_modules=[] if flag(os.environ, "DDFAST_NO_NATIVE") else [NATIVE, CUDA],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
)
