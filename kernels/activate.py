"""activate in Triton: x sigmoid(r), times a second tensor, where r is x for SiLU and for GELU

    2 sqrt(2 / pi) (x + 0.044715 x^3),    since (1 + tanh(y)) / 2 = sigmoid(2 y).

Bytes: every element of the inputs in and of the result out, which bind; an exponential and a division each. A program
has a piece of one row: SwiGLU's two inputs are the halves of one product's rows.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from ddfast_kernels.launch import FUSED, current_device, dependent_launch, wait_for_previous
from torch import Tensor

_SILU = tl.constexpr(math.log2(math.e))
_GELU = tl.constexpr(2 * math.sqrt(2 / math.pi) * math.log2(math.e))
"""The linear term of r for either kind, times log2(e): the exponential is one of 2."""

_ELEMENTS = 1024
"""Of a program: 16 bytes of bf16 for every thread of its four warps."""


@triton.jit
def activated(x, GELU: tl.constexpr):
    """gelu(x) or silu(x), in float32."""
    if GELU:
        fall = x * (-_GELU - _GELU * 0.044715 * x * x)
    else:
        fall = x * -_SILU
    return x / (1.0 + tl.exp2(fall))


@triton.jit
def activate_kernel(
    x_ptr, times_ptr, out_ptr, x_stride, times_stride, width,
    GELU: tl.constexpr, TIMES: tl.constexpr, ELEMENTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    pieces = (width - 1) // ELEMENTS + 1  # as tl.cdiv, whose sum would pass 31 bits
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = (tl.program_id(0) % pieces).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < width
    x = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    if TIMES:
        times = tl.load(times_ptr + row * times_stride + i, mask=mask, other=0.0).to(tl.float32)
    y = activated(x, GELU)
    if TIMES:
        y *= times
    tl.store(out_ptr + row * width + i, y, mask=mask)


def activate(x: Tensor, times: Tensor | None, out: Tensor, kind: str) -> None:
    """gelu(x) or silu(x), times `times` where it is given, into a contiguous out; x and times [rows, width]."""
    rows, width = x.shape
    times_stride = 0 if times is None else times.stride(0)
    with current_device(x):
        activate_kernel[(rows * triton.cdiv(width, _ELEMENTS),)](
            x, x if times is None else times, out, x.stride(0), times_stride, width,
            GELU=kind == "gelu", TIMES=times is not None, ELEMENTS=_ELEMENTS,
            **dependent_launch(x), **FUSED,
        )  # fmt: skip
