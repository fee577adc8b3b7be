"""What `ddfast doctor` says: versions, compiled backends, and which backend each op uses and why.

Needs none of the packages that models and commands do.
"""

from __future__ import annotations

import platform

import torch
import torch.distributed as dist

import ddfast
from ddfast import env
from ddfast.ops import dispatch, findings, native

_PACKAGES = ("torch", "triton", "numpy", "einops", "nvtx", "safetensors")
_STATES = {"CUDA kernels": native.cuda_state, "Triton kernels": native.triton_state}


def diagnosis() -> list[str]:
    """The lines that the command prints; on a GPU, what was never verified is, now."""
    lines = [f"ddfast {ddfast.__version__} in {ddfast.__path__[0]}, Python {platform.python_version()}"]
    lines += [f"{name} {env.package_version(name)}" for name in _PACKAGES]
    lines += ["", f"CPU kernels: {native.cpu_reason}"]
    if native.cpu is not None:
        lines.append(f"  instruction sets: {', '.join(native.cpu.isa_available())}; in use: {native.cpu.isa()}")
        lines.append(f"  threads: {torch.get_num_threads()} (torch.get_num_threads())")
    lines.append(f"CUDA kernels: {native.cuda_reason}")
    if native.cuda is not None:
        lines.append(f"  compiled for: {native.cuda.architectures}")
        if reason := native.left_out("ddfast_cuda"):
            lines.append(f"  left out: {reason}")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        lines += _gpu(index)
    if not gpus:
        lines += ["GPU: PyTorch sees none", *(f"  {name}: {state()[1]}" for name, state in _STATES.items())]
    lines.append(f"several processes: {_transports()}")
    lines += ["", "environment:"]
    values = env.settings()
    lines += [f"  {name}={values[name] or ''}  ({meaning})" for name, meaning in env.VARIABLES.items()]
    lines += ["", "float32 tensors on cpu:", *_choices(torch.device("cpu"), torch.float32)]
    for index in gpus:
        device = torch.device("cuda", index)
        for dtype in (torch.bfloat16, torch.float32):
            lines += ["", f"{str(dtype).removeprefix('torch.')} tensors on GPU {index}:", *_choices(device, dtype)]
        lines += ["", f"found on GPU {index} ({findings.path()}):", *_found(device)]
    if not gpus:
        lines += ["", "float32 tensors on cuda:", *_choices(torch.device("cuda"), torch.float32)]
    return lines


def _gpu(index: int) -> list[str]:
    """Name, kind, and which kernels run there."""
    major, minor = torch.cuda.get_device_capability(index)
    lines = [f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}"]
    lines += [f"  {name}: {state(index)[1]}" for name, state in _STATES.items()]
    if not native.multiplies_matrices(index):
        lines.append("  bfloat16: PyTorch emulates it on this GPU; --dd1.precision float32 and the like are faster")
    return lines


def _transports() -> str:
    """What processes of torchrun would talk by, of what this PyTorch has."""
    if not dist.is_available():
        return "this PyTorch is built without torch.distributed"
    there = {"gloo": dist.is_gloo_available(), "nccl (between GPUs)": dist.is_nccl_available()}
    return ", ".join(name if found else f"no {name}" for name, found in there.items())


def _choices(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Op, backend, verdict and reason, for LlamaGen's dimensions; on a GPU what was never verified is, now."""
    lines = []
    dims = {op: dispatch.usual_dim(op) for op in dispatch.KERNELS}
    dispatch.prepare([(op, dtype, dim) for op, dim in dims.items()], device)
    for op, dim in dims.items():
        try:
            backend, reason, verdict = dispatch.choose(op, device, dtype, dim=dim)
        except ValueError as error:  # DDFAST_BACKEND asks for what cannot run
            backend, reason, verdict = "none", str(error), ""
        lines.append(f"  {op:20s} {backend:10s} {'; '.join(filter(None, (verdict, reason)))}")
    return lines


def _found(device: torch.device) -> list[str]:
    """What was verified and timed with this GPU and these versions, by any process."""
    found = findings.of(device)
    lines = [f"  {name}: {text}" for name, (_, text) in sorted(found["verdicts"].items())]
    for name, timed in sorted(found["orders"].items()):
        times = ", ".join(f"{backend} {1e3 * ms:.1f} us" for backend, ms in timed.get("ms", {}).items())
        lines.append(f"  {name}: {' before '.join(timed['order'])} ({times})")
    return lines or ["  nothing"]
