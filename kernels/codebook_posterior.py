"""codebook_posterior in Triton, forward and backward, one pass over the codes each.

A program holds ROWS noisy tokens. Noise draws of one token (x [m, B, n, d] on log_probs [B, n, V]) lie in one program,
so that they read its log-probabilities once. Scores are in powers of two; their products are 3xTF32 and of size
E = (1-t)/t^2 |x||c|, so that a score is off by about 2^-22 E, as the reference's is in float32. The forward keeps a
running maximum and writes x0_hat and the logarithm of the weights' sum; with it the backward knows every weight at
once: dx = ((1-t)/t^2) sum_j w_j c_j ((c_j - x0_hat).g).
Per token: 4 V d FLOP forward, 6 V d backward, V exponentials each, V log-probabilities read (shared by the draws).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from ddfast_kernels.codes import add_product, along, code_tile, combined, parts
from ddfast_kernels.tiles import launch
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _rows_of(program, draws, period, ROWS: tl.constexpr):
    """Rows of x and of log_probs of a program: the draws of one token beside each other."""
    place = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = place // draws
    row = source + (place - source * draws) * period
    return row, source, source < period


@triton.jit
def _weighted(x, t):
    """What a score needs of a row, in powers of two: x (1-t) / t^2 [ROWS, DIM], ((1-t) / t)^2 and |x|^2 / (2 t^2)."""
    ratio = (1.0 - t) / t
    base = tl.sum(x * x, axis=1) / (2.0 * t * t)
    return x * (ratio / t * LOG2_E)[:, None], ratio * ratio * LOG2_E, base * LOG2_E


@triton.jit
def _scores(
    hi, lo, square, base, log_probs_ptr, codes_ptr, source, inside, start, k, stride, num_codes, dim: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Parts of the codes [CODES, DIM] from `start` on, and log p - |x - (1-t) c|^2 / (2 t^2), [ROWS, CODES]."""
    j = start + tl.arange(0, CODES)
    c, half_norm = code_tile(codes_ptr, j, k, num_codes, dim)
    c_hi, c_lo = parts(c)
    mask = inside[:, None] & (j < num_codes)[None, :]
    log_p = tl.load(log_probs_ptr + source[:, None] * stride + j[None, :], mask=mask, other=float("-inf"))
    if ROWS == 1:
        product = along(hi + lo, c, ROWS)
    else:
        product = add_product(tl.zeros([ROWS, CODES], tl.float32), hi, lo, tl.trans(c_hi), tl.trans(c_lo))
    score = product - (square[:, None] * half_norm[None, :] + base[:, None])
    return c_hi, c_lo, log_p.to(tl.float32) * LOG2_E + score


@triton.jit
def _add_weighted(total, weight, c_hi, c_lo, ROWS: tl.constexpr):
    """total + sum_j weight_j c_j, [ROWS, DIM]."""
    if ROWS == 1:
        total += combined(weight, c_hi + c_lo, ROWS)
    else:
        hi, lo = parts(weight)
        total = add_product(total, hi, lo, c_hi, c_lo)
    return total


@triton.jit(do_not_specialize=["period", "draws"])
def codebook_posterior_kernel(
    x_ptr, t_ptr, log_probs_ptr, codes_ptr, out_ptr, norm_ptr, period, draws, num_codes, stride,
    dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    row, source, inside = _rows_of(tl.program_id(0), draws, period, ROWS)
    k = tl.arange(0, DIM)
    mask = inside[:, None] & (k < dim)[None, :]
    x = tl.load(x_ptr + row[:, None] * dim + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scaled, square, base = _weighted(x, tl.load(t_ptr + row, mask=inside, other=1.0))
    hi, lo = parts(scaled)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, num_codes, CODES):
        c_hi, c_lo, score = _scores(
            hi, lo, square, base, log_probs_ptr, codes_ptr, source, inside, start, k, stride, num_codes, dim,
            ROWS, CODES,
        )  # fmt: skip
        reference = tl.maximum(most, tl.max(score, axis=1))
        # Where nothing finite was seen so far, -inf - -inf would be NaN.
        shift = tl.where(reference == float("-inf"), 0.0, reference)
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weight, axis=1)
        mean = _add_weighted(mean * fade[:, None], weight, c_hi, c_lo, ROWS)
        most = reference
    mean = mean / total[:, None]  # NaN for a row without support
    tl.store(out_ptr + row[:, None] * dim + k[None, :], mean.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(norm_ptr + row, (most + tl.log2(total)) / LOG2_E, mask=inside)


@triton.jit(do_not_specialize=["period", "draws"])
def codebook_posterior_backward_kernel(
    grad_ptr, x_ptr, t_ptr, log_probs_ptr, codes_ptr, x0_hat_ptr, norm_ptr, out_ptr, period, draws, num_codes, stride,
    dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    row, source, inside = _rows_of(tl.program_id(0), draws, period, ROWS)
    k = tl.arange(0, DIM)
    place, mask = row[:, None] * dim + k[None, :], inside[:, None] & (k < dim)[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + row, mask=inside, other=1.0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0)
    own = tl.sum(g * tl.load(x0_hat_ptr + place, mask=mask, other=0.0).to(tl.float32), axis=1)
    scaled, square, base = _weighted(x, t)
    hi, lo = parts(scaled)
    g_hi, g_lo = parts(g)
    norm = norm * LOG2_E
    out = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, num_codes, CODES):
        c_hi, c_lo, score = _scores(
            hi, lo, square, base, log_probs_ptr, codes_ptr, source, inside, start, k, stride, num_codes, dim,
            ROWS, CODES,
        )  # fmt: skip
        if ROWS == 1:
            slope = along(g, c_hi + c_lo, ROWS) - own[:, None]
        else:
            slope = tl.zeros([ROWS, CODES], tl.float32) - own[:, None]
            slope = add_product(slope, g_hi, g_lo, tl.trans(c_hi), tl.trans(c_lo))
        out = _add_weighted(out, tl.exp2(score - norm[:, None]) * slope, c_hi, c_lo, ROWS)
    out = out * ((1.0 - t) / (t * t))[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


def codebook_posterior(x: Tensor, t: Tensor, log_probs: Tensor, codes: Tensor, out: Tensor, norm: Tensor) -> None:
    """x [m P, d], t float32 [m P], contiguous; log_probs [P, V] with unit stride along V; codes [V, d], contiguous.

    Into out [m P, d] and norm float32 [m P]; a row without support becomes NaN.
    """
    period, num_codes = log_probs.shape
    arguments = (x, t, log_probs, codes, out, norm, period, len(x) // period, num_codes, log_probs.stride(0))
    launch("codebook_posterior", codebook_posterior_kernel, x, arguments)


def codebook_posterior_backward(
    grad: Tensor, x: Tensor, t: Tensor, log_probs: Tensor, codes: Tensor, x0_hat: Tensor, norm: Tensor, out: Tensor
) -> None:
    """As the forward, with its results; grad, x0_hat and out [m P, d], contiguous."""
    period, num_codes = log_probs.shape
    sizes = (period, len(x) // period, num_codes, log_probs.stride(0))
    arguments = (grad, x, t, log_probs, codes, x0_hat, norm, out, *sizes)
    launch("codebook_posterior_backward", codebook_posterior_backward_kernel, x, arguments)
