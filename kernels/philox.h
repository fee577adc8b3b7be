// Counter-based Gaussian noise for host and device: Philox4x32-10 and a Box-Muller transform in float64.
//
// Only integer operations and the float64 operations + - * / sqrt are used. IEEE 754 defines each of them exactly, so every
// device gives the same bits as long as products and sums are not fused: compile with -ffp-contract=off (nvcc: -fmad=false).
//
// Normals of the element e of the sample `index` under `seed` (e counts the elements of one sample, row-major):
//   (x0, x1, x2, x3) = philox4x32_10(counter = (e / 4, index & 0xffffffff, index >> 32, 0), key = (seed & 0xffffffff, seed >> 32))
//   (n0, n1) = box_muller(x0, x1), (n2, n3) = box_muller(x2, x3); the element is n[e % 4], rounded to float32.
//
// box_muller(x, y), in exactly this order of operations, every line in float64:
//   1. u = (float64(x) + 1.0) * 2^-32                      exact, in (0, 1]
//   2. u = m 2^e with m in [1, 2); if m > SQRT2: m = m * 0.5, e = e + 1        now m in [sqrt(1/2), sqrt(2)]
//   3. s = (m - 1.0) / (m + 1.0);  z = s * s
//   4. p = 1/23; then for c in (1/21, 1/19, 1/17, 1/15, 1/13, 1/11, 1/9, 1/7, 1/5, 1/3, 1.0): p = p * z + c
//      (two roundings; the constants 1/n are float64 quotients 1.0 / n)
//   5. log_u = float64(e) * LN2 + (2.0 * s) * p
//   6. r = sqrt(-2.0 * log_u)
//   7. k = ((y + 2^29) mod 2^32) >> 30;  w = int32(y - (k << 30) mod 2^32)     quadrant, remainder in [-2^29, 2^29)
//   8. a = float64(w) * (2 pi / 2^32);  q = a * a                              the angle, |a| <= pi / 4
//   9. ps = 1/17!; then for c in (-1/15!, 1/13!, -1/11!, 1/9!, -1/7!, 1/5!, -1/3!, 1.0): ps = ps * q + c;  sin = a * ps
//  10. pc = 1/16!; then for c in (-1/14!, 1/12!, -1/10!, 1/8!, -1/6!, 1/4!, -1/2!, 1.0): pc = pc * q + c;  cos = pc
//      (the constants are float64 quotients 1.0 / n!, all n! here are exact in float64)
//  11. k = 0: (cos, sin);  1: (-sin, cos);  2: (-cos, -sin);  3: (sin, -cos)
//  12. n0 = float32(r * first), n1 = float32(r * second)
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DDFAST_HD __host__ __device__ __forceinline__
#else
#define DDFAST_HD static inline
#endif

namespace ddfast {

struct Philox4 {
  uint32_t x[4];
};

DDFAST_HD Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

DDFAST_HD void box_muller(uint32_t x, uint32_t y, float* n0, float* n1) {
  const double u = ((double)x + 1.0) * 2.3283064365386963e-10;  // 2^-32
  union {
    double f;
    uint64_t i;
  } bits;
  bits.f = u;
  int e = (int)(bits.i >> 52) - 1023;
  bits.i = (bits.i & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  double m = bits.f;
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    e = e + 1;
  }
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 23.0;
  p = p * z + 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  const double log_u = (double)e * 0.6931471805599453 + (2.0 * s) * p;
  const double r = sqrt(-2.0 * log_u);

  const uint32_t k = (y + 0x20000000u) >> 30;
  const int32_t w = (int32_t)(y - (k << 30));
  const double a = (double)w * 1.4629180792671596e-09;  // 2 pi / 2^32
  const double q = a * a;
  double ps = 1.0 / 355687428096000.0;
  ps = ps * q + -1.0 / 1307674368000.0;
  ps = ps * q + 1.0 / 6227020800.0;
  ps = ps * q + -1.0 / 39916800.0;
  ps = ps * q + 1.0 / 362880.0;
  ps = ps * q + -1.0 / 5040.0;
  ps = ps * q + 1.0 / 120.0;
  ps = ps * q + -1.0 / 6.0;
  ps = ps * q + 1.0;
  const double sine = a * ps;
  double pc = 1.0 / 20922789888000.0;
  pc = pc * q + -1.0 / 87178291200.0;
  pc = pc * q + 1.0 / 479001600.0;
  pc = pc * q + -1.0 / 3628800.0;
  pc = pc * q + 1.0 / 40320.0;
  pc = pc * q + -1.0 / 720.0;
  pc = pc * q + 1.0 / 24.0;
  pc = pc * q + -1.0 / 2.0;
  const double cosine = pc * q + 1.0;
  const double first = (k & 1) ? ((k & 2) ? sine : -sine) : ((k & 2) ? -cosine : cosine);
  const double second = (k & 1) ? ((k & 2) ? -cosine : cosine) : ((k & 2) ? -sine : sine);
  *n0 = (float)(r * first);
  *n1 = (float)(r * second);
}

// Elements 4 quad .. 4 quad + 3 of one sample.
DDFAST_HD void noise_quad(uint64_t seed, int64_t index, uint32_t quad, float out[4]) {
  const uint64_t i = (uint64_t)index;
  const Philox4 r = philox4x32_10(quad, (uint32_t)i, (uint32_t)(i >> 32), 0, (uint32_t)seed, (uint32_t)(seed >> 32));
  box_muller(r.x[0], r.x[1], out, out + 1);
  box_muller(r.x[2], r.x[3], out + 2, out + 3);
}

}  // namespace ddfast
