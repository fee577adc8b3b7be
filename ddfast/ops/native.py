"""The kernels' modules: found or not, and why not. Importing this file never fails."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from ddfast import env

ABI = 4
"""Version of the calling convention between this package and its native modules."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the native modules name the element type of logits."""


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"{name} is not installed ({error}); run `pip install .` with a C++ compiler at hand"
    if getattr(module, "abi", None) != ABI:
        return None, f"{name} was built for another version of ddfast; run `pip install .` again"
    return module, f"{name} {module.version}"


def _load_cpu() -> tuple[ModuleType | None, str]:
    module, reason = _load("ddfast_native")
    if module is None:
        return None, reason
    isa = env.isa()
    if isa is not None:
        try:
            module.set_isa(isa)
        except ValueError as error:
            return None, f"DDFAST_ISA={isa}: {error}"
    threads = "threads of its own"
    address = _gomp_parallel()
    if address:
        module.use_openmp(address)
        threads = "PyTorch's threads"
    return module, f"{reason}, {module.isa()}, {threads}"


def _gomp_parallel() -> int:
    """Address by which work is given to PyTorch's OpenMP threads, if PyTorch brings GNU's runtime; else 0.

    A second set of threads would wait for the cores on which PyTorch's spin after each job of its own: on two cores, a
    call of 20 us then takes 80.
    """
    package = Path(torch.__file__).parent
    for library in (*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")):
        try:
            function = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


cpu, cpu_reason = _load_cpu()
cuda, cuda_reason = _load("ddfast_cuda")


@functools.cache
def cuda_state() -> tuple[bool, str]:
    """Whether the CUDA kernels can run, and a line that says so."""
    if cuda is not None and not torch.cuda.is_available():
        return False, "PyTorch sees no GPU"
    return cuda is not None, cuda_reason


@functools.cache
def triton_state() -> tuple[bool, str]:
    """Whether the Triton kernels can run, and a line that says so; Triton itself is loaded by `triton` only."""
    for name, remedy in (("triton", "pip install triton"), ("ddfast_kernels", "pip install .")):
        if importlib.util.find_spec(name) is None:
            return False, f"{name} is not installed; run `{remedy}`"
    if env.triton_interpreted():
        return True, "ddfast_kernels, in Triton's interpreter"
    if not torch.cuda.is_available():
        return False, "PyTorch sees no GPU"
    return True, "ddfast_kernels"


@functools.cache
def triton(op: str) -> ModuleType:
    """The module of an op's Triton kernels, compiled when they are first launched."""
    return importlib.import_module(f"ddfast_kernels.{op}")
