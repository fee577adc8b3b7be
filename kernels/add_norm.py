"""add_norm in Triton: the residual sum that a layer leaves, and its norm, in one pass.

    total = x + gate * branch,  normed = norm(total) * weight + bias

A program has some positions of one row, and holds them in registers between the sum and what is written; the vectors of
that row are read once for all of them. Everything is asked for before anything waits for a sum.
Bytes: x and branch in, total and normed out, which bind; of few rows the latency of one read and two sums does.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from ddfast_kernels.launch import FUSED, current_device, dependent_launch, multiprocessors, wait_for_previous
from torch import Tensor


class Cut(NamedTuple):
    """Positions and warps of a program."""

    tile: int
    num_warps: int


def cut(positions: int, row: int, width: int, processors: int) -> Cut:
    """For so many positions in all, `row` of them with the same vectors.

    A thread takes 16 bytes of bf16 of a position, and of up to four positions where that leaves every multiprocessor
    four programs.
    """
    padded = triton.next_power_of_2(width)
    most = max(1, min(4096 // padded, row, positions // (4 * processors)))
    tile = 1 << (most.bit_length() - 1)
    return Cut(tile, max(1, min(32, max(padded // 256, tile * padded // 1024))))


@triton.jit
def loaded(ptr, mask):
    """In float32, 0 outside of the mask."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def summed(x, branch, gate, rounded: tl.constexpr):
    """x + gate * branch in float32, as a tensor of type `rounded` holds it.

    What the next layer adds to is what is normalised.
    """
    if branch is not None:
        x += branch if gate is None else branch * gate
        x = x.to(rounded).to(tl.float32)
    return x


@triton.jit
def statistics(total, mask, eps, RMS: tl.constexpr, width: tl.constexpr):
    """Mean (0 with RMS) and reciprocal deviation of rows [rows, WIDTH], as [rows, 1]."""
    mean = tl.zeros([total.shape[0], 1], tl.float32)
    if not RMS:
        mean = tl.sum(total, axis=1, keep_dims=True) / width
        total = tl.where(mask, total - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(total * total, axis=1, keep_dims=True) / width + eps)


@triton.jit
def normalised(total, mean, inverse, weight, bias, rounded: tl.constexpr, RMS: tl.constexpr):
    """By these statistics, in float32."""
    if RMS:  # as LlamaGen casts it back before its weight
        total = (total * inverse).to(rounded).to(tl.float32)
    else:
        total = (total - mean) * inverse
    if weight is not None:
        total *= weight
    if bias is not None:
        total += bias
    return total


@triton.jit(do_not_specialize=["length"])
def add_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, gate_stride, weight_stride, bias_stride,
    length, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    width: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    tiles = tl.cdiv(length, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    mask = (position < length) & (j < width)
    place = (row * length + position) * width + j

    rounded: tl.constexpr = x_ptr.dtype.element_ty
    x = loaded(x_ptr + place, mask)
    branch = loaded(branch_ptr + place, mask) if BRANCH else None
    gate = loaded(gate_ptr + row * gate_stride + j, j < width) if GATE else None
    weight = loaded(weight_ptr + row * weight_stride + j, j < width) if WEIGHT else None
    bias = loaded(bias_ptr + row * bias_stride + j, j < width) if BIAS else None
    total = summed(x, branch, gate, rounded)
    if BRANCH:
        tl.store(total_ptr + place, total, mask=mask)
    mean, inverse = statistics(total, mask, eps, RMS, width)
    normed = normalised(total, mean, inverse, weight, bias, rounded, RMS)
    tl.store(normed_ptr + place, normed, mask=mask)


def add_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    rms: bool, total: Tensor, normed: Tensor,
) -> None:  # fmt: skip
    """What the op says, into normed [R, S, W] and, where there is a branch, total [R, S, W].

    x is contiguous; gate, weight and bias [W] or [R, 1, W].
    """
    rows, length, width = x.shape
    gate = None if branch is None else gate
    branch = None if branch is None else branch.contiguous()
    vectors, strides = [], []
    for vector in (gate, weight, bias):
        vectors.append(vector if vector is None or vector.stride(-1) == 1 else vector.contiguous())
        strides.append(vectors[-1].stride(0) if vector is not None and vector.numel() > width else 0)
    if not any(strides):  # one long row
        rows, length = 1, rows * length
    tile, num_warps = cut(rows * length, length, width, multiprocessors(x))
    with current_device(x):
        add_norm_kernel[(rows * triton.cdiv(length, tile),)](
            x, x if branch is None else branch, *(x if vector is None else vector for vector in vectors),
            total, normed, *strides, length, float(eps),
            BRANCH=branch is not None, GATE=gate is not None, WEIGHT=weight is not None, BIAS=bias is not None,
            RMS=rms, width=width, WIDTH=triton.next_power_of_2(width), TILE=tile, num_warps=num_warps,
            **dependent_launch(x), **FUSED,
        )  # fmt: skip
