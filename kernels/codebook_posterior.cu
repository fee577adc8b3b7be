// codebook_posterior: x0_hat = sum_j w_j c_j with w = softmax(s), s_j = log p_j - |x - (1-t) c_j|^2 / (2 t^2), and its
// vector-Jacobian product dx = (1-t)/t^2 sum_j w_j c_j ((c_j - x0_hat).g).
// docs/method.md section 2 (The closed-form flow).
//
// As in flash attention: scores of a tile of rows and codes by tensor cores, an online softmax in registers, the
// weighted sum by tensor cores again; nothing of size [rows, V] is written. Products are 3xTF32 (code_tile.h), so with
// E_j = (1-t)/t^2 |x| |c_j| + ((1-t)/t)^2 |c_j|^2 / 2 + |x|^2 / (2 t^2) / 16 a score is off by about 2^-22 E_j. Where
// E_j exceeds kExactBeyond (small t) the score of a code that may matter is computed again, in float32 from the
// difference x - (1-t) c_j, which is of order t for such a code: few matter then. One that cannot come within
// kNegligible of the row's largest score, given the bound of the error, weighs nothing.
// Which way a score is computed depends on its row and code alone; sums have a fixed order: a row's result does not
// depend on the batch. Backward computes the weights again from log_norm = log sum_j exp(s_j).
//
// A block has 32 rows; its warps have 16 rows and every other strip of 32 codes, and are merged at the end. Rows are
// taken token by token: the noise draws of a token, rows r, r + period, .., sit in one block and read its
// log-probabilities from the L1 cache. Shared memory: 64 codes (hi and lo) and the rows. Registers: scores, log p and
// the sums (d / 2 floats). Cost per row and code: forward 2 x 3 d tensor-core products, backward 3 x 3 d; one
// exponential; log p once per token from memory, which is the floor: 4 V bytes per token in float32.
#include "codebook_posterior.h"

#include "code_tile.h"
#include "logits.h"

namespace ddfast {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = .693147181f, kLargest = 3e38f;
constexpr float kNegligible = 25.f * kLog2E;  // V weights of e^-25 are below float32's rounding
constexpr float kExactBeyond = 512.f;

struct PosteriorLaunch {
  PosteriorArguments a;
  bool vector_loads, vector_codes;  // rows of log_probs, of the codebook, are 16-byte aligned; vector_codes: d = D, too
};

template <int D, bool kBackward>
struct PosteriorMemory {
  CodeTile<D> codes;
  RowTile<D> rows[kBackward ? 2 : 1];  // x times (1-t)/t^2 log2(e), the gradient
  float t[kRows], square[kRows], shift[kRows];  // square: |x|^2; shift: x0_hat.g
  // What the warps of the second strips leave for those of the first.
  float most[kRows], total[kRows], sum[kRows][D + 1];
};

struct alignas(16) Chunk {
  uint32_t word[4];
};

// out = log p of codes first .. first + 7 of a row; -inf beyond V.
__device__ __forceinline__ void load_log_probs(const PosteriorLaunch& launch, int64_t row, int64_t first,
                                               float (&out)[8]) {
  const PosteriorArguments& a = launch.a;
  const int64_t at = row * a.stride + first;
  if (launch.vector_loads && first + 8 <= a.V) {
    if (a.dtype == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk chunk = *(const Chunk*)((const float*)a.log_probs + at + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[4 * half + i] = simt::bits_float(chunk.word[i]);
      }
    } else {
      const Chunk chunk = *(const Chunk*)((const uint16_t*)a.log_probs + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = float_of_bits16((uint16_t)(chunk.word[i / 2] >> (i % 2 * 16)), a.dtype);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = first + i < a.V ? load_logit(a.log_probs, a.dtype, at + i) : kNegInf;
}

// The i-th row in the order of tokens, the draws of one token next to each other.
__device__ __forceinline__ int64_t row_of(const PosteriorArguments& a, int64_t i) {
  const int64_t draws = a.rows / a.period;
  return i % draws * a.period + i / draws;
}

// What scores need of a row, in powers of two.
struct RowScore {
  float along, norm_scale, base;  // (1-t)/t^2 |x|, ((1-t)/t)^2, |x|^2 / (2 t^2)
  float limit;                    // the largest |c|^2 that a score without differences is right for
};

__device__ __forceinline__ RowScore row_score(float t, float square) {
  const float inverse = 1.f / t, ratio = (1.f - t) * inverse;
  RowScore row = {ratio * inverse * sqrtf(square) * kLog2E, ratio * ratio * kLog2E,
                  .5f * square * inverse * inverse * kLog2E, -1.f};
  // E_j <= kExactBeyond, a quadratic in |c_j|.
  const float room = kExactBeyond * kLog2E - row.base / 16.f;
  if (room > 0.f) {
    const float norm = 2.f * room / (row.along + sqrtf(fmaf(2.f * row.norm_scale, room, row.along * row.along)));
    row.limit = norm * norm;
  }
  return row;
}

// Of each of a lane's two rows; NaN is passed over.
__device__ __forceinline__ void lane_max(const float (&score)[4][4], float (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = kNegInf;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest[r] = fmaxf(largest[r], score[i / 2][i % 2 + 2 * r]);
  }
}

// What a lane has of a strip's scores: of codes code .. code + 7, of rows `row` and `row` + 8 of the block.
// In place of scores that the products do not give exactly enough: those that may matter, from differences; else -inf.
// False if no row of the warp has anything in the strip.
template <int D, bool kBackward>
__device__ __forceinline__ bool refine(const PosteriorLaunch& launch, const PosteriorMemory<D, kBackward>& m, int64_t begin,
                                       int row, int64_t code, const float (&most)[2], float (&score)[4][4],
                                       float (&largest)[2]) {
  const PosteriorArguments& a = launch.a;
  const float square = largest_square(m.codes);
  uint32_t mattering = 0;
  bool inexact[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowScore of_row = row_score(m.t[row + 8 * r], m.square[row + 8 * r]);
    inexact[r] = square > of_row.limit;
    const float error =
        kDotError<D> * fmaf(of_row.along, sqrtf(square), fmaf(of_row.norm_scale / 2.f, square, of_row.base));
    float least = most[r];
    if (!kBackward) {
      const float highest = row_max(largest[r]);  // +inf must stand out from it
      const float low = (highest < kLargest ? highest : kLargest) - error;
      least = low > least ? low : least;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& s = score[i / 2][i % 2 + 2 * r];
      // Written so that NaN matters.
      if (inexact[r] && !(s <= least - error - kNegligible)) mattering |= 1u << (8 * r + i);
      if (inexact[r]) s = kNegInf;
    }
  }
  if (!simt::ballot(mattering || !inexact[0] || !inexact[1])) return false;
  while (simt::ballot(mattering != 0)) {
    int slot = -1;
    float s = 0.f;
    if (mattering) {
      slot = simt::lowest_bit(mattering);
      const int64_t i = begin + row + slot / 8 * 8, at = row_of(a, i < a.rows ? i : a.rows - 1);
      const int64_t j = code + slot % 8 < a.V ? code + slot % 8 : a.V - 1;
      const float *x = a.x + at * a.d, *c = a.codebook + j * a.d, t = a.t[at];
      float distance = 0.f;
#pragma unroll 4
      for (int k = 0; k < (int)a.d; ++k) {
        const float difference = fmaf(t - 1.f, c[k], x[k]);
        distance = fmaf(difference, difference, distance);
      }
      s = (load_logit(a.log_probs, a.dtype, at % a.period * a.stride + j) - .5f / (t * t) * distance) * kLog2E;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i == slot) score[i % 8 / 2][i % 2 + 2 * (i / 8)] = s;
    mattering &= mattering - 1;
  }
  lane_max(score, largest);
  return true;
}

template <int D, bool kBackward>
__global__ void __launch_bounds__(kTileThreads, D == 64 ? 2 : D == 32 && kBackward ? 3 : 4)
    posterior_kernel(const __grid_constant__ PosteriorLaunch launch) {  // hot
  const PosteriorArguments& a = launch.a;
  PosteriorMemory<D, kBackward>& m = *(PosteriorMemory<D, kBackward>*)simt::shared_memory();
  const int d = (int)a.d;
  const int64_t begin = simt::block() * (int64_t)kRows;
  const int row_warp = simt::warp() / kCodeWarps, code_warp = simt::warp() % kCodeWarps;
  const int g = simt::lane() / 4, q = simt::lane() % 4, first_row = 16 * row_warp + g, strip = kStrip * code_warp;
  const auto clamped = [&](int i) { return row_of(a, begin + i < a.rows ? begin + i : a.rows - 1); };

  for (int i = simt::thread(); i < kRows * D; i += kTileThreads) {
    const int row = i / D, k = i % D;
    const int64_t at = clamped(row);
    const float t = a.t[at];
    put(m.rows[0], row, k, k < d ? a.x[at * d + k] * ((1.f - t) / t / t * kLog2E) : 0.f);
    if (kBackward) put(m.rows[kBackward], row, k, k < d ? a.grad[at * d + k] : 0.f);
  }
  if (simt::thread() < kRows) {
    const int row = simt::thread();
    const int64_t at = clamped(row);
    double square = 0.;
    float shift = 0.f;
    for (int k = 0; k < d; ++k) {
      square += (double)a.x[at * d + k] * a.x[at * d + k];
      if (kBackward) shift = fmaf(a.grad[at * d + k], a.x0[at * d + k], shift);
    }
    m.t[row] = a.t[at];
    m.square[row] = (float)square;
    m.shift[row] = shift;
  }
  simt::block_barrier();

  // Weights are 2^(score - peak); forward, peak is the largest score so far, 0 as long as that is -inf.
  float norm_scale[2], base[2], most[2], peak[2], total[2] = {0.f, 0.f}, sum[D / 8][4] = {}, limit = INFINITY;
  int64_t source[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowScore row = row_score(m.t[first_row + 8 * r], m.square[first_row + 8 * r]);
    norm_scale[r] = row.norm_scale;
    base[r] = row.base;
    limit = row.limit < limit ? row.limit : limit;
    most[r] = kBackward ? a.log_norm[clamped(first_row + 8 * r)] * kLog2E : kNegInf;
    peak[r] = kBackward ? most[r] : 0.f;
    source[r] = clamped(first_row + 8 * r) % a.period;
  }
  limit = warp_min(limit);

  for (int64_t first = 0; first < a.V; first += kTileCodes) {
    Four codes[D / 8];
    fetch_codes<D>(codes, a.codebook, a.V, d, launch.vector_codes, first);
    float log_p[2][8];
#pragma unroll
    for (int r = 0; r < 2; ++r) load_log_probs(launch, source[r], first + strip + 8 * q, log_p[r]);
    simt::block_barrier();  // the last tile is done with
    store_codes<D>(m.codes, codes);
    simt::block_barrier();
    float score[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Two half_norm = *(const Two*)&m.codes.half_norm[strip + 8 * n + 2 * q];
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = fmaf(-norm_scale[i / 2], half_norm.value[i % 2], -base[i / 2]);
    }
    strip_dots<D>(m.rows[0], m.codes, row_warp, strip, score);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& s = score[i % 8 / 2][i % 2 + 2 * (i / 8)];
      s = fmaf(log_p[i / 8][i % 8], kLog2E, s);
    }
    float largest[2];
    lane_max(score, largest);
    if (largest_square(m.codes) > limit) {
      const int64_t code = first + strip + 8 * q;
      if (!refine<D, kBackward>(launch, m, begin, first_row, code, most, score, largest)) continue;
    }
    if (!kBackward && simt::ballot(largest[0] > most[0] || largest[1] > most[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = most[r], now = row_max(largest[r]);
        most[r] = now > before ? now : before;
        peak[r] = most[r] == kNegInf ? 0.f : most[r];
        const float fade = simt::fast_exp2(before - peak[r]);
        total[r] *= fade;
#pragma unroll
        for (int k = 0; k < D / 8; ++k) {
          sum[k][2 * r] *= fade;
          sum[k][2 * r + 1] *= fade;
        }
      }
    }
    float dot[kBackward ? 4 : 1][4] = {};
    if constexpr (kBackward) strip_dots<D>(m.rows[1], m.codes, row_warp, strip, dot);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = i / 8;
      float& s = score[i % 8 / 2][i % 2 + 2 * r];
      s = simt::fast_exp2(s - peak[r]);
      if constexpr (kBackward) s *= dot[i % 8 / 2][i % 2 + 2 * r] - m.shift[first_row + 8 * r];
      total[r] += s;
    }
    add_weighted<D>(m.codes, strip, score, sum);
  }

  // Both halves of the codes, then the four lanes of a row.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    total[r] = row_sum(total[r]);
    if (code_warp == 0) continue;
    if (q == 0) {
      m.most[row] = most[r];
      m.total[row] = total[r];
    }
#pragma unroll
    for (int k = 0; k < D; ++k)
      if (k % 8 / 2 == q) m.sum[row][k] = sum[k / 8][2 * r + k % 2];
  }
  static_assert(kCodeWarps == 2, "the merge below is of two");
  simt::block_barrier();
  if (code_warp == 1) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    if (begin + row >= a.rows) continue;
    const int64_t out = clamped(row);
    const float highest = most[r] > m.most[row] ? most[r] : m.most[row];
    const float own = kBackward || highest == kNegInf ? 1.f : simt::fast_exp2(most[r] - highest);
    const float others = kBackward || highest == kNegInf ? 1.f : simt::fast_exp2(m.most[row] - highest);
    // NaN if a log-probability is NaN or +inf; 0 if all are -inf.
    const float all = own * total[r] + others * m.total[row];
    const bool usable = kBackward || all > 0.f;
    if (!kBackward && q == 0) a.log_norm[out] = usable ? fmaf(highest, kLn2, logf(all)) : NAN;
    const float t = m.t[row], along = (1.f - t) / t / t;
#pragma unroll
    for (int k = 0; k < D; ++k) {
      if (k % 8 / 2 != q || k >= d) continue;
      const float value = own * sum[k / 8][2 * r + k % 2] + others * m.sum[row][k];
      if (kBackward) {
        // The weights' rounding shifts every (c_j - x0_hat).g alike; subtracting all x0_hat removes that shift.
        a.dx[out * d + k] = along * (value - all * a.x0[out * d + k]);
      } else {
        a.x0[out * d + k] = usable ? value / all : NAN;
      }
    }
  }
}

template <bool kBackward>
cudaError_t launch_posterior(const PosteriorArguments& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int64_t blocks = (a.rows + kRows - 1) / kRows;
  if (a.d < 1 || a.d > kPosteriorMaxDim || a.V < 1 || a.period < 1 || a.rows % a.period != 0 ||
      blocks >= (int64_t)1 << 31)
    return cudaErrorInvalidValue;
  const int64_t per_chunk = a.dtype == 0 ? 4 : 8;
  const PosteriorLaunch launch{a, (uintptr_t)a.log_probs % 16 == 0 && (a.period == 1 || a.stride % per_chunk == 0),
                               (uintptr_t)a.codebook % 16 == 0 && a.d == dim_class(a.d)};
  const auto run = [&](auto kernel, size_t shared) {
    return simt::launch(kernel, blocks, kTileThreads, shared, 1, stream, launch);
  };
  switch (dim_class(a.d)) {
    case 8: return run(posterior_kernel<8, kBackward>, sizeof(PosteriorMemory<8, kBackward>));
    case 16: return run(posterior_kernel<16, kBackward>, sizeof(PosteriorMemory<16, kBackward>));
    case 32: return run(posterior_kernel<32, kBackward>, sizeof(PosteriorMemory<32, kBackward>));
    default: return run(posterior_kernel<64, kBackward>, sizeof(PosteriorMemory<64, kBackward>));
  }
}

}  // namespace

cudaError_t codebook_posterior_forward_cuda(const PosteriorArguments& arguments, cudaStream_t stream) {
  return launch_posterior<false>(arguments, stream);
}

cudaError_t codebook_posterior_backward_cuda(const PosteriorArguments& arguments, cudaStream_t stream) {
  return launch_posterior<true>(arguments, stream);
}

}  // namespace ddfast
