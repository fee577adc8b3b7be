"""nearest_code in Triton: argmin_j |c_j|^2 / 2 - x.c_j, tile by tile of the codebook.

A program keeps ROWS vectors in registers and walks over the codes; products run on the tensor cores as three tf32
products each, which is float32 to about one bit. Bytes: x and codes once per program (codes from L2), 8 per row out.
FLOPs: 2 V d per row (6 V d of tf32), and V compares; for d = 8 the compares bind, for d = 32 the products.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ddfast_kernels.tiles import launch
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def nearest_code_kernel(
    x_ptr, codes_ptr, out_ptr, rows, num_codes, x_stride,
    dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DIM)
    x_mask = (row < rows)[:, None] & (k < dim)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0).to(tl.float32)
    best = tl.full([ROWS], float("inf"), tl.float32)
    code = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_codes, CODES):
        j = start + tl.arange(0, CODES)
        tile_ptr = codes_ptr + j.to(tl.int64)[:, None] * dim + k[None, :]
        c = tl.load(tile_ptr, mask=(j < num_codes)[:, None] & (k < dim)[None, :], other=0.0).to(tl.float32)
        half_norm = tl.sum(c * c, axis=1) * 0.5
        distance = half_norm[None, :] - tl.dot(x, tl.trans(c), input_precision="tf32x3")
        distance = tl.where((j < num_codes)[None, :], distance, float("inf"))
        near, where = tl.min(distance, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = near < best  # the lower index stays where they are equal
        best = tl.where(better, near, best)
        code = tl.where(better, start + where, code)
    tl.store(out_ptr + row, code.to(tl.int64), mask=row < rows)


def nearest_code(x: Tensor, codes: Tensor, out: Tensor) -> None:
    """x [rows, d] with unit stride along d, contiguous codes [V, d], out int64 [rows]."""
    launch("nearest_code", nearest_code_kernel, x, (x, codes, out, len(x), len(codes), x.stride(0)))
