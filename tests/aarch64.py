"""The CPU kernels of 64-bit ARM, in an emulator on another processor.

`tests/native/kernel_calls.cpp` is cross-compiled with them, without Python, and QEMU runs it: it reads calls, with
their arrays, and answers with what the kernels made of these.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user", "cmake": "cmake"}
ISAS = ["neon", "baseline"]
NATIVE = platform.machine().lower() in ("aarch64", "arm64")
"""Whether this is such a processor itself: then nothing has to be emulated."""


def missing() -> str:
    """Which tool there is not, and how to get it; empty where all are there."""
    for tool, package in PACKAGES.items():
        if shutil.which(tool) is None:
            return f"no {tool} (Debian, Ubuntu: apt-get install {package})"
    return ""


def build(folder: Path) -> Path:
    """The program, by the flags of CMakeLists.txt."""
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": "-Werror",
        "CMAKE_EXE_LINKER_FLAGS": "-static",  # QEMU then needs no libraries of the other processor's
        "DDFAST_PROGRAM": "ON",
    }
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *flags]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "kernel_calls", "--parallel", "2"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    return folder / "kernel_calls"


class Machine:
    """The kernels of one instruction set, with the arguments of ddfast_native's but that arrays stand for addresses."""

    def __init__(self, program: Path, isa: str) -> None:
        self.process = subprocess.Popen(
            [EMULATOR, str(program), isa], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def call(self, name: str, *arguments: np.ndarray | float | None) -> int:
        """The status; arrays hold what the kernel left in them."""
        parts = [struct.pack("=q", len(name)), name.encode(), struct.pack("=q", len(arguments))]
        arrays = []
        for argument in arguments:
            if argument is None:
                parts.append(struct.pack("=cq", b"a", -1))
            elif isinstance(argument, np.ndarray):
                arrays.append((argument, _span(argument)))
                contents = ctypes.string_at(argument.ctypes.data, arrays[-1][1])
                parts += [struct.pack("=cq", b"a", len(contents)), contents]
            elif isinstance(argument, float):
                parts.append(struct.pack("=cd", b"d", argument))
            else:
                parts.append(struct.pack("=cQ", b"i", int(argument) % 2**64))
        try:
            self.process.stdin.write(b"".join(parts))
            self.process.stdin.flush()
            (status,) = struct.unpack("=q", self._read(8))
            for array, count in arrays:
                contents = self._read(count)
                if array.flags.writeable:
                    ctypes.memmove(array.ctypes.data, contents, count)
        except (EOFError, BrokenPipeError):
            _, said = self.process.communicate()
            raise RuntimeError(f"{name}: the program ended, {self.process.returncode}: {said.decode()}") from None
        return status

    def _read(self, count: int) -> bytes:
        contents = self.process.stdout.read(count)
        if len(contents) < count:
            raise EOFError
        return contents

    def close(self) -> None:
        self.process.communicate()


def _span(array: np.ndarray) -> int:
    """Bytes from the array's first element to the end of its last."""
    if array.size == 0:
        return 0
    assert min(array.strides, default=0) >= 0
    return sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
