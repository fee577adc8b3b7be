"""`ddfast doctor`: versions, compiled backends, and which backend each op uses and why."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

import ddfast
from ddfast import cli, env
from ddfast.errors import DDFastError
from ddfast.ops import dispatch, native
from ddfast.ops.measured import FASTEST

_PACKAGES = ("torch", "triton", "numpy", "einops", "nvtx", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. `--check` fails where the CPU kernels are missing."""

    def body(rest: list[str]) -> None:
        if rest in (["--help"], ["-h"]):
            print("usage: ddfast doctor [--check]\n\n--check: exit with an error where the CPU kernels are missing")
            return
        unknown = [argument for argument in rest if argument != "--check"]
        if unknown:
            raise DDFastError(f"unknown option {unknown[0]!r}; known: --check")
        print("\n".join(diagnosis()))
        if "--check" in rest and native.cpu is None:
            raise DDFastError(native.cpu_reason)

    return cli.run("doctor", body, arguments)


def diagnosis() -> list[str]:
    """The lines that the command prints."""
    lines = [f"ddfast {ddfast.__version__} in {ddfast.__path__[0]}, Python {platform.python_version()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines += ["", f"CPU kernels: {native.cpu_reason}"]
    if native.cpu is not None:
        lines.append(f"  instruction sets: {', '.join(native.cpu.isa_available())}; in use: {native.cpu.isa()}")
        lines.append(f"  threads: {torch.get_num_threads()} (torch.get_num_threads())")
    lines.append(f"Triton kernels: {native.triton_state()[1]}")
    lines.append(f"CUDA kernels: {native.cuda_reason}")
    if native.cuda is not None:
        lines.append(f"  compiled for: {native.cuda.architectures}")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    if not gpus:
        lines.append("GPU: PyTorch sees none")
    lines += ["", "environment:"]
    values = env.settings()
    lines += [f"  {name}={values[name] or ''}  ({meaning})" for name, meaning in env.VARIABLES.items()]
    for device in ("cpu", "cuda"):
        lines += ["", f"float32 tensors on {device}:"]
        for op in dispatch.KERNELS:
            backend, reason = dispatch.choose(op, device, torch.float32)
            lines.append(f"  {op:20s} {backend:10s} {reason}")
            measured = FASTEST.get(op, {}) if device == "cuda" else {}
            lines += [f"  {'':20s} {name:10s} with about {rows} rows" for rows, name in measured.items()]
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
