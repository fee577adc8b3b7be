"""Which backend runs an op, and why: a pure function of what is asked, what is installed and what was measured."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ddfast import env
from ddfast.ops import native
from ddfast.ops.measured import FASTEST

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

KERNELS: dict[str, tuple[str, ...]] = {
    "nearest_code": ("cpu", "cuda", "triton"),
    "filter_logits": ("cpu", "cuda", "triton"),
    "codebook_posterior": ("cpu", "cuda", "triton"),
    "flow_sample": ("cpu", "cuda", "triton"),
    "sample_codes": ("cpu", "cuda", "triton"),
    "draw_codes": ("cpu", "triton"),
    "decode_attention": ("cpu", "triton"),
    "add_norm": ("triton",),
    "norm_linear": ("triton",),
    "append_normed": ("triton",),
    "activate": ("cpu", "triton"),
    "noise": ("cpu", "cuda", "triton"),
}
"""Backends that have a kernel for each op, beside the reference that every op has."""

DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


class Choice(NamedTuple):
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


def available() -> dict[str, str]:
    """Backends that can run here, with a line that says what they are; a missing one is in `missing()`."""
    states = _states().items()
    return {"reference": f"PyTorch {torch.__version__}"} | {name: line for name, (usable, line) in states if usable}


def missing() -> dict[str, str]:
    """Backends that cannot run here, with the reason."""
    return {name: line for name, (usable, line) in _states().items() if not usable}


def _states() -> dict[str, tuple[bool, str]]:
    """Of every backend with kernels: whether it can run here, and what it is or why it cannot."""
    cpu = (native.cpu is not None, native.cpu_reason)
    return {"cpu": cpu, "cuda": native.cuda_state(), "triton": native.triton_state()}


def choose(op: str, device: str, dtype: torch.dtype, backend: str = "auto", rows: int = 1) -> Choice:
    """The backend that runs `op` on tensors of this device and dtype.

    Args:
        op: name of the op, a key of `KERNELS`.
        device: device type, such as "cpu".
        dtype: the widest floating dtype among the inputs.
        backend: "auto", or the one that must run.
        rows: tokens, vectors or samples: on a GPU decides between kernels, as measured.

    Raises:
        ValueError: `backend` is unknown, or asked for by name and cannot run these inputs. There is no silent fallback.
    """
    if backend == "auto":
        overrides = env.backend_overrides()
        backend = overrides.get(op, overrides.get("*", "auto"))
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return Choice("reference", "asked for by name")
    if backend != "auto":
        obstacle = _obstacle(op, backend, device, dtype)
        if obstacle:
            raise ValueError(f"backend: {backend!r} cannot run {op}: {obstacle}; use backend='auto' or 'reference'")
        return Choice(backend, "asked for by name")
    candidates = [candidate for candidate in KERNELS[op] if DEVICE_OF[candidate] == device]
    reason = f"fastest kernel for {device} tensors"
    measured = FASTEST.get(op, {})
    if device == "cuda" and measured:
        nearest = min(measured, key=lambda count: abs(math.log(max(rows, 1) / count)))
        candidates.sort(key=lambda candidate: candidate != measured[nearest])  # stable: the others as they were
        reason = f"fastest of those measured with {nearest} rows"
        if measured[nearest] == "reference":
            return Choice("reference", reason)
    obstacles = []
    for candidate in candidates:
        obstacle = _obstacle(op, candidate, device, dtype)
        if not obstacle and device == "cuda" and not measured:
            obstacle = f"never timed on a GPU, so only backend='{candidate}' or DDFAST_BACKEND={candidate} runs it"
        if not obstacle:
            return Choice(candidate, reason)
        obstacles.append(f"{candidate}: {obstacle}")
    return Choice("reference", "; ".join(obstacles) or f"this version has no kernel for {device} tensors")


def _obstacle(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why `backend` cannot run, or an empty string."""
    if backend not in KERNELS[op]:
        return f"this version of ddfast has no {backend} kernel for it"
    if device != DEVICE_OF[backend] and not (backend == "triton" and env.triton_interpreted()):
        return f"the tensors are on {device}, it needs {DEVICE_OF[backend]}"
    if dtype not in native.DTYPE_CODES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    return missing().get(backend, "")
