// codebook_posterior: x0_hat = sum_j w_j c_j with w = softmax(s), s_j = log p_j - |x - (1-t) c_j|^2 / (2 t^2), and its
// vector-Jacobian product dx = (1-t)/t^2 sum_j w_j c_j ((c_j - x0_hat).g).
// docs/method.md section 2 (The closed-form flow).
//
// As in flash attention: scores of a tile of rows and codes by tensor cores, an online softmax in registers, the
// weighted sum by tensor cores again; nothing of size [rows, V] is written. Products are 3xTF32 (code_tile.h). They start
// from -((1-t)/t)^2 |c|^2 / 2 less what the weights are relative to, so that a score is one multiply-add away from them;
// all is in powers of two, log2(e) being part of x and of the norms.
//
// With E_j = (1-t)/t^2 |x| |c_j| + ((1-t)/t)^2 |c_j|^2 / 2 such a score is off by about 2^-22 E_j, and x0_hat by that
// times the distance of the codes that matter: up to E_j = 512 by less than 1e-4 max|c| (tests/cuda, at E_j = 512 between
// two codes: 3e-5). At smaller t than that the score of a code that may matter is computed again, in float32 from the
// difference x - (1-t) c_j, which is of order t for such a code: few are left then, of the papers' codebooks less than
// 1 % (docs/numerics.md). One that cannot come within kNegligible of the row's largest score, given the bound of the
// error, weighs nothing. A tile is asked by its longest code, once per warp; where no row of a warp has anything, the
// warp leaves the tile.
// Which way a score is computed depends on its row and the codebook alone; sums have a fixed order: a row's result does
// not depend on the batch. Backward computes the weights again from log_norm = log sum_j exp(s_j).
//
// A block has 32 rows; its warps have 16 rows and every other strip of 32 codes, and are merged at the end. Rows are
// taken token by token: the noise draws of a token, rows r, r + period, .., sit in one block and read its
// log-probabilities from the L1 cache. Shared memory: 64 codes and the rows, hi and lo. Registers: scores, log p and the
// sums (d / 2 floats). Cost per row and code: forward 2 x 3 d tensor-core products, backward 3 x 3 d; one exponential;
// log p once per token from memory, which is the floor: 4 V bytes per token in float32. Instructions of a warp per strip
// on sm_90a, of which tensor cores: d = 8 forward 300 (24), backward 321 (36); d = 32 524 (96), 588 (144).
#include "codebook_posterior.h"

#include "code_tile.h"
#include "logits.h"

namespace ddfast {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = .693147181f, kFinite = 3e38f;
constexpr float kSlack = 8.f;                 // weights may be as large as 2^8 before the sums are scaled down
constexpr float kNegligible = 25.f * kLog2E;  // V weights of e^-25 are below float32's rounding
constexpr float kExactBeyond = 512.f;         // 2^-22 of it is 1.2e-4

struct PosteriorLaunch {
  PosteriorArguments a;
  bool vector_loads;  // log_probs' rows are 16-byte aligned
  bool whole;         // x and the codebook are, too, and d = D
};

template <int D, bool kBackward>
struct PosteriorMemory {
  CodeTile<D> codes;
  RowTile<D> rows[kBackward ? 2 : 1];  // x times (1-t)/t^2 log2(e), the gradient
  float t[kRows], square[kRows], shift[kRows];  // square: |x|^2; shift: x0_hat.g
  // What the warps of the second strips leave for those of the first.
  float peak[kRows], total[kRows], sum[kRows][D + 1];
};

struct alignas(16) Chunk {
  uint32_t word[4];
};

// out = log p of codes first .. first + 7 of the row that starts at `row`; -inf beyond V.
__device__ __forceinline__ void load_log_probs(const PosteriorLaunch& launch, const unsigned char* row, int first,
                                               float (&out)[8]) {
  const int32_t dtype = launch.a.dtype;
  if (launch.vector_loads && first + 8 <= (int)launch.a.V) {
    if (dtype == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Four four = *(const Four*)((const float*)row + first + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[4 * half + i] = four.value[i];
      }
    } else {
      const Chunk chunk = *(const Chunk*)((const uint16_t*)row + first);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = float_of_bits16((uint16_t)(chunk.word[i / 2] >> (i % 2 * 16)), dtype);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = first + i < (int)launch.a.V ? load_logit(row, dtype, first + i) : kNegInf;
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
  const float along = ratio * inverse * sqrtf(square), norm_scale = ratio * ratio;
  // The root of E_j = kExactBeyond, a quadratic in |c_j|.
  const float norm = 2.f * kExactBeyond / (along + sqrtf(fmaf(2.f * kExactBeyond, norm_scale, along * along)));
  return {along * kLog2E, norm_scale * kLog2E, .5f * square * inverse * inverse * kLog2E, norm * norm};
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

// A code's score, from differences.
__device__ __forceinline__ float exact_score(const PosteriorLaunch& launch, int64_t row, int code) {
  const PosteriorArguments& a = launch.a;
  const int d = (int)a.d;
  const float t = a.t[row];
  float distance = 0.f;
#pragma unroll 2
  for (int k = 0; k < d; k += 4) {
    const Four x = load_four(a.x + row * d, k, d, launch.whole);
    const Four c = load_four(a.codebook + (int64_t)code * d, k, d, launch.whole);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float difference = fmaf(t - 1.f, c.value[e], x.value[e]);
      distance = fmaf(difference, difference, distance);
    }
  }
  return (load_logit(a.log_probs, a.dtype, row % a.period * a.stride + code) - .5f / (t * t) * distance) * kLog2E;
}

// `score`: of codes code .. code + 7 and of rows `row` and `row` + 8 of the block, relative to peak. In a row whose
// products are not exact enough it becomes the score itself, from differences, where that may matter, else -inf.
// `least`: what the largest scores, relative to peak, are not below. False if nothing of the warp's rows matters.
template <int D, bool kBackward>
__device__ __forceinline__ bool refine(const PosteriorLaunch& launch, const PosteriorMemory<D, kBackward>& m,
                                       int64_t begin, int row, int code, const float (&least)[2],
                                       const float (&largest)[2], float (&score)[4][4], bool (&refined)[2]) {
  const PosteriorArguments& a = launch.a;
  const float square = largest_square(m.codes);
  uint32_t mattering = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowScore of_row = row_score(m.t[row + 8 * r], m.square[row + 8 * r]);
    const float error =
        kDotError<D> * fmaf(of_row.along, sqrtf(square), fmaf(of_row.norm_scale / 2.f, square, of_row.base));
    float bound = least[r];
    if (!kBackward) bound = fmaxf(bound, fminf(row_max(largest[r]), kFinite) - error);  // +inf stands out from it
    refined[r] = square > of_row.limit;
    if (!refined[r]) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& s = score[i / 2][i % 2 + 2 * r];
      if (!(s <= bound - error - kNegligible)) mattering |= 1u << (8 * r + i);  // NaN does
      s = kNegInf;
    }
  }
  if (!simt::ballot(mattering || !refined[0] || !refined[1])) return false;
  while (simt::ballot(mattering != 0)) {
    int slot = -1;
    float s = 0.f;
    if (mattering) {
      slot = simt::lowest_bit(mattering);
      const int64_t i = begin + row + slot / 8 * 8;
      const int j = code + slot % 8 < (int)a.V ? code + slot % 8 : (int)a.V - 1;
      s = exact_score(launch, row_of(a, i < a.rows ? i : a.rows - 1), j);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i == slot) score[i % 8 / 2][i % 2 + 2 * (i / 8)] = s;
    mattering &= mattering - 1;
  }
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

  // Weights are 2^(score - peak); backward, peak is log_norm; forward, what was the largest score when one last exceeded
  // it by more than `slack`, and the products' scores are relative to it from their start.
  float norm_scale[2], base[2], peak[2], slack[2], total[2] = {0.f, 0.f}, sum[D / 8][4] = {}, limit = INFINITY;
  const unsigned char* log_probs[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowScore row = row_score(m.t[first_row + 8 * r], m.square[first_row + 8 * r]);
    const int64_t at = clamped(first_row + 8 * r);
    norm_scale[r] = row.norm_scale;
    base[r] = row.base;
    peak[r] = kBackward ? a.log_norm[at] * kLog2E : -row.base;
    slack[r] = kBackward ? kSlack : kNegInf;
    limit = row.limit < limit ? row.limit : limit;
    log_probs[r] = (const unsigned char*)a.log_probs + at % a.period * a.stride * (a.dtype == 0 ? 4 : 2);
  }
  limit = warp_min(limit);
  // Makes a row's peak `to`.
  const auto raise = [&](int r, float to) {
    const float fade = slack[r] == kNegInf ? 0.f : simt::fast_exp2(peak[r] - to);
    peak[r] = to;
    slack[r] = kSlack;
    total[r] *= fade;
#pragma unroll
    for (int k = 0; k < D / 8; ++k) {
      sum[k][2 * r] *= fade;
      sum[k][2 * r + 1] *= fade;
    }
  };

  for (int first = 0; first < (int)a.V; first += kTileCodes) {
    Four codes[D / 8];
    fetch_codes<D>(codes, a.codebook, (int)a.V, d, launch.whole, first);
    float log_p[2][8];
#pragma unroll
    for (int r = 0; r < 2; ++r) load_log_probs(launch, log_probs[r], first + strip + 8 * q, log_p[r]);
    simt::block_barrier();  // the last tile is done with
    store_codes<D>(m.codes, codes);
    simt::block_barrier();
    float score[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Two half_norm = *(const Two*)&m.codes.half_norm[strip + 8 * n + 2 * q];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        score[n][i] = fmaf(-norm_scale[i / 2], half_norm.value[i % 2], -(base[i / 2] + peak[i / 2]));
    }
    strip_dots<D>(m.rows[0], m.codes, row_warp, strip, score);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& s = score[i % 8 / 2][i % 2 + 2 * (i / 8)];
      s = fmaf(log_p[i / 8][i % 8], kLog2E, s);
    }
    float largest[2];
    if (!kBackward) lane_max(score, largest);
    if (largest_square(m.codes) > limit) {
      const float least[2] = {slack[0] - kSlack, slack[1] - kSlack};  // 0, or before there is a peak -inf
      const int code = first + strip + 8 * q;
      bool refined[2];
      if (!refine<D, kBackward>(launch, m, begin, first_row, code, least, largest, score, refined)) continue;
      float scores_largest[2];
      if (!kBackward) lane_max(score, scores_largest);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float now = kBackward ? kNegInf : row_max(scores_largest[r]);
        if (!refined[r]) continue;
        if (!kBackward && now > peak[r] + slack[r]) raise(r, now);
        largest[r] = kNegInf;
#pragma unroll
        for (int i = 0; i < 8; ++i) score[i / 2][i % 2 + 2 * r] -= peak[r];
      }
    }
    if (!kBackward && simt::ballot(largest[0] > slack[0] || largest[1] > slack[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float now = row_max(largest[r]);
        if (!(now > slack[r])) continue;
        const float before = peak[r];
        raise(r, before + now);
#pragma unroll
        for (int i = 0; i < 8; ++i) score[i / 2][i % 2 + 2 * r] -= peak[r] - before;
      }
    }
    float dot[4][4];
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < 16; ++i) dot[i / 4][i % 4] = -m.shift[first_row + i % 4 / 2 * 8];
      strip_dots<D>(m.rows[1], m.codes, row_warp, strip, dot);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& s = score[i / 4][i % 4];
      s = simt::fast_exp2(s);
      if constexpr (kBackward) s *= dot[i / 4][i % 4];
      total[i % 4 / 2] += s;
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
      m.peak[row] = slack[r] == kNegInf ? kNegInf : peak[r];
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
    const float mine = slack[r] == kNegInf ? kNegInf : peak[r], other = m.peak[row];
    const float highest = fmaxf(fmaxf(mine, other), -kFinite);
    const float own = kBackward ? 1.f : simt::fast_exp2(mine - highest);
    const float others = kBackward ? 1.f : simt::fast_exp2(other - highest);
    // NaN if a log-probability is NaN or +inf; 0 if all are -inf.
    const float all = own * total[r] + others * m.total[row];
    const bool usable = kBackward || all > 0.f;
    const float t = m.t[row], along = (1.f - t) / t / t;
    if (!kBackward && q == 0) a.log_norm[out] = usable ? fmaf(highest, kLn2, logf(all)) : NAN;
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
  if (a.d < 1 || a.d > kPosteriorMaxDim || a.V < 1 || a.V >= (int64_t)1 << 30 || a.period < 1 || a.rows % a.period != 0 ||
      blocks >= (int64_t)1 << 31)
    return cudaErrorInvalidValue;
  const int64_t per_chunk = a.dtype == 0 ? 4 : 8;
  const PosteriorLaunch launch{a, (uintptr_t)a.log_probs % 16 == 0 && (a.period == 1 || a.stride % per_chunk == 0),
                               ((uintptr_t)a.codebook | (uintptr_t)a.x) % 16 == 0 && a.d == dim_class(a.d)};
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
