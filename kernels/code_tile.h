// Rows times codes on the tensor cores, in float32 precision, for codebook_posterior.cu.
//
// Every float is split as hi + lo, hi its nearest tf32 number; x.c = lo.hi + hi.lo + hi.hi by three tensor-core
// products (3xTF32). The error stays below kDotError<D> |x| |c|.
//
// A block has kRowWarps x kCodeWarps warps. A warp has 16 rows (two per lane) and, of every tile of codes in shared
// memory, a strip of 32 (eight per lane). With lane = 4 g + q: rows g and g + 8, codes 8 q .. 8 q + 7 of the strip, so
// that a lane reads its log-probabilities 16 bytes at a time. Within the strip code 8 q + 2 n + e is column 2 q + e of
// the n-th tensor-core tile; the products are read and summed in that order of columns throughout.
//
// A product's inner index may run in any order, so that what a lane needs of it lies together: coordinates 2 q and
// 2 q + 1 of x and c serve as q and q + 4 of x.c (16 bytes with both parts), columns 2 q and 2 q + 1 as those of w.c.
#pragma once

#include <cstdint>

#include "simt.h"

namespace ddfast {
namespace {

constexpr int kRowWarps = 2, kCodeWarps = 2, kTileThreads = 32 * kRowWarps * kCodeWarps;
constexpr int kRows = 16 * kRowWarps, kStrip = 32, kTileCodes = kStrip * kCodeWarps;

// Of a three-product dot relative to |x| |c|: the tf32 cut of the two lo, and a rounding of at most 2^-22 for each of
// the 3 D / 8 sums that the hardware takes, two or more products at a time; generous on purpose.
template <int D>
constexpr float kDotError = (float)(D + 4) / 4194304.f;

struct alignas(8) Two {
  float value[2];
};
struct alignas(16) Four {
  float value[4];
};

template <int D>
struct CodeTile {
  // Rows 8 words apart modulo the 32 banks, in the order of `place_of`: no conflict in any read below.
  static constexpr int kStride = D == 8 ? 8 : D + 8;
  alignas(16) float hi[kTileCodes][kStride], lo[kTileCodes][kStride];
  alignas(16) float half_norm[kTileCodes];  // by slot
  alignas(16) uint32_t largest[kTileThreads / 32];  // squared norm that each warp loaded, as bits
};

// The parts of kRows rows, as the lanes of a warp take them: [.][k / 8][hi, lo][lane].
template <int D>
struct RowTile {
  Four part[kRowWarps][D / 8][2][32];
};

__device__ __forceinline__ float tf32_of(float x) {  // round to nearest, ties away from zero
  return simt::bits_float((simt::float_bits(x) + 0x1000u) & 0xffffe000u);
}

// The slot, in the order of columns, of code number `offset` of a strip.
__device__ __forceinline__ int column_of(int offset) { return offset % 8 / 2 * 8 + offset / 8 * 2 + offset % 2; }

// Where a slot lies: of eight columns 0 2 4 6 5 7 1 3. Rows 2 q, rows 2 q + 1 and, for reads of 16 bytes, each pair of
// rows then fall into different banks.
__device__ __forceinline__ int place_of(int slot) {
  const int column = slot % 8;
  return slot - column + (column % 2 ? 4 + (column / 2 + 2) % 4 : column / 2);
}

template <int D>
__device__ __forceinline__ void put(RowTile<D>& rows, int row, int k, float value) {
  const int lane = row % 8 * 4 + k % 8 / 2, i = row / 8 % 2 + k % 2 * 2;
  const float hi = tf32_of(value);
  rows.part[row / 16][k / 8][0][lane].value[i] = hi;
  rows.part[row / 16][k / 8][1][lane].value[i] = value - hi;
}

// Coordinates k .. k + 3 of a vector, zeros beyond d. `whole`: it is 16-byte aligned and has all four.
__device__ __forceinline__ Four load_four(const float* vector, int k, int d, bool whole) {
  if (whole) return *(const Four*)(vector + k);
  Four out;
#pragma unroll
  for (int e = 0; e < 4; ++e) out.value[e] = k + e < d ? vector[k + e] : 0.f;
  return out;
}

// This thread's part of codes first .. first + kTileCodes - 1, two threads per code; beyond V, of the last one.
template <int D>
__device__ __forceinline__ void fetch_codes(Four (&c)[D / 8], const float* codebook, int V, int d, bool whole,
                                            int first) {
  static_assert(kTileThreads == 2 * kTileCodes, "two threads per code");
  const int code = first + simt::thread() / 2 < V ? first + simt::thread() / 2 : V - 1;
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
    c[i] = load_four(codebook + (int64_t)code * d, 8 * i + simt::thread() % 2 * 4, d, whole);
}

// No barrier here.
template <int D>
__device__ __forceinline__ void store_codes(CodeTile<D>& tile, const Four (&c)[D / 8]) {
  const int offset = simt::thread() / 2, slot = offset / kStrip * kStrip + column_of(offset % kStrip);
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    Four hi, lo;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      hi.value[e] = tf32_of(c[i].value[e]);
      lo.value[e] = c[i].value[e] - hi.value[e];
      square = fmaf(c[i].value[e], c[i].value[e], square);
    }
    const int place = place_of(slot), k = 8 * i + simt::thread() % 2 * 4;
    *(Four*)&tile.hi[place][k] = hi;
    *(Four*)&tile.lo[place][k] = lo;
  }
  square += simt::shuffle_xor(square, 1);
  if (simt::thread() % 2 == 0) tile.half_norm[slot] = square / 2.f;
  const uint32_t largest = simt::reduce_max(simt::float_bits(square));
  if (simt::lane() == 0) tile.largest[simt::warp()] = largest;
}

// The largest squared norm of the tile's codes.
template <int D>
__device__ __forceinline__ float largest_square(const CodeTile<D>& tile) {
  uint32_t largest = 0;
#pragma unroll
  for (uint32_t bits : tile.largest) largest = bits > largest ? bits : largest;
  return simt::bits_float(largest);
}

// dot[n][e + 2 r] += row g + 8 r of the warp's 16 times the code in column 2 q + e of tile n of the strip that starts
// at `strip`.
template <int D>
__device__ __forceinline__ void strip_dots(const RowTile<D>& rows, const CodeTile<D>& tile, int row_warp, int strip,
                                           float (&dot)[4][4]) {
  const int g = simt::lane() / 4, q = simt::lane() % 4, place = place_of(g);
#pragma unroll
  for (int k = 0; k < D / 8; ++k) {
    const Four first = rows.part[row_warp][k][0][simt::lane()], second = rows.part[row_warp][k][1][simt::lane()];
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      hi[i] = simt::float_bits(first.value[i]);
      lo[i] = simt::float_bits(second.value[i]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Two c_hi = *(const Two*)&tile.hi[strip + 8 * n + place][8 * k + 2 * q];
      const Two c_lo = *(const Two*)&tile.lo[strip + 8 * n + place][8 * k + 2 * q];
      const uint32_t code_hi[2] = {simt::float_bits(c_hi.value[0]), simt::float_bits(c_hi.value[1])};
      const uint32_t code_lo[2] = {simt::float_bits(c_lo.value[0]), simt::float_bits(c_lo.value[1])};
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
  const int g = simt::lane() / 4, q = simt::lane() % 4, even = place_of(2 * q), odd = place_of(2 * q + 1);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float w = weight[n][i / 2 + i % 2 * 2], high = simt::bits_float(simt::float_bits(w) & 0xffffe000u);
      hi[i] = simt::float_bits(high);
      lo[i] = simt::float_bits(w - high);
    }
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      const int k = 8 * m + g, first = strip + 8 * n + even, second = strip + 8 * n + odd;
      const uint32_t code_hi[2] = {simt::float_bits(tile.hi[first][k]), simt::float_bits(tile.hi[second][k])};
      const uint32_t code_lo[2] = {simt::float_bits(tile.lo[first][k]), simt::float_bits(tile.lo[second][k])};
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
__device__ __forceinline__ float warp_min(float value) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = simt::shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}

inline int dim_class(int64_t d) { return d <= 8 ? 8 : d <= 16 ? 16 : d <= 32 ? 32 : 64; }

}  // namespace
}  // namespace ddfast
