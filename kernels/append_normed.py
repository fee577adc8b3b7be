"""append_normed in Triton: from the projections of new positions to a normalised query and a longer KV cache.

    out = query / |query| * scale,  cache[start ..] <- key / |key|, value

A program has the three vectors of some (position, head), neighbours in qkv; each goes to a place of its own, of whole
sectors. Bytes: qkv in, as much out, which bind.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ddfast_kernels.launch import FUSED, current_device, dependent_launch, wait_for_previous
from torch import Tensor

_ELEMENTS = 1024
"""Of the query in a program: 16 bytes of bf16 for every thread of its four warps, and as many of key and value."""


@triton.jit
def _normalised(x):
    """Rows of x over their lengths, in float32; a length below 1e-12 is taken as that."""
    x = x.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True))
    return x * (1.0 / tl.maximum(length, 1e-12, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["count", "length", "start", "places"])
def append_normed_kernel(
    qkv_ptr, scale_ptr, keys_ptr, values_ptr, out_ptr, count, length, start, places,
    SCALE: tl.constexpr, heads: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    # Of [R, S, H], in 32 bits: more vectors than that would not fit a GPU, and divisions of 64 bits cost.
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, DIM)[None, :]
    mask = (i < count) & (k < dim)
    head, token = i % heads, i // heads
    position = token % length
    row_head = (token // length * heads + head).to(tl.int64)

    qkv_ptr += (token.to(tl.int64) * 3 * heads + head) * dim + k
    query = tl.load(qkv_ptr, mask=mask, other=0.0)
    key = tl.load(qkv_ptr + heads * dim, mask=mask, other=0.0)
    value = tl.load(qkv_ptr + 2 * heads * dim, mask=mask, other=0.0)
    query = _normalised(query)
    if SCALE:
        query *= tl.load(scale_ptr + head).to(tl.float32)
    place = (row_head * places + start + position) * dim + k
    tl.store(keys_ptr + place, _normalised(key), mask=mask)
    tl.store(values_ptr + place, value, mask=mask)
    tl.store(out_ptr + (row_head * length + position) * dim + k, query, mask=mask)


def append_normed(
    qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: Tensor | None, out: Tensor
) -> None:  # fmt: skip
    """What the op says, into out [R, H, S, K]; keys and values [R, H, L, K] are written at start .. start + S - 1.

    qkv [R, S, 3, H, K] and scale [H]; all contiguous.
    """
    rows, length, _, heads, dim = qkv.shape
    padded = triton.next_power_of_2(dim)
    count, tile = rows * length * heads, max(1, _ELEMENTS // padded)
    with current_device(qkv):
        append_normed_kernel[(triton.cdiv(count, tile),)](
            qkv, qkv if scale is None else scale, keys, values, out, count, length, start, keys.shape[2],
            SCALE=scale is not None, heads=heads, dim=dim, DIM=padded, ROWS=tile,
            **dependent_launch(qkv), **FUSED,
        )  # fmt: skip
