"""The kernels' modules: found or not, and why not. Importing this file never fails."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from ddfast import env

ABI = 5
"""Version of the calling convention between this package and its native modules, which CMakeLists.txt reads here."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the native modules name the element type of logits."""


def left_out(name: str) -> str:
    """What the install left out of a native module or instead of it, why, and what to do; empty: nothing."""
    kernels = importlib.util.find_spec("ddfast_kernels")  # setup.py writes it there
    for folder in (kernels.submodule_search_locations or ()) if kernels else ():
        with contextlib.suppress(OSError):
            lines = Path(folder, "left_out.txt").read_text().splitlines()
            return next((line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")), "")
    return ""


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name == name and (reason := left_out(name)):
            return None, f"{name} was left out of this install: {reason}"
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


def cuda_state(device: int | None = None) -> tuple[bool, str]:
    """Whether the CUDA kernels can run on a GPU (None: the current one), and a line that says so or what to do."""
    return _cuda_state(_current() if device is None else device)


def triton_state(device: int | None = None) -> tuple[bool, str]:
    """The same of the Triton kernels; Triton itself is loaded by `triton` only."""
    return _triton_state(_current() if device is None else device)


def _current() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


@functools.cache
def _cuda_state(device: int) -> tuple[bool, str]:
    if cuda is None:
        return False, cuda_reason
    obstacle = _no_gpu(device) or _too_old(device, "CUDA")
    if not obstacle:
        try:
            cuda.check_device(device)
        except RuntimeError as error:
            obstacle = _remedy(device, str(error))
    return not obstacle, obstacle or cuda_reason


@functools.cache
def _triton_state(device: int) -> tuple[bool, str]:
    for name, remedy in (("triton", "pip install triton"), ("ddfast_kernels", "pip install .")):
        if importlib.util.find_spec(name) is None:
            return False, f"{name} is not installed; run `{remedy}`"
    if env.triton_interpreted():
        return True, "ddfast_kernels, in Triton's interpreter"
    obstacle = _no_gpu(device) or _too_old(device, "Triton") or _no_compiler() or _no_assembler(device)
    return not obstacle, obstacle or "ddfast_kernels"


def _no_gpu(device: int) -> str:
    """Why PyTorch has no GPU for any kernel, or an empty string."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, the kernels are for NVIDIA's GPUs"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; for a GPU, install a build of PyTorch with it"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; if there is one, `nvidia-smi` says whether its driver works"
    return pytorch_obstacle(device)


def pytorch_obstacle(device: int) -> str:
    """Why this PyTorch itself runs nothing on a GPU, or an empty string: it may have no code for old ones."""
    major, minor = torch.cuda.get_device_capability(device)
    codes = torch.cuda.get_arch_list()
    known = [(kind, divmod(int("".join(filter(str.isdigit, number))), 10))
             for kind, _, number in (code.partition("_") for code in codes)]  # fmt: skip
    fits = (code[0] == major and code[1] <= minor if kind == "sm" else code <= (major, minor) for kind, code in known)
    if not known or any(fits):
        return ""
    return (
        f"PyTorch {torch.__version__} has no code for this GPU, sm_{major}{minor}, only for {', '.join(codes)}: "
        "install a build of PyTorch for an older CUDA, such as 12.6"
    )


LEAST = {"CUDA": 8, "Triton": 7}
"""Compute capability that kernels need: asynchronous copies and tensor cores for bf16 and TF32; shuffles by `.sync`."""


def _too_old(device: int, kind: str) -> str:
    """Why kernels of a kind cannot run on this GPU, whatever is done, or an empty string."""
    major, minor = torch.cuda.get_device_capability(device)
    if major >= LEAST[kind]:
        return ""
    return f"the {kind} kernels need a GPU of compute capability {LEAST[kind]}.0 or more, this one has {major}.{minor}"


def multiplies_matrices(device: int | None) -> bool:
    """Whether a GPU (None: the current one) has tensor cores for bf16 and TF32."""
    return torch.cuda.get_device_capability(_current() if device is None else device)[0] >= 8


def _no_assembler(device: int) -> str:
    """Why this Triton makes no code for an old GPU, or an empty string, also where it cannot be asked.

    CUDA leaves out old GPUs from time to time, and Triton brings an assembler of CUDA's.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major >= LEAST["CUDA"]:
        return ""
    command = [
        env.triton_assembler() or _own_assembler(),
        f"--gpu-name=sm_{major}{minor}",
        os.devnull,
        "-o",
        os.devnull,
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
        if "is not defined" in done.stderr:  # what it knows it assembles, and finds the file empty
            return f"this Triton has no assembler for sm_{major}{minor}, an older one may: the reference runs"
    return ""


def _own_assembler() -> str:
    """Path of the assembler in Triton's wheel."""
    found = importlib.util.find_spec("triton")
    origin = getattr(found, "origin", None) or ""
    return str(Path(origin).parent / "backends" / "nvidia" / "bin" / "ptxas")


def _no_compiler() -> str:
    """Why Triton could not build the C code of its launches, or an empty string."""
    if env.c_compiler() is None:
        return "Triton finds no C compiler; install gcc (Debian, Ubuntu: apt-get install gcc) or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for them
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Triton finds no Python.h; install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
    return ""


def _remedy(device: int, error: str) -> str:
    """What keeps the CUDA kernels from running, in words of the user's; `error` has CUDA's name for it."""
    assert cuda is not None
    major, minor = torch.cuda.get_device_capability(device)
    build = "`CUDAARCHS=native pip install .`"  # Hopper's kind is 90a
    if "cudaErrorInsufficientDriver" in error:
        built, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in (cuda.runtime_version, cuda.driver_version()))
        fitting = f"`pip install .` with the nvcc of a CUDA {driver.split('.')[0]}"
        return f"ddfast_cuda is built with CUDA {built}, the driver is of {driver}: update the driver, or {fitting}"
    if "cudaErrorUnsupportedPtxVersion" in error:
        return f"the GPU's driver cannot translate the code of ddfast_cuda: update the driver, or run {build}"
    if "cudaErrorNoKernelImageForDevice" in error:
        return f"ddfast_cuda has no code for sm_{major}{minor}, it is built for {cuda.architectures}: run {build}"
    return f"ddfast_cuda: {error}"


@functools.cache
def triton(op: str) -> ModuleType:
    """The module of an op's Triton kernels, compiled when they are first launched."""
    return importlib.import_module(f"ddfast_kernels.{op}")


def tile_remarks() -> list[str]:
    """What the Triton kernels that this process has launched tell of their tiles: which spill registers here."""
    tiles = sys.modules.get("ddfast_kernels.tiles")
    return [] if tiles is None else list(tiles.remarks())
