"""What the launches share."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this is imported), on tensors of any device."""

FUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
UNFUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
"""Whether a product and a sum may round once; Triton's own default is about to change."""


def current_device(tensor: Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing for another tensor."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; an H200's where there is none."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def capability(tensor: Tensor) -> int:
    """Of the tensor's GPU, 90 for 9.0; an H200's where there is none."""
    return _capability(tensor.device) if tensor.is_cuda else 90


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Programmatic dependent launch: a kernel begins while the one before it in the stream still runs, and waits on the
# device until that has ended and its writes are visible. Its beginning is then hidden, and what it can do before the
# wait. Why that is safe here:
# - Before `wait_for_previous` no kernel reads or writes: `prefetch` moves lines into the L2 cache, where every later
#   write goes as well. So a kernel may follow any other, one that has just written its weights too.
# - Every program waits, always. A kernel therefore ends after the one before it, and waiting for that one is waiting
#   for all before, though it let the next one begin at once.
# - The attribute is of the kernel that begins early: one launched without it (cuBLAS, a copy) begins when everything
#   before has ended. After one that lets nobody begin early, the wait is for its end, as without.
# - A CUDA graph captures such a launch as an edge of this kind, and replays the same order; its first kernel begins
#   when the graph does.

_KNOWS_DEPENDENT_LAUNCHES = (
    not INTERPRETED
    and hasattr(tl.extra.cuda, "gdc_wait")
    and "launch_pdl" in importlib.import_module("triton.backends.nvidia.compiler").CUDAOptions.__dataclass_fields__
)


_DRIVER_OF_EDGES = 12030
"""CUDA of the first driver that captures such launches into graphs."""


@functools.cache
def _driver() -> int:
    """CUDA's version of the driver, 12030 for 12.3; 0 where there is none."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def dependent_launch(tensor: Tensor) -> dict[str, Any]:
    """A launch's arguments that let it begin before the kernel in front of it has ended, on GPUs that can (sm_90 on).

    The kernel has a parameter DEPENDENT, and calls `wait_for_previous` with it before it reads or writes.
    """
    if _KNOWS_DEPENDENT_LAUNCHES and capability(tensor) >= 90 and _driver() >= _DRIVER_OF_EDGES:
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Let the next kernel begin, and wait until the one before has ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(matrix_ptr, first, end, width: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for rows first .. first + ROWS - 1, below `end`, of a matrix [end, width] into the L2 cache (sm_90).

    Rows are of whole 16 bytes, and begin at multiples; a thread asks for each.
    """
    row = first + tl.arange(0, THREADS)
    asked = (row < first + ROWS) & (row < end)
    size: tl.constexpr = width * matrix_ptr.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r", [matrix_ptr + row.to(tl.int64) * width, asked.to(tl.int32), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
