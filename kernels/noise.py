"""noise in Triton: Philox 4x32-10 and a Box-Muller transform in float64, bit for bit that of philox.h.

Launched without fused multiply-adds, as philox.h asks. Bytes: 16 written per 4 normals; operations: about 150 in
float64 per 4 normals, so float64 throughput binds on consumer GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ddfast_kernels.launch import UNFUSED, current_device
from torch import Tensor

_QUADS = 256


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _box_muller(x, y):
    """The steps of philox.h, numbered as there."""
    one = tl.full(x.shape, 1.0, tl.float64)
    u = (x.to(tl.float64) + one) * 2.3283064365386963e-10  # 1
    bits = u.to(tl.int64, bitcast=True)  # 2
    e = (bits >> 52) - 1023
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    upper = m > 1.4142135623730951
    m = tl.where(upper, m * 0.5, m)
    e = tl.where(upper, e + 1, e)
    s = (m - one) / (m + one)  # 3
    z = s * s
    p = one / 23.0  # 4
    p = p * z + one / 21.0
    p = p * z + one / 19.0
    p = p * z + one / 17.0
    p = p * z + one / 15.0
    p = p * z + one / 13.0
    p = p * z + one / 11.0
    p = p * z + one / 9.0
    p = p * z + one / 7.0
    p = p * z + one / 5.0
    p = p * z + one / 3.0
    p = p * z + one
    log_u = e.to(tl.float64) * 0.6931471805599453 + (s * 2.0) * p  # 5
    r = tl.sqrt(log_u * -2.0)  # 6
    k = (y + 0x20000000) >> 30  # 7
    a = (y - (k << 30)).to(tl.int32, bitcast=True).to(tl.float64) * 1.4629180792671596e-09  # 8
    q = a * a
    ps = one / 355687428096000.0  # 9
    ps = ps * q - one / 1307674368000.0
    ps = ps * q + one / 6227020800.0
    ps = ps * q - one / 39916800.0
    ps = ps * q + one / 362880.0
    ps = ps * q - one / 5040.0
    ps = ps * q + one / 120.0
    ps = ps * q - one / 6.0
    ps = ps * q + one
    sine = a * ps
    pc = one / 20922789888000.0  # 10
    pc = pc * q - one / 87178291200.0
    pc = pc * q + one / 479001600.0
    pc = pc * q - one / 3628800.0
    pc = pc * q + one / 40320.0
    pc = pc * q - one / 720.0
    pc = pc * q + one / 24.0
    pc = pc * q - one / 2.0
    cosine = pc * q + one
    odd, turned = (k & 1) != 0, (k & 2) != 0  # 11
    first = tl.where(odd, tl.where(turned, sine, -sine), tl.where(turned, -cosine, cosine))
    second = tl.where(odd, tl.where(turned, -cosine, cosine), tl.where(turned, -sine, sine))
    return (r * first).to(tl.float32), (r * second).to(tl.float32)  # 12


@triton.jit(do_not_specialize=["seed_low", "seed_high", "count", "per_sample", "quads"])
def noise_kernel(seed_low, seed_high, index_ptr, out_ptr, count, per_sample, quads, QUADS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    sample = i // quads
    quad = i - sample * quads
    mask = sample < count
    index = tl.load(index_ptr + sample, mask=mask, other=0)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = tl.zeros([QUADS], tl.uint32)
    k0 = (tl.zeros([QUADS], tl.int32) + seed_low).to(tl.uint32, bitcast=True)
    k1 = (tl.zeros([QUADS], tl.int32) + seed_high).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = _philox(quad.to(tl.uint32), low, high, zero, k0, k1)
    n0, n1 = _box_muller(x0, x1)
    n2, n3 = _box_muller(x2, x3)
    element = quad * 4
    place = out_ptr + sample * per_sample + element
    tl.store(place, n0, mask=mask & (element < per_sample))
    tl.store(place + 1, n1, mask=mask & (element + 1 < per_sample))
    tl.store(place + 2, n2, mask=mask & (element + 2 < per_sample))
    tl.store(place + 3, n3, mask=mask & (element + 3 < per_sample))


def noise(seed: int, index: Tensor, per_sample: int, out: Tensor) -> None:
    """index int64 [count], contiguous; out float32 [count, per_sample]."""
    quads = -(-per_sample // 4)
    # Its words as signed numbers of 32 bits: Triton gives an argument its type by its size.
    low, high = (word - 2**32 if word >= 2**31 else word for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    with current_device(index):
        noise_kernel[(triton.cdiv(index.numel() * quads, _QUADS),)](
            low, high, index, out, index.numel(), per_sample, quads, QUADS=_QUADS, **UNFUSED
        )
