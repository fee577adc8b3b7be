"""ddfast_native built under AddressSanitizer and UndefinedBehaviorSanitizer, and the environment that it runs in.

`python tests/fuzz/sanitized.py FOLDER` builds it there and prints the environment; then for example

    env $(python tests/fuzz/sanitized.py build/sanitized) python -m pytest tests/native
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# pybind11 belongs to the environment of a build, which is gone; PyTorch brings its headers.
_PYBIND11 = """
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
function(pybind11_add_module name)
  list(REMOVE_ITEM ARGN NO_EXTRAS)
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE "@INCLUDE@")
  target_link_libraries(${name} PRIVATE Python::Module)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX "@SUFFIX@")
endfunction()
"""


def missing() -> str:
    """Why it cannot be built here, or an empty string."""
    if not sys.platform.startswith("linux"):
        return "the sanitizers are loaded before Python in Linux's way"
    for program in ("cmake", "ninja", "g++"):
        if shutil.which(program) is None:
            return f"no {program}"
    absent = [library for library in ("libasan.so", "libubsan.so") if _library(library) is None]
    return f"g++ has no {' and no '.join(absent)}" if absent else ""


@functools.cache
def _library(name: str) -> str | None:
    """Path of a library of the compiler's, which tells its own name where it has none."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = done.stdout.strip()
    return path if os.path.isabs(path) and Path(path).exists() else None


def build(folder: Path, jobs: int = 1) -> None:
    """Compile the module into a folder; what has not changed since is not compiled again."""
    import torch

    package = folder / "pybind11"
    package.mkdir(parents=True, exist_ok=True)
    text = _PYBIND11.replace("@INCLUDE@", str(Path(torch.__file__).parent / "include"))
    text = text.replace("@SUFFIX@", sysconfig.get_config_var("EXT_SUFFIX"))
    config = package / "pybind11Config.cmake"
    if not config.exists() or config.read_text() != text:
        config.write_text(text)
        version = 'set(PACKAGE_VERSION_COMPATIBLE TRUE)\nset(PACKAGE_VERSION "3.0")\n'
        (package / "pybind11ConfigVersion.cmake").write_text(version)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DDDFAST_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++",
        f"-Dpybind11_DIR={package}", f"-DPython_EXECUTABLE={sys.executable}", "-DDDFAST_VERSION=0+sanitized",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "--target", "ddfast_native", "--parallel", str(jobs)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def environment(folder: Path) -> dict[str, str]:
    """What a process that is to use the module of a folder needs beside its own environment.

    Leaks are not looked for: Python and PyTorch keep what they have to the end.
    """
    libraries = [path for name in ("libasan.so", "libubsan.so", "libstdc++.so") if (path := _library(name))]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    if missing():
        sys.exit(f"sanitized: {missing()}")
    build(Path(sys.argv[1]).resolve())
    print(" ".join(f"{name}={value}" for name, value in environment(Path(sys.argv[1]).resolve()).items()))
