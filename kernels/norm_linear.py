"""norm_linear in Triton: for a few rows, what stands in front of a linear layer, the layer, and what stands behind it.

    total = x + gate * branch,  y = activation(norm(total) W^T + b)

A program has some outputs of all rows, and normalises the rows itself: two reads from the nearest caches instead of a
launch. The first read is for the statistics; the second goes, in pieces and with pieces of W, into products on the
tensor cores, whose small side the rows are. The warps share the width, not the outputs: each has a slice of every
piece, and the slices are summed at the end. On the number of rows depend masks and padding alone, never how a sum is
shared out: a row's result is the same bits in every batch, for widths that 16 divides. SwiGLU's two matrices lie one
behind the other, and a program has the same outputs of both.

Bytes: W, which binds. LlamaGen-L in bf16: 6.3 MB for wqkv, 2.1 for wo, 11.5 for w1 and w3, 5.8 for w2, 33.6 for the
head; a token, 24 blocks and the head, 650 MB, of which an H100 reads 3.35 TB/s in 0.19 ms. FLOP: 2 per element and row,
which the tensor cores do not notice. Instructions of a warp on sm_90 with 2 rows, all of its pieces: 640 for wqkv, 240
for wo, 760 for w1 and w3, 400 for w2, 600 for the head; at four a cycle 0.1 to 0.6 of the time that the bytes take.
Where launches may depend on each other, a program asks for its rows of W before the kernel in front has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from ddfast_kernels.activate import activated
from ddfast_kernels.add_norm import loaded, normalised, statistics, summed
from ddfast_kernels.launch import (
    INTERPRETED,
    UNFUSED,
    current_device,
    dependent_launch,
    multiprocessors,
    prefetch,
    wait_for_previous,
)
from torch import Tensor

_INTERPRETED = tl.constexpr(INTERPRETED)


class Cut(NamedTuple):
    """Outputs of a program, elements of a warp's slice of a piece, warps."""

    outputs: int
    slice: int
    num_warps: int


def cut(width: int, outputs: int, matrices: int, element_size: int, normed: bool, processors: int) -> Cut:
    """From sizes of the layer alone: the order of a sum is the same for every number of rows.

    A program has so few outputs that every multiprocessor gets some, and more only where there would be above four
    programs for each. With a norm a warp has 256 elements of the width and more: its sums then take the same way
    however many rows are summed.
    """
    tile = 8
    while tile < 32 and outputs > 4 * processors * tile:
        tile *= 2
    padded = triton.next_power_of_2(width)
    most = min(16, padded // 256) if normed else min(8 if outputs <= processors * tile else 4, padded // 64)
    num_warps = max(1, most)
    piece = min(16384 // (tile * matrices), 1024 if normed else 2048) // element_size
    return Cut(tile, max(32, piece // num_warps), num_warps)


def slots(rows: int, element_size: int) -> int:
    """Rows that the tensors have.

    Products on the tensor cores are shared out among threads in one way; those of float32, which are none, by how many
    rows there are: always as many.
    """
    return 8 if element_size == 4 else max(2, triton.next_power_of_2(rows))


def stages(cut: Cut, width: int, rows: int, tensors: int, matrices: int, element_size: int) -> int:
    """Pieces on their way at once, and one: at most 64 KiB of matrices and of so many tensors of the rows."""
    piece = cut.num_warps * cut.slice
    size = piece * element_size * (cut.outputs * matrices + rows * tensors)
    return 1 + max(1, min(3, triton.cdiv(width, piece), 65536 // size))


@triton.jit(do_not_specialize=["rows", "length"])
def norm_linear_kernel(
    x_ptr, branch_ptr, gate_ptr, weight_ptr, bias_ptr, linear_ptr, linear_bias_ptr, total_ptr, out_ptr,
    gate_stride, weight_stride, bias_stride, rows, length, outputs, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    LINEAR_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, width: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SLICE: tl.constexpr, WARPS: tl.constexpr,
    OWN: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    MATRICES: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    RMS: tl.constexpr = NORM == "rms"
    rounded: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0) * OUTPUTS
    if PREFETCH:
        prefetch(linear_ptr, first, outputs, width, OUTPUTS, 32 * WARPS)
        if MATRICES == 2:
            prefetch(linear_ptr, outputs + first, 2 * outputs, width, OUTPUTS, 32 * WARPS)
    wait_for_previous(DEPENDENT)

    # Tensors are [ROWS, WIDTH] here, [WARPS, ROWS or SLICE, SLICE or OUTPUTS] below.
    i = tl.arange(0, ROWS)[:, None]
    mean, inverse = None, None
    if NORM != "none":
        every = tl.arange(0, WIDTH)[None, :]
        inside = (i < rows) & (every < width)
        x = loaded(x_ptr + i * width + every, inside)
        branch = loaded(branch_ptr + i * width + every, inside) if BRANCH else None
        owner = tl.minimum(i, rows - 1) // length if OWN else 0
        gate = loaded(gate_ptr + owner * gate_stride + every, every < width) if GATE else None
        whole = summed(x, branch, gate, rounded)
        if BRANCH:
            stored = inside & (every < tl.where(first == 0, width, 0))
            tl.store(total_ptr + i * width + every, whole, mask=stored)
        mean, inverse = statistics(whole, inside, eps, RMS, width)
        mean, inverse = mean[None, :, :], inverse[None, :, :]

    # SwiGLU's two matrices lie one behind the other: a program has the same outputs of both, side by side.
    c = tl.arange(0, OUTPUTS * MATRICES)
    o = first + c % OUTPUTS
    row = o + c // OUTPUTS * outputs
    r = i[None, :, :]
    owner_of = tl.minimum(r, rows - 1) // length if OWN else 0
    piece = tl.arange(0, WARPS)[:, None, None] * SLICE
    linear_ptr += row.to(tl.int64)[None, None, :] * width
    sums = tl.zeros([WARPS, ROWS, OUTPUTS * MATRICES], tl.float32)
    for start in tl.range(0, width, WARPS * SLICE, num_stages=STAGES):
        j = start + piece + tl.arange(0, SLICE)[None, None, :]
        mask = (r < rows) & (j < width)
        if NORM == "none":
            factor = tl.load(x_ptr + r * width + j, mask=mask, other=0.0)
        else:
            part = loaded(x_ptr + r * width + j, mask)
            added = loaded(branch_ptr + r * width + j, mask) if BRANCH else None
            times = loaded(gate_ptr + owner_of * gate_stride + j, j < width) if GATE else None
            weight = loaded(weight_ptr + owner_of * weight_stride + j, j < width) if WEIGHT else None
            bias = loaded(bias_ptr + owner_of * bias_stride + j, j < width) if BIAS else None
            total = summed(part, added, times, rounded)
            factor = normalised(total, mean, inverse, weight, bias, rounded, RMS).to(rounded)
        k = start + piece + tl.arange(0, SLICE)[None, :, None]
        linear = tl.load(linear_ptr + k, mask=(k < width) & (o < outputs)[None, None, :], other=0.0)
        if _INTERPRETED:  # whose products know no bf16
            factor, linear = factor.to(tl.float32), linear.to(tl.float32)
        sums = tl.dot(factor, linear, sums, input_precision="ieee")

    y = tl.sum(sums, axis=0)
    if LINEAR_BIAS:
        y += loaded(linear_bias_ptr + row, o < outputs)[None, :]
    if ACTIVATION != "none":  # of what a layer apart gives back
        y = y.to(rounded).to(tl.float32)
    if ACTIVATION == "gelu":
        y = activated(y, True)
    elif ACTIVATION == "swiglu":
        y, gates = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, OUTPUTS]), [0, 2, 1]))
        y = activated(y, False) * gates
    o = first + tl.arange(0, OUTPUTS)[None, :]
    tl.store(out_ptr + i * outputs + o, y, mask=(i < rows) & (o < outputs))


def norm_linear(
    x: Tensor, branch: Tensor | None, linear: Tensor, linear_bias: Tensor | None, gate: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, activation: str, total: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """What the op says, into out [R, S, O] and, where there is a branch, total [R, S, W]; at most MOST_ROWS positions.

    x is contiguous; gate, weight and bias [W] or [R, 1, W]; norm "none" (then no branch either), "layer" or "rms";
    activation "none", "gelu" or "swiglu".
    """
    rows, length, width = x.shape
    outputs = out.shape[-1]
    linear = linear.contiguous()
    linear_bias = None if linear_bias is None else linear_bias.contiguous()
    branch = None if branch is None else branch.contiguous()
    vectors, strides = [], []
    for vector in (gate if branch is not None else None, weight, bias):
        vectors.append(vector if vector is None or vector.stride(-1) == 1 else vector.contiguous())
        strides.append(vectors[-1].stride(0) if vector is not None and vector.numel() > width else 0)
    size, matrices = linear.element_size(), linear.shape[0] // outputs
    layer = cut(width, outputs, matrices, size, norm != "none", multiprocessors(x))
    held = slots(rows * length, size)
    own = any(strides)
    tensors = 1 + (branch is not None) + own * sum(vector is not None for vector in vectors)
    launch = dependent_launch(x)
    whole = width * size % 16 == 0 and linear.data_ptr() % 16 == 0
    with current_device(x):
        norm_linear_kernel[(triton.cdiv(outputs, layer.outputs),)](
            x, x if branch is None else branch, *(x if vector is None else vector for vector in vectors),
            linear, linear if linear_bias is None else linear_bias, total, out, *strides, rows * length, length,
            outputs, eps,
            BRANCH=branch is not None, GATE=vectors[0] is not None, NORM=norm, WEIGHT=weight is not None,
            BIAS=bias is not None, LINEAR_BIAS=linear_bias is not None, ACTIVATION=activation, width=width,
            WIDTH=max(256 * layer.num_warps, triton.next_power_of_2(width)), ROWS=held, OUTPUTS=layer.outputs,
            SLICE=layer.slice, WARPS=layer.num_warps, OWN=own,
            STAGES=stages(layer, width, held, tensors, matrices, size),
            PREFETCH=launch["DEPENDENT"] and whole, num_warps=layer.num_warps, **launch, **UNFUSED,
        )  # fmt: skip
