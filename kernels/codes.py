"""One pass over the codebook for a tile of rows: what the flow and the posterior are made of.

Rows are kept in registers, codes and log-probabilities stream by. With several rows to a program (16 or more) both
products, x.c and w.c, run on the tensor cores as three tf32 products each (float32 to about one bit); a program of one
row multiplies in float32 and adds. Softmax weights are accumulated against a running maximum, so that no score is kept.
"""

import triton
import triton.language as tl
from ddfast_kernels.filter_logits import guided, is_kept, order_key


@triton.jit
def code_tile(codes_ptr, j, k, num_codes, dim: tl.constexpr):
    """Codes j [CODES] as float32 [CODES, DIM], zeros outside, and half their squared norms."""
    where = codes_ptr + j.to(tl.int64)[:, None] * dim + k[None, :]
    c = tl.load(where, mask=(j < num_codes)[:, None] & (k < dim)[None, :], other=0.0).to(tl.float32)
    return c, tl.sum(c * c, axis=1) * 0.5


@triton.jit
def along(x, c, ROWS: tl.constexpr):
    """x.c for x [ROWS, DIM] and c [CODES, DIM]: [ROWS, CODES]."""
    if ROWS == 1:
        product = tl.sum(x[:, None, :] * c[None, :, :], axis=2)
    else:  # Triton 3.6 would compile it after a return, too, for shapes that it refuses
        product = tl.dot(x, tl.trans(c), input_precision="tf32x3")
    return product


@triton.jit
def combined(weight, c, ROWS: tl.constexpr):
    """sum_j weight_j c_j for weight [ROWS, CODES] and c [CODES, DIM]: [ROWS, DIM]."""
    if ROWS == 1:
        product = tl.sum(weight[:, :, None] * c[None, :, :], axis=1)
    else:
        product = tl.dot(weight, c, input_precision="tf32x3")
    return product


@triton.jit
def parts(value):
    """A float as hi + lo, hi its nearest tf32 number; a product of two is lo.hi + hi.lo + hi.hi (3xTF32)."""
    hi = ((value.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return hi, value - hi


@triton.jit
def add_product(total, a_hi, a_lo, b_hi, b_lo):
    """total + a b, of parts that serve more than one product; NaN stays NaN."""
    total = tl.dot(a_lo, b_hi, acc=total, input_precision="tf32")
    total = tl.dot(a_hi, b_lo, acc=total, input_precision="tf32")
    return tl.dot(a_hi, b_hi, acc=total, input_precision="tf32")


@triton.jit
def log_prob_tile(
    log_probs_ptr, uncond_ptr, kept_ptr, scale_ptr, source, inside, j, stride, uncond_stride, temperature, num_codes,
    FILTER: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of codes j in rows `source` [ROWS], [ROWS, CODES]; -inf outside, inf for NaN.

    With FILTER the rows hold logits, and the thresholds that filter_logits found are applied on the way.
    """
    mask = inside[:, None] & (j < num_codes)[None, :]
    place = source[:, None] * stride + j[None, :]
    value = tl.load(log_probs_ptr + place, mask=mask, other=float("-inf"))
    if FILTER:
        base, scale = value, 1.0
        if GUIDED:
            base = tl.load(uncond_ptr + source[:, None] * uncond_stride + j[None, :], mask=mask, other=float("-inf"))
            scale = tl.load(scale_ptr + source, mask=inside, other=1.0)[:, None]
        logit = guided(value, base, scale, temperature, GUIDED)
        least = tl.load(kept_ptr + source * 3, mask=inside, other=-1).to(tl.uint32, bitcast=True)
        last = tl.load(kept_ptr + source * 3 + 1, mask=inside, other=-1)
        normaliser = tl.load(kept_ptr + source * 3 + 2, mask=inside, other=0).to(tl.float32, bitcast=True)
        stays = is_kept(order_key(logit), j[None, :], least[:, None], last[:, None]) & mask
        # A bad row's normaliser is NaN: it must not vanish where nothing is kept.
        value = tl.where(stays, logit, float("-inf")) - normaliser[:, None]
    value = value.to(tl.float32)
    return tl.where(value != value, float("inf"), value)  # one kind of bad value, and no NaN among maxima
