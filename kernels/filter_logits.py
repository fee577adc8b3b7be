"""filter_logits in Triton: the two thresholds of a row are found without sorting.

Floats map to unsigned keys of the same order; the k-th largest key is built bit by bit from the top, 32 counts of keys
at least as large as a candidate. The nucleus' last key is built in the same way from 32 sums of masses, in fixed point:
exact in any order, and half the registers of float64; among equal keys at its edge the lowest indices stay, up to one
that is found bit by bit too. A program has one long row or several short ones. The keys of a row that fits one tile are
made once and held in registers; of a longer one they are made again from the cache for every bit.
Bytes: a row in (two with guidance), a float32 row out; operations: 64 V compares and adds, which bind. For a bit of a
guided row of 16384 codes a thread, which has 32 of them, takes 123 instructions on sm_90 (top-k) or 146 (top-p); with
keys made anew for every bit it took 1041 and 1362.

`sample_codes` takes only the thresholds, and applies them to the logits as it reads them; `draw_codes` shares all but
the last pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast_kernels.launch import INTERPRETED, UNFUSED, current_device
from torch import Tensor

THRESHOLDS = 3
"""int32 words per row: the least key kept, the index up to which that key itself is kept, the log-normaliser's bits."""

_LONGEST_TILE = 16384


@triton.jit
def guided(value, base, scale, temperature, GUIDED: tl.constexpr):
    """(base + scale (value - base)) / temperature in float32: the logits that are filtered."""
    value = value.to(tl.float32)
    if GUIDED:
        base = base.to(tl.float32)
        never = (value == float("-inf")) & (base == float("-inf"))
        # A fused step by name: two kernels compute this, and the keys of one are compared with those of the other.
        value = tl.where(never, float("-inf"), tl.fma(scale + tl.zeros_like(value), value - base, base))
    value = tl.div_rn(value, temperature + tl.zeros_like(value))
    return tl.where(value == 0.0, 0.0, value)  # -0 and 0 are one value, and get one key


@triton.jit
def order_key(value):
    """uint32 keys in the order of float32 values."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of(key):
    """The value that has a key: order_key backwards."""
    bits = tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_kept(key, j, least, last):
    """Which codes j of these keys the thresholds of a row keep."""
    return (key > least) | ((key == least) & (j <= last))


@triton.jit
def key_tile(logits_ptr, uncond_ptr, scale, temperature, j, mask, GUIDED: tl.constexpr):
    """Keys of codes j [1, CODES] in the rows that the pointers [ROWS, 1] begin, that of -inf outside."""
    value = tl.load(logits_ptr + j, mask=mask, other=float("-inf"))
    base = value
    if GUIDED:
        base = tl.load(uncond_ptr + j, mask=mask, other=float("-inf"))
    return order_key(guided(value, base, scale, temperature, GUIDED))


@triton.jit
def keys_from(
    start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes,
    GUIDED: tl.constexpr, CODES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Codes from `start` on, [1, CODES], and their keys [ROWS, CODES]: those held, or read again."""
    j = start + tl.arange(0, CODES)[None, :]
    key = held
    if not WHOLE:
        key = key_tile(logits_ptr, uncond_ptr, scale, temperature, j, inside & (j < num_codes), GUIDED)
    return j, key


@triton.jit
def _fixed_mass(key, most):
    """exp(value - most) of a key's value in units of about 2^-32, uint32: sums are exact, in any order."""
    weight = tl.minimum(tl.exp(value_of(key) - most), 1.0)  # of a bad row: any number
    return (weight * 4294967040.0 + 0.5).to(tl.uint32)


@triton.jit
def _select(
    held, masses, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, most, least, goal,
    MASS: tl.constexpr, GUIDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Per row the largest key that, with all larger ones, weighs as much as the goal, and at least `least`.

    Codes below `least` weigh nothing, the others _fixed_mass each (`masses`, where keys are held), or one without MASS.
    """
    found = tl.zeros([ROWS], tl.uint32)
    end = CODES if WHOLE else num_codes
    for bit in range(32):
        candidate = found | (tl.full([ROWS], 0x80000000, tl.uint32) >> bit)
        floor = tl.maximum(candidate, least)[:, None]
        weight = tl.zeros([ROWS], tl.int64)
        for start in range(0, end, CODES):
            _, key = keys_from(
                start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
            )
            if MASS:
                each = masses if WHOLE else _fixed_mass(key, most[:, None])
                weight += tl.sum(tl.where(key >= floor, each, 0).to(tl.int64), axis=1)
            else:
                weight += tl.sum((key >= floor).to(tl.int32), axis=1)
        found = tl.where(weight >= goal, candidate, found)
    return tl.maximum(least, found)


@triton.jit
def rows_of_program(
    logits_ptr, uncond_ptr, scale_ptr, rows, logits_stride, uncond_stride, GUIDED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Indices [ROWS], which of them are rows, their guidance scale and where they begin, [ROWS, 1] each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if GUIDED:
        scale = tl.load(scale_ptr + row[:, None], mask=inside, other=1.0)
    return row, inside, scale, logits_ptr + row[:, None] * logits_stride, uncond_ptr + row[:, None] * uncond_stride


@triton.jit
def thresholds(
    logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, top_k, top_p, GUIDED: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Per row, [ROWS] each: the least key kept, the index up to which that key itself is kept, the largest value, the
    sum of what is kept relative to it, and whether the row is bad; and the keys [ROWS, CODES] of a WHOLE row.
    """
    held = tl.zeros([ROWS, 1], tl.uint32)
    end = num_codes
    if WHOLE:
        j = tl.arange(0, CODES)[None, :]
        held = key_tile(logits_ptr, uncond_ptr, scale, temperature, j, inside & (j < num_codes), GUIDED)
        end = CODES
    most = tl.full([ROWS], float("-inf"), tl.float32)
    wrong = tl.zeros([ROWS], tl.int32)
    for start in range(0, end, CODES):
        _, key = keys_from(
            start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
        )
        value = value_of(key)
        useless = (value != value) | (value == float("inf"))
        wrong += tl.sum(useless.to(tl.int32), axis=1)
        most = tl.maximum(most, tl.max(tl.where(useless, float("-inf"), value), axis=1))
    bad = (wrong > 0) | (most == float("-inf"))
    most = tl.where(bad, 0.0, most)

    least = order_key(tl.full([ROWS], float("-inf"), tl.float32)) + 1  # all that is finite
    if TOP_K:
        least = _select(
            held, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, most, least, top_k,
            False, GUIDED, ROWS, CODES, WHOLE,
        )  # fmt: skip

    last = tl.zeros([ROWS], tl.int32) + num_codes
    if TOP_P:
        total = tl.zeros([ROWS], tl.int64)
        for start in range(0, end, CODES):
            _, key = keys_from(
                start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
            )
            each = _fixed_mass(key, most[:, None])
            total += tl.sum(tl.where(key >= least[:, None], each, 0).to(tl.int64), axis=1)
        goal = tl.maximum(tl.ceil(total.to(tl.float64) * top_p), 1.0).to(tl.int64)
        least = _select(
            held, _fixed_mass(held, most[:, None]), logits_ptr, uncond_ptr, scale, temperature, inside, num_codes,
            most, least, goal, True, GUIDED, ROWS, CODES, WHOLE,
        )  # fmt: skip
        # Of the codes with that key itself, as many as still have less than the goal before them, and always one.
        above = tl.zeros([ROWS], tl.int64)
        equal = tl.zeros([ROWS], tl.int32)
        for start in range(0, end, CODES):
            _, key = keys_from(
                start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
            )
            each = _fixed_mass(key, most[:, None])
            above += tl.sum(tl.where(key > least[:, None], each, 0).to(tl.int64), axis=1)
            equal += tl.sum((key == least[:, None]).to(tl.int32), axis=1)
        each = tl.maximum(_fixed_mass(least, most), 1).to(tl.int64)
        stay = tl.maximum((goal - above + each - 1) // each, 1)
        # The index of the last of them, bit by bit too: that with one less before it. Mostly all of them stay.
        found = tl.zeros([ROWS], tl.int32)
        bit = tl.where(tl.max((equal > stay).to(tl.int32), axis=0) > 0, CODES if WHOLE else 0x40000000, 0)
        while bit > 0:
            candidate = found + bit
            before = tl.zeros([ROWS], tl.int32)
            for start in range(0, end, CODES):
                j, key = keys_from(
                    start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
                )
                before += tl.sum(((key == least[:, None]) & (j < candidate[:, None])).to(tl.int32), axis=1)
            found = tl.where(before < stay, candidate, found)
            bit = bit >> 1
        last = tl.where(equal > stay, found, last)

    mass = tl.zeros([ROWS], tl.float64)
    for start in range(0, end, CODES):
        j, key = keys_from(
            start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
        )
        stays = is_kept(key, j, least[:, None], last[:, None])
        mass += tl.sum(tl.where(stays, tl.exp(value_of(key) - most[:, None]), 0.0).to(tl.float64), axis=1)
    return least, last, most, tl.where(bad, 1.0, mass), bad, held


@triton.jit(do_not_specialize=["rows", "top_k"])
def filter_logits_kernel(
    logits_ptr, uncond_ptr, scale_ptr, out_ptr, kept_ptr, rows, logits_stride, uncond_stride,
    temperature, top_p, num_codes, top_k,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, inside, scale, logits_ptr, uncond_ptr = rows_of_program(
        logits_ptr, uncond_ptr, scale_ptr, rows, logits_stride, uncond_stride, GUIDED, ROWS
    )
    least, last, most, mass, bad, held = thresholds(
        logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, top_k, top_p, GUIDED, TOP_K, TOP_P, ROWS, CODES,
        WHOLE,
    )  # fmt: skip
    log_normaliser = most + tl.log(mass).to(tl.float32)
    log_normaliser = tl.where(bad, float("nan"), log_normaliser)
    if WRITE:
        end = CODES if WHOLE else num_codes
        for start in range(0, end, CODES):
            j, key = keys_from(
                start, held, logits_ptr, uncond_ptr, scale, temperature, inside, num_codes, GUIDED, CODES, WHOLE
            )
            stays = is_kept(key, j, least[:, None], last[:, None])
            log_prob = tl.where(stays, value_of(key), float("-inf")) - log_normaliser[:, None]
            tl.store(out_ptr + row[:, None] * num_codes + j, log_prob, mask=inside & (j < num_codes))
    else:
        kept_ptr += row * 3
        tl.store(kept_ptr, least.to(tl.int32, bitcast=True), mask=row < rows)
        tl.store(kept_ptr + 1, last, mask=row < rows)
        tl.store(kept_ptr + 2, log_normaliser.to(tl.int32, bitcast=True), mask=row < rows)


def rows_and_codes(num_codes: int) -> dict[str, int]:
    """What a program has: one long row or several short ones, WHOLE if they fit its registers."""
    codes = min(triton.next_power_of_2(num_codes), _LONGEST_TILE)
    rows = 64 if INTERPRETED else max(1, 1024 // codes)
    return {"ROWS": rows, "CODES": codes, "WHOLE": num_codes <= codes, "num_warps": max(4, min(16, codes // 256))}


def filter_logits(
    logits: Tensor, uncond: Tensor | None, scale: Tensor | None, temperature: float, top_k: int, top_p: float,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Filtered log-probabilities into out float32 [rows, V], or the thresholds of every row, int32 [rows, 3].

    logits, uncond [rows, V] with unit stride along V, scale float32 [rows]. A row with NaN, +inf or nothing finite
    comes out as NaN (its log-normaliser, of the thresholds).
    """
    rows, num_codes = logits.shape
    result = logits.new_empty(rows, THRESHOLDS, dtype=torch.int32) if out is None else out
    sizes = rows_and_codes(num_codes)
    with current_device(logits):
        filter_logits_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            logits, logits if uncond is None else uncond, result if scale is None else scale, result, result,
            rows, logits.stride(0), 0 if uncond is None else uncond.stride(0), float(temperature), float(top_p),
            num_codes, top_k,
            GUIDED=uncond is not None, TOP_K=0 < top_k < num_codes, TOP_P=top_p < 1.0, WRITE=out is not None,
            **sizes, **UNFUSED,
        )  # fmt: skip
    return result
