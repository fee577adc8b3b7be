// nearest_code: argmin_j |c_j|^2 / 2 - x.c_j (cosine: of -x.c_j, with codes of norm one), ties to the lowest j.
//
// The index is that of the least float32 value v_j = fma(-x_k, c_k, ..) over k in order, starting from |c_j|^2 / 2, a
// chain of fused products in order. The tensor cores only tell for which codes v_j must be computed: one bf16 product
// gives every score s_j within
//   E_j = (|x - x'| + kBf16Error |x|) |c_j| + kNormError (|c_j|^2 + 2 K)       x' = x rounded to bf16
// of v_j. The smallest upper bound s_i + E_i so far is kept per row; a code with s_j - E_j above it cannot be the
// answer, any other is a candidate. So the index does not depend on what the tensor cores round. At the papers' sizes
// about ten codes per row are candidates; data far from the origin, where E_j is large, has more.
//
// The accumulators start at |c_j|^2 / 2 + K and x is negated, so what the tensor cores return is s_j + K. As
// |c|^2 / 2 - x.c >= -|x|^2 / 2 (cosine: >= -|x|), K from the block's longest row keeps it from being negative, however
// bf16 rounds: then floats are in the order of their bits, and a minimum takes three integers, one instruction on sm_90
// and sm_100. (Beside a row a hundred times longer, K blurs a row's scores: more candidates, in that block.) These
// minima and a comparison per row and strip are all that the other units do. A strip that may hold a candidate (the
// warp votes) is looked at code by code, and candidates go to the warp's list in shared memory. v_j is computed, a
// candidate per lane, when the list is full and at the end; the row's least (v, j) is an integer minimum, whose order
// is free.
//
// A block of 8 warps has 32 rows per row warp; all its warps read the same tiles of codes, converted to bf16 once per
// block, the next one on its way meanwhile. Few rows: fewer row warps, strips are dealt to the rest; and up to 8 blocks
// of a cluster share the tiles: the first takes the least of all blocks' results.
// Registers: 32 rows of bf16 and 32 x 32 scores per warp; up to 128 a thread for d <= 32. Cost: 2 V d tensor-core FLOP
// and V minima per row, codes from L2 once per block; on sm_90 a warp issues 55, 55, 63 or 83 instructions per 32 rows
// and 32 codes at d = 8, 16, 32 or 64 (tests/cuda/sass.py), 16 of them minima, at half rate, and takes 12, 16, 24 or 40
// registers from shared memory, one a cycle and multiprocessor. Built with -fmad=false; fmaf is explicit.
#include "nearest_code.h"

#include "flow_math.h"
#include "simt.h"

namespace ddfast {
namespace {

constexpr int kSearchWarps = 8, kSearchThreads = 32 * kSearchWarps;
constexpr int kWarpRows = 32, kMaxRows = kWarpRows * kSearchWarps;
constexpr int kStripCodes = 32;
constexpr int kListed = 128;  // candidates per warp

// With rounded x' and c', x.c - x'.c' = (x - x').c + x'.(c - c'). A row's |x - x'| is known, about 2^-9.3 |x|; a
// code's is 2^-8 |c| at most. 2^-13 and kNormError are for the sums, of the tensor cores and of v: (d + 8) 2^-22,
// generously.
constexpr float kBf16Error = 0x1p-8f + 0x1p-13f, kNormError = 0x1p-16f;
constexpr float kLeastSquare = 1e-30f;  // of a length; below, squares underflow and bf16 has few bits
constexpr float kMostSquare = 1e36f;    // of a row's; above, and if it is NaN, every code is a candidate
// K is kShift |x|^2, of the longest row: x.c in bf16 is at most (1 + 2^-8)^2 |x| |c|, so |c|^2 / 2 less that at least
// -.508 |x|^2. Cosine: kCosineShift |x|, of codes up to kMostCosine long; longer ones are candidates all.
constexpr float kShift = 0.53f, kCosineShift = 1.06f, kMostCosine = 1.03f;

template <int D>
struct Search {
  static constexpr int kTile = D <= 16 ? 256 : 4096 / D;  // codes in shared memory
  static constexpr int kStrips = kTile / kStripCodes;
  static constexpr int kPlane = D < 32 ? D : 32, kPlanes = D / kPlane;
  static constexpr int kSteps = D < 16 ? 1 : D / 16;              // tensor-core products per score
  static constexpr int kLaneDims = D / 4;                         // coordinates of a row, or code, in a lane
  static constexpr int kLaneWords = (D < 32 ? D : 32) / 8;        //   two to a word, of one plane
  static constexpr int kSharers = kSearchThreads / kTile, kPiece = D / kSharers;  // threads that load a code
};

struct NearestLaunch {
  NearestArguments a;
  int cluster, row_warps, code_warps;  // kSearchWarps / row_warps: the strips' stride
  bool vector_loads;  // codes are 16-byte aligned and have all D coordinates
  float zero;         // the compiler must not know that it is 0
};

struct Candidate {
  uint32_t strip, place;  // the strip's first code; 32 lane + bit, of the lane that has the score
};

template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// Codes as bf16, in planes of 32 coordinates: a lane's share of a code is one load, free of bank conflicts.
template <int D>
struct alignas(16) Strip {
  uint32_t code[Search<D>::kPlanes][kStripCodes][Search<D>::kPlane / 2];
  float start[kStripCodes];  // |c_j|^2 / 2 + K (cosine: K); infinite beyond V
};

template <int D>
struct SearchTile {
  Strip<D> strip[Search<D>::kStrips];
  uint32_t longest[kSearchWarps];  // bits of the largest length of the codes that a warp loaded
};

template <int D>
struct SearchMemory {
  SearchTile<D> tile[2];
  uint64_t best[kMaxRows];  // key of v, code
  Candidate listed[kSearchWarps][kListed];
  uint32_t longest[kSearchWarps];  // bits of the largest length of a warp's rows
};

// The order of a lane's coordinates: any will do for a dot product, this one suits the loads.
template <int D>
__device__ __forceinline__ int coordinate(int q, int p) {
  constexpr int kChunk = 2 * Search<D>::kLaneWords;
  return p / kChunk * 32 + q * kChunk + p % kChunk;
}

// This thread's coordinates of its code of the tile that starts at `first`.
template <int D>
__device__ __forceinline__ void fetch_codes(const NearestLaunch& launch, int64_t first,
                                            float (&piece)[Search<D>::kPiece]) {
  using S = Search<D>;
  const NearestArguments& a = launch.a;
  const int64_t code = first + simt::thread() / S::kSharers;
  const int begin = simt::thread() % S::kSharers * S::kPiece;
  const bool real = code < a.V;
  const float* from = a.codebook + (real ? code : 0) * a.d + begin;
  if (launch.vector_loads) {
#pragma unroll
    for (int i = 0; i < S::kPiece; i += 4) {
      const Words<4> quad = *(const Words<4>*)(from + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) piece[i + k] = real ? simt::bits_float(quad.word[k]) : 0.f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < S::kPiece; ++i) piece[i] = real && begin + i < (int)a.d ? from[i] : 0.f;
  }
}

template <int D>
__device__ __forceinline__ void store_codes(SearchTile<D>& tile, const NearestArguments& a, int64_t first, float shift,
                                            const float (&piece)[Search<D>::kPiece]) {
  using S = Search<D>;
  const int slot = simt::thread() / S::kSharers, begin = simt::thread() % S::kSharers * S::kPiece;
  const int code = slot % kStripCodes;
  Strip<D>& strip = tile.strip[slot / kStripCodes];
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < S::kPiece; i += 8) {
    Words<4> words;
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      words.word[k / 2] = simt::pack_bf16(piece[i + k], piece[i + k + 1]);
      square = fmaf(piece[i + k], piece[i + k], square);
      square = fmaf(piece[i + k + 1], piece[i + k + 1], square);
    }
    const int k = begin + i;
    *(Words<4>*)&strip.code[k / S::kPlane][code][k % S::kPlane / 2] = words;
  }
#pragma unroll
  for (int by = 1; by < S::kSharers; by *= 2) square += simt::shuffle_xor(square, by);
  if (begin == 0)
    strip.start[code] = first + slot >= a.V ? INFINITY : a.cosine ? shift : square / 2.f + shift;
  const float length = sqrtf(square < kLeastSquare ? kLeastSquare : square);
  const uint32_t longest = simt::reduce_max(simt::float_bits(length));  // positive floats are ordered as bits, NaN last
  if (simt::lane() == 0) tile.longest[simt::warp()] = longest;
}

__device__ __forceinline__ float longest_of(const uint32_t (&of_warp)[kSearchWarps]) {
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < kSearchWarps; ++w) bits = of_warp[w] > bits ? of_warp[w] : bits;
  return simt::bits_float(bits);
}

// v of a row and a code.
__device__ __forceinline__ float exact_score(const NearestArguments& a, int64_t row, int64_t code) {
  const float *x = a.x + row * a.d, *c = a.codebook + code * a.d;
  const int d = (int)a.d;
  float score = 0.f;
  if (!a.cosine) {
    for (int k = 0; k < d; ++k) score = fmaf(c[k], c[k], score);
    score /= 2.f;
  }
  for (int k = 0; k < d; ++k) score = fmaf(-x[k], c[k], score);
  return score;
}

template <int D>
__global__ void __launch_bounds__(kSearchThreads, D == 64 ? 1 : 2)
    nearest_kernel(const __grid_constant__ NearestLaunch launch) {  // hot
  using S = Search<D>;
  const NearestArguments& a = launch.a;
  SearchMemory<D>& m = *(SearchMemory<D>*)simt::shared_memory();
  const int rank = simt::cluster_rank(launch.cluster), lane = simt::lane(), g = lane / 4, q = lane % 4;
  const int row_warp = simt::warp() % launch.row_warps, code_warp = simt::warp() / launch.row_warps;
  const int64_t begin = simt::block() / launch.cluster * (int64_t)(kWarpRows * launch.row_warps);
  const auto row_at = [&](int slot) { return begin + slot < a.rows ? begin + slot : a.rows - 1; };
  m.best[simt::thread()] = (uint64_t)0xffffffffu << 32;  // code 0, should every v be NaN

  // Row 16 i + 8 h + g of the warp. x is negated; step s of the tensor cores takes coordinates 4 s .. 4 s + 3.
  uint32_t x[2][S::kSteps][4];
  float blur[2][2], upper[2][2], limit[2][2], error[2][2], longest_row = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* from = a.x + row_at(kWarpRows * row_warp + 16 * i + 8 * h + g) * a.d;
      float square = 0.f, lost = 0.f;  // of the row, and of what rounding takes from it
#pragma unroll
      for (int p = 0; p < S::kLaneDims; p += 2) {
        const int k = coordinate<D>(q, p);
        const float one = k < (int)a.d ? from[k] : 0.f, two = k + 1 < (int)a.d ? from[k + 1] : 0.f;
        const uint32_t both = simt::pack_bf16(-one, -two);
        const float of_one = one + simt::bits_float(both << 16), of_two = two + simt::bits_float(both & 0xffff0000u);
        x[i][p / 4][h + p % 4] = both;
        square = fmaf(one, one, fmaf(two, two, square));
        lost = fmaf(of_one, of_one, fmaf(of_two, of_two, lost));
      }
#pragma unroll
      for (int by = 1; by <= 2; by *= 2) {
        square += simt::shuffle_xor(square, by);
        lost += simt::shuffle_xor(lost, by);
      }
      const bool usual = square < kMostSquare;
      const float length = sqrtf(square < kLeastSquare ? kLeastSquare : square);
      longest_row = usual && length > longest_row ? length : longest_row;
      blur[i][h] = usual ? fmaf(kBf16Error, length, sqrtf(lost)) : INFINITY;
      upper[i][h] = INFINITY;
    }
  const uint32_t longest_bits = simt::reduce_max(simt::float_bits(longest_row));
  if (lane == 0) m.longest[simt::warp()] = longest_bits;
  simt::block_barrier();
  const float longest_x = longest_of(m.longest);
  const float shift = a.cosine ? kCosineShift * longest_x : kShift * longest_x * longest_x;  // K

  Candidate* listed = m.listed[simt::warp()];
  const uint32_t lower = (1u << lane) - 1u;  // lanes
  int count = 0;  // of them, the same in all lanes
  const auto settle = [&] {
    simt::warp_barrier();
    for (int i = lane; i < count; i += 32) {
      const Candidate one = listed[i];
      const uint32_t bit = one.place % 32, of_lane = one.place / 32;
      const uint32_t row = kWarpRows * row_warp + bit / 8 * 8 + of_lane / 4;
      const uint32_t code = one.strip + bit % 8 / 2 * 8 + of_lane % 4 * 2 + bit % 2;
      if (code >= a.V) continue;
      const float score = exact_score(a, row_at((int)row), code);
      if (score == score) simt::atomic_min(&m.best[row], (uint64_t)key_of(score) << 32 | code);
    }
    simt::warp_barrier();
    count = 0;
  };

  const int64_t stride = launch.cluster * (int64_t)S::kTile;
  float piece[S::kPiece];
  fetch_codes<D>(launch, rank * (int64_t)S::kTile, piece);
  int turn = 0;
  for (int64_t first = rank * (int64_t)S::kTile; first < a.V; first += stride, turn ^= 1) {
    SearchTile<D>& tile = m.tile[turn];
    store_codes<D>(tile, a, first, shift, piece);
    if (first + stride < a.V) fetch_codes<D>(launch, first + stride, piece);
    simt::block_barrier();  // this tile is there; the other one was done with before
    const float longest = longest_of(tile.longest);
    const bool ordered = !a.cosine || longest < kMostCosine;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        error[i][h] = fmaf(fmaf(kNormError, longest, blur[i][h]), longest, 2.f * kNormError * shift);
        if (!ordered) error[i][h] = INFINITY;
        limit[i][h] = upper[i][h] + error[i][h];
      }

    const auto* codes = (const Words<S::kLaneWords>*)tile.strip[code_warp].code + lane;
    const auto* starts = (const Words<2>*)tile.strip[code_warp].start + q;
    const int stride_words = launch.code_warps * (int)(sizeof(Strip<D>) / sizeof *codes);
    const int stride_pairs = launch.code_warps * (int)(sizeof(Strip<D>) / sizeof *starts);
#pragma unroll 1
    for (int at = code_warp; at < S::kStrips; at += launch.code_warps, codes += stride_words, starts += stride_pairs) {
      float score[2][4][4];  // rows 16 i + 8 h + g: [i][n][2 h + e] of code 8 n + 2 q + e of the strip
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t code[S::kPlanes * S::kLaneWords];
#pragma unroll
        for (int plane = 0; plane < S::kPlanes; ++plane) {
          const Words<S::kLaneWords> words = codes[4 * (plane * kStripCodes + 8 * n)];
#pragma unroll
          for (int w = 0; w < S::kLaneWords; ++w) code[plane * S::kLaneWords + w] = words.word[w];
        }
        // The lower rows' are sums with 0: given one register twice, the compiler copies all four for every product,
        // and to load each twice keeps shared memory busy twice as long.
        const Words<2> pair = starts[4 * n];
        const float one = simt::bits_float(pair.word[0]), two = simt::bits_float(pair.word[1]);
        float start[4] = {one, two, one + launch.zero, two + launch.zero};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float(&out)[4] = score[i][n];
          if constexpr (D == 8) {
            simt::mma_bf16_k8(out, x[i][0], code, start);
          } else {
#pragma unroll
            for (int s = 0; s < S::kSteps; ++s) simt::mma_bf16_k16(out, x[i][s], code + 2 * s, s ? out : start);
          }
        }
      }
      float low[2][2];
      bool candidate = false;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int32_t least = INT32_MAX;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const int32_t bits = (int32_t)simt::float_bits(score[i][c / 2][2 * h + c % 2]);
            least = bits < least ? bits : least;
          }
          low[i][h] = simt::bits_float((uint32_t)least);
          candidate |= !(low[i][h] > limit[i][h]);  // NaN: may be
        }
      if (!simt::ballot(candidate)) continue;
      uint32_t mine = 0;  // bit 16 i + 8 h + 2 n + e
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!simt::ballot(!(low[i][h] > limit[i][h]))) continue;
          float least = low[i][h];
          least = fminf(least, simt::shuffle_xor(least, 1));
          least = fminf(least, simt::shuffle_xor(least, 2));
          upper[i][h] = fminf(upper[i][h], least + error[i][h]);
          limit[i][h] = upper[i][h] + error[i][h];
#pragma unroll
          for (int c = 0; c < 8; ++c)
            mine |= (uint32_t) !(score[i][c / 2][2 * h + c % 2] > limit[i][h]) << (16 * i + 8 * h + c);
        }
      for (uint32_t who = simt::ballot(mine != 0); who != 0; who = simt::ballot(mine != 0)) {
        if (count + 32 > kListed) settle();
        if (mine) {
          const uint32_t place = 32 * lane + simt::lowest_bit(mine);
          listed[count + simt::count_bits(who & lower)] = {(uint32_t)first + at * kStripCodes, place};
          mine &= mine - 1;
        }
        count += simt::count_bits(who);
      }
    }
  }
  settle();

  simt::cluster_barrier(launch.cluster);
  const int slot = simt::thread();
  if (rank == 0 && slot < kWarpRows * launch.row_warps && begin + slot < a.rows) {
    uint64_t best = m.best[slot];
#pragma unroll 1
    for (int other = 1; other < launch.cluster; ++other) {
      const uint64_t theirs = *simt::of_rank(&m.best[slot], other, launch.cluster);
      best = theirs < best ? theirs : best;
    }
    a.codes[begin + slot] = (int64_t)(uint32_t)best;
  }
  simt::cluster_barrier(launch.cluster);  // no block leaves while its rows are read
}

template <int D>
cudaError_t launch_nearest(const NearestArguments& a, int cluster, cudaStream_t stream) {
  using S = Search<D>;
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  // As many rows per block as leave a block for every multiprocessor, and no warp without a strip.
  int row_warps = kSearchWarps;
  const auto groups = [&] { return (a.rows + kWarpRows * row_warps - 1) / (kWarpRows * row_warps); };
  while (row_warps * S::kStrips > kSearchWarps && groups() < device.multiprocessors) row_warps /= 2;
  if (cluster == 0)
    for (cluster = 1; device.clusters && cluster < 8 && groups() * cluster <= device.multiprocessors &&
                      2 * cluster * S::kTile <= a.V;)
      cluster *= 2;
  if (!simt::is_cluster_size(cluster) || groups() * cluster >= (int64_t)1 << 31) return cudaErrorInvalidValue;
  const bool vector_loads = a.d == D && (uintptr_t)a.codebook % 16 == 0;
  const NearestLaunch launch{a, cluster, row_warps, kSearchWarps / row_warps, vector_loads, 0.f};
  return simt::launch(nearest_kernel<D>, groups() * cluster, kSearchThreads, sizeof(SearchMemory<D>), cluster, stream,
                      launch);
}

}  // namespace

cudaError_t nearest_code_cuda(const NearestArguments& a, int cluster, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.d < 1 || a.d > kNearestMaxDim || a.V < 1 || a.V >= (int64_t)1 << 31) return cudaErrorInvalidValue;
  return a.d <= 8    ? launch_nearest<8>(a, cluster, stream)
         : a.d <= 16 ? launch_nearest<16>(a, cluster, stream)
         : a.d <= 32 ? launch_nearest<32>(a, cluster, stream)
                     : launch_nearest<64>(a, cluster, stream);
}

}  // namespace ddfast
