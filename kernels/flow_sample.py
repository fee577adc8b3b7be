"""flow_sample and sample_codes in Triton: the whole ODE of a tile of tokens in one program.

The algorithm, its start, solvers and exit rule are those of ddfast/ops/flow_sample.py and docs/numerics.md. A program
holds ROWS tokens: u and the last evaluations stay in registers, codes and log-probabilities stream by once per
evaluation; it stops when all of its tokens are decided. Many tokens share the codes' traffic and the tensor cores
(ROWS 16 and more), few tokens spread over the multiprocessors (ROWS 1).
Per token and evaluation: 4 V d FLOP, V exponentials, V log-probabilities read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ddfast_kernels.codes import along, code_tile, combined, log_prob_tile
from ddfast_kernels.tiles import launch
from torch import Tensor


@triton.jit
def evaluate(
    u, inverse_variance, log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, codes_ptr, source, inside, stride,
    uncond_stride, temperature, num_codes, dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    CODES: tl.constexpr, FILTER: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """One evaluation of the posterior at u [ROWS, DIM]: its mean D [ROWS, DIM], and per row E|c|^2 under it, the sum of
    weights relative to the largest, the likeliest code, its margin m = u.c - |c|^2 / 2, and the largest margin.
    """
    k = tl.arange(0, DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    top = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, num_codes, CODES):
        j = start + tl.arange(0, CODES)
        c, half_norm = code_tile(codes_ptr, j, k, num_codes, dim)
        log_p = log_prob_tile(
            log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, source, inside, j, stride, uncond_stride, temperature,
            num_codes, FILTER, GUIDED,
        )  # fmt: skip
        m = along(u, c, ROWS) - half_norm[None, :]
        score = log_p + m * inverse_variance[:, None]
        m = tl.where(log_p > float("-inf"), m, float("-inf"))
        peak, where = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = peak > most
        margin = tl.max(tl.where(tl.arange(0, CODES)[None, :] == where[:, None], m, float("-inf")), axis=1)
        own = tl.where(better, margin, own)
        top = tl.where(better, start + where, top)
        largest = tl.maximum(largest, tl.max(m, axis=1))
        reference = tl.maximum(most, peak)
        # Where nothing finite was seen so far, -inf - -inf would be NaN.
        shift = tl.where(reference == float("-inf"), 0.0, reference)
        weight = tl.exp(score - shift[:, None])
        fade = tl.exp(most - shift)
        total = total * fade + tl.sum(weight, axis=1)
        square = square * fade + tl.sum(weight * half_norm[None, :], axis=1)
        mean = mean * fade[:, None] + combined(weight, c, ROWS)
        most = reference
    mass = tl.where(total > 0.0, total, 1.0)  # a row without support, or none at all, has the mean 0
    return mean / mass[:, None], 2.0 * square / mass, total, top, own, largest


@triton.jit(do_not_specialize=["rows", "steps"])
def flow_sample_kernel(
    log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, noise_ptr, codes_ptr, nearest_ptr, out_ptr, evaluations_ptr,
    rows, num_codes, stride, uncond_stride, temperature, steps, sigma_min,
    SOLVER: tl.constexpr, FILTER: tl.constexpr, GUIDED: tl.constexpr, EARLY_EXIT: tl.constexpr,
    COUNT: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    k = tl.arange(0, DIM)
    eps = tl.load(noise_ptr + row[:, None] * dim + k[None, :], mask=inside[:, None] & (k < dim)[None, :], other=0.0)

    # At sigma = infinity the posterior is p: its mean, and the token's own spread.
    mean, square, total, _, _, _ = evaluate(
        tl.zeros([ROWS, DIM], tl.float32), tl.zeros([ROWS], tl.float32), log_probs_ptr, uncond_ptr, kept_ptr,
        scale_ptr, codes_ptr, row, inside, stride, uncond_stride, temperature, num_codes, dim, DIM, ROWS, CODES,
        FILTER, GUIDED,
    )  # fmt: skip
    noise_size = tl.sum(tl.abs(eps), axis=1)
    good = inside & (total >= 1.0) & (total < float("inf")) & (noise_size < float("inf"))  # false for NaN
    spread = tl.sqrt(tl.maximum(square - tl.sum(mean * mean, axis=1), 0.0) / dim)
    mean = tl.where(good[:, None], mean, 0.0)
    start: tl.constexpr = 8.0 if dim <= 64 else 0.25 * dim  # in spreads, as in ddfast/ops/flow_sample.py
    sigma = tl.where(good, tl.maximum(start * spread, 2.0 * sigma_min), 2.0 * sigma_min)

    # The solvers' coefficients: differences of almost equal numbers, so in float64.
    h = tl.log(sigma.to(tl.float64) / sigma_min) / steps
    g = tl.exp(-h)
    i0 = 1.0 - g
    i1 = h - i0
    i2 = h * h - 2.0 * i1
    a0, a1, a2 = i0, tl.zeros_like(i0), tl.zeros_like(i0)
    if SOLVER == 2:
        a0, a1 = i0 + i1 / h, -i1 / h
    elif SOLVER == 3:
        first, second = i1 / (2.0 * h), i2 / (2.0 * h * h)
        a0, a1, a2 = i0 + 3.0 * first + second, -4.0 * first - 2.0 * second, first + second
    elif SOLVER == 4:
        a0, a1 = i0 - i1 / h, i1 / h
    g, i0, h = g.to(tl.float32)[:, None], i0.to(tl.float32)[:, None], h.to(tl.float32)
    a0, a1, a2 = a0.to(tl.float32)[:, None], a1.to(tl.float32)[:, None], a2.to(tl.float32)[:, None]

    u = tl.where(good[:, None], sigma[:, None] * eps, 0.0) + mean
    before, previous = mean, mean
    diameter = tl.load(nearest_ptr + num_codes)
    code = tl.zeros([ROWS], tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    going = good
    step = 0
    while step <= steps:
        now = tl.where(step == steps, sigma_min, sigma * tl.exp(-h * step))
        current, _, total, top, own, largest = evaluate(
            u, 1.0 / (now * now), log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, codes_ptr, row, good,
            stride, uncond_stride, temperature, num_codes, dim, DIM, ROWS, CODES, FILTER, GUIDED,
        )  # fmt: skip
        code = tl.where(going, top, code)
        count += going.to(tl.int32)
        if EARLY_EXIT:
            rest = tl.maximum(total - 1.0, 0.0)
            delta = rest / (1.0 + rest) + 1e-6
            nearest = 0.99 * tl.load(nearest_ptr + top)
            reach = 2.0 * delta * diameter
            decided = (reach <= nearest) & (2.0 * (own - largest) >= -nearest * (nearest - reach))
            going = going & ((step == 0) | ~decided)
        if step == 0:
            u += 0.5 * (current - mean)
            previous = mean + g * (current - mean)
            before = mean + g * g * (current - mean)
        if SOLVER == 4:
            if step < steps:
                end = tl.where(step + 1 == steps, sigma_min, sigma * tl.exp(-h * (step + 1)))
                previous, _, _, _, _, _ = evaluate(
                    g * u + i0 * current, 1.0 / (end * end), log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, codes_ptr,
                    row, good, stride, uncond_stride, temperature, num_codes, dim, DIM, ROWS, CODES, FILTER, GUIDED,
                )  # fmt: skip
                count += going.to(tl.int32)
        u = g * u + a0 * current + a1 * previous + a2 * before
        before = previous
        previous = current
        step += 1
        if EARLY_EXIT:
            if tl.max(going.to(tl.int32), axis=0) == 0:
                step = steps + 1
    tl.store(out_ptr + row, tl.where(good, code, -1).to(tl.int64), mask=inside)
    if COUNT:
        tl.store(evaluations_ptr + row, count, mask=inside)


def flow_sample(
    log_probs: Tensor, noise: Tensor, codes: Tensor, nearest: Tensor, sigma_min: float, steps: int, solver: int,
    out: Tensor, *, evaluations: Tensor | None = None, early_exit: bool = True, kept: Tensor | None = None,
    uncond: Tensor | None = None, scale: Tensor | None = None, temperature: float = 1.0,
) -> None:  # fmt: skip
    """Codes int64 [rows] into out (-1 for a bad row or noise), and how many evaluations they took, int32 [rows].

    log_probs [rows, V] with unit stride along V, or, with `kept` (the thresholds of filter_logits), logits to be
    filtered as they are read. noise float32 [rows, d] and codes float32 [V, d], centred, both contiguous; nearest
    float32 [V + 1] as in CodebookGeometry.packed.
    """
    arguments = (
        log_probs, log_probs if uncond is None else uncond, out if kept is None else kept,
        noise if scale is None else scale, noise, codes, nearest, out, out if evaluations is None else evaluations,
        len(noise), len(codes), log_probs.stride(0), 0 if uncond is None else uncond.stride(0),
        float(temperature), steps, sigma_min,
    )  # fmt: skip
    launch(
        "flow_sample", flow_sample_kernel, noise, arguments, SOLVER=solver, FILTER=kept is not None,
        GUIDED=uncond is not None, EARLY_EXIT=early_exit, COUNT=evaluations is not None,
    )  # fmt: skip
