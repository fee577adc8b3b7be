"""draw_codes in Triton: the thresholds of filter_logits, and then, of the same program, a running sum of what is kept.

    code = min { j : sum_{i <= j, kept} p_i > u sum_{kept} p_i },  at most the last code kept

The running sum is in float64, and takes parts of a long row, read again from the nearest cache: a whole one would not
stay in registers. Bytes: a row in (two with guidance), 12 more; operations: those of filter_logits, which bind, and a
scan of V sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ddfast_kernels.filter_logits import is_kept, keys_from, rows_and_codes, rows_of_program, thresholds, value_of
from ddfast_kernels.launch import UNFUSED, current_device, dependent_launch, wait_for_previous
from torch import Tensor

_PART = 4096


@triton.jit(do_not_specialize=["rows", "top_k"])
def draw_codes_kernel(
    logits_ptr, uncond_ptr, scale_ptr, uniform_ptr, out_ptr, rows, logits_stride, uncond_stride,
    temperature, top_p, num_codes, top_k,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    WHOLE: tl.constexpr, PART: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row, inside, scale, logits_ptr, uncond_ptr = rows_of_program(
        logits_ptr, uncond_ptr, scale_ptr, rows, logits_stride, uncond_stride, GUIDED, ROWS
    )
    least, last, most, mass, bad, held = thresholds(
        logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, top_k, top_p, GUIDED, TOP_K, TOP_P, ROWS, CODES,
        WHOLE,
    )  # fmt: skip
    goal = tl.load(uniform_ptr + row, mask=row < rows, other=0.0).to(tl.float64) * mass
    before = tl.zeros([ROWS], tl.float64)
    code = tl.zeros([ROWS], tl.int32) + num_codes
    latest = tl.full([ROWS], -1, tl.int32)
    for start in range(0, num_codes, PART):
        j, key = keys_from(
            start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, PART, PART == CODES
        )
        stays = is_kept(key, j, least[:, None], last[:, None]) & inside & (j < num_codes)
        weight = tl.where(stays, tl.exp(value_of(key) - most[:, None]), 0.0).to(tl.float64)
        passed = stays & (before[:, None] + tl.cumsum(weight, axis=1) > goal[:, None])
        code = tl.minimum(code, tl.min(tl.where(passed, j, num_codes), axis=1))
        latest = tl.maximum(latest, tl.max(tl.where(stays, j, -1), axis=1))
        before += tl.sum(weight, axis=1)
    # Sums in two orders may leave a goal that is nearly the whole unpassed.
    tl.store(out_ptr + row, tl.where(bad, -1, tl.minimum(code, latest)).to(tl.int64), mask=row < rows)


def draw_codes(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: float, top_k: int, top_p: float,
    uniform: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Codes into out int64 [rows], -1 for a row with NaN, +inf or nothing finite.

    logits, uncond [rows, V] with unit stride along V, scale and uniform float32 [rows].
    """
    rows, num_codes = logits.shape
    sizes = rows_and_codes(num_codes)
    with current_device(logits):
        draw_codes_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            logits, logits if uncond is None else uncond, uniform if scale is None else scale, uniform, out,
            rows, logits.stride(0), 0 if uncond is None else uncond.stride(0), float(temperature), float(top_p),
            num_codes, top_k,
            GUIDED=uncond is not None, TOP_K=0 < top_k < num_codes, TOP_P=top_p < 1.0,
            PART=min(sizes["CODES"], _PART), **sizes, **dependent_launch(logits), **UNFUSED,
        )  # fmt: skip
