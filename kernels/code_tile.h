// Rows times codes on the tensor cores, in float32 precision, for codebook_posterior.cu.
//
// Every float is split as hi + lo, hi its nearest tf32 number; x.c = lo.hi + hi.lo + hi.hi by three tensor-core
// products (3xTF32). lo is kept exactly, so hi + lo gives the float back. The error stays below kDotError<D> |x| |c|.
//
// A block has kRowWarps x kCodeWarps warps. A warp has 16 rows (two per lane) and, of every tile of codes in shared
// memory, a strip of 32 (eight per lane). With lane = 4 g + q: rows g and g + 8, codes 8 q .. 8 q + 7 of the strip, so
// that a lane reads its log-probabilities 16 bytes at a time. Within the strip code 8 q + 2 n + e is column 2 q + e of
// the n-th tensor-core tile; the products are read and summed in that order of columns throughout.
#pragma once

#include <cstdint>

#include "simt.h"

namespace ddfast {
namespace {

constexpr int kRowWarps = 2, kCodeWarps = 2, kTileThreads = 32 * kRowWarps * kCodeWarps;
constexpr int kRows = 16 * kRowWarps, kStrip = 32, kTileCodes = kStrip * kCodeWarps;
constexpr float kPaddingNorm = 3e38f;  // half norm of what lies beyond V

// Of a three-product dot relative to |x| |c|: the tf32 cut of the two lo, and a rounding of at most 2^-22 for each of
// the 3 D / 8 sums that the hardware takes, two or more products at a time; generous on purpose.
template <int D>
constexpr float kDotError = (float)(D + 4) / 4194304.f;

template <int D>
struct CodeTile {
  static constexpr int kStride = D + 4;  // makes every fragment's reads free of bank conflicts
  float hi[kTileCodes][kStride], lo[kTileCodes][kStride];
  float half_norm[kTileCodes], norm[kTileCodes];
};

template <int D>
struct RowTile {
  static constexpr int kStride = D + 4;
  float value[kRows][kStride];
};

__device__ __forceinline__ float tf32_of(float x) {  // round to nearest, ties away from zero
  return simt::bits_float((simt::float_bits(x) + 0x1000u) & 0xffffe000u);
}

// The slot, in the order of columns, of code number `offset` of a strip.
__device__ __forceinline__ int column_of(int offset) { return offset % 8 / 2 * 8 + offset / 8 * 2 + offset % 2; }

// Codes first .. first + kTileCodes - 1 of the codebook; two threads per code. No barrier here.
template <int D>
__device__ __forceinline__ void load_codes(CodeTile<D>& tile, const float* codebook, int64_t V, int d, int64_t first) {
  constexpr int kHalf = D / 2;
  static_assert(kTileThreads == 2 * kTileCodes, "two threads per code");
  const int offset = simt::thread() / 2, side = simt::thread() % 2;
  const int slot = offset / kStrip * kStrip + column_of(offset % kStrip);
  const bool real = first + offset < V;
  const float* from = codebook + (real ? first + offset : 0) * d;
  float norm = 0.f;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int k = side * kHalf + i;
    const float c = real && k < d ? from[k] : 0.f, hi = tf32_of(c);
    tile.hi[slot][k] = hi;
    tile.lo[slot][k] = c - hi;
    norm = fmaf(c, c, norm);
  }
  norm += simt::shuffle_xor(norm, 1);
  if (side == 0) {
    tile.half_norm[slot] = real ? norm / 2.f : kPaddingNorm;
    tile.norm[slot] = real ? sqrtf(norm) : 0.f;
  }
}

// dot[n][e + 2 r] = row g + 8 r of `rows` times the code in column 2 q + e of tile n of the strip that starts at
// `strip`.
template <int D>
__device__ __forceinline__ void strip_dots(const RowTile<D>& rows, const CodeTile<D>& tile, int first_row, int strip,
                                           float (&dot)[4][4]) {
  const int g = simt::lane() / 4, q = simt::lane() % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[n][i] = 0.f;
#pragma unroll 1  // unrolled, the fragments of all steps are loaded ahead, into more registers than there are
  for (int k = 0; k < D; k += 8) {
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = rows.value[first_row + g + i % 2 * 8][k + q + i / 2 * 4], high = tf32_of(x);
      hi[i] = simt::float_bits(high);
      lo[i] = simt::float_bits(x - high);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int slot = strip + 8 * n + g;
      const uint32_t code_hi[2] = {simt::float_bits(tile.hi[slot][k + q]), simt::float_bits(tile.hi[slot][k + q + 4])};
      const uint32_t code_lo[2] = {simt::float_bits(tile.lo[slot][k + q]), simt::float_bits(tile.lo[slot][k + q + 4])};
      simt::mma_tf32(dot[n], lo, code_hi);
      simt::mma_tf32(dot[n], hi, code_lo);
      simt::mma_tf32(dot[n], hi, code_hi);
    }
  }
}

// sum[m][..] += weights times codes of the strip: rows g and g + 8, coordinates 8 m + 2 q and 8 m + 2 q + 1.
template <int D>
__device__ __forceinline__ void add_weighted(const CodeTile<D>& tile, int strip, const float (&weight)[4][4],
                                             float (&sum)[D / 8][4]) {
  const int g = simt::lane() / 4, q = simt::lane() % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    // The sum runs over codes in any order, so the lane's own columns 2 q and 2 q + 1 serve as rows q and q + 4.
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float w = weight[n][i / 2 + i % 2 * 2], high = tf32_of(w);
      hi[i] = simt::float_bits(high);
      lo[i] = simt::float_bits(w - high);
    }
    const int slot = strip + 8 * n + 2 * q;
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      const int k = 8 * m + g;
      const uint32_t code_hi[2] = {simt::float_bits(tile.hi[slot][k]), simt::float_bits(tile.hi[slot + 1][k])};
      const uint32_t code_lo[2] = {simt::float_bits(tile.lo[slot][k]), simt::float_bits(tile.lo[slot + 1][k])};
      simt::mma_tf32(sum[m], lo, code_hi);
      simt::mma_tf32(sum[m], hi, code_lo);
      simt::mma_tf32(sum[m], hi, code_hi);
    }
  }
}

// Reductions over the four lanes that share a row.
__device__ __forceinline__ float row_max(float value) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const float other = simt::shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) value += simt::shuffle_xor(value, mask);
  return value;
}

inline int dim_class(int64_t d) { return d <= 8 ? 8 : d <= 16 ? 16 : d <= 32 ? 32 : 64; }

}  // namespace
}  // namespace ddfast
