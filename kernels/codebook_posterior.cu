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

constexpr float kNegligible = 25.f;     // V weights of e^-25 are below float32's rounding
constexpr float kExactBeyond = 64.f;    // 2^-22 of it is 1.5e-5

struct PosteriorLaunch {
  PosteriorArguments a;
  bool vector_loads;  // log_probs' rows are 16-byte aligned
};

template <int D>
struct PosteriorMemory {
  CodeTile<D> codes;
  RowTile<D> x, grad;
  float t[kRows], length[kRows], shift[kRows];  // shift: x0_hat.g
  // What the warps of the second strips leave for those of the first.
  float most[kRows], total[kRows], bad[kRows], sum[kRows][D + 1];
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

template <int D, bool kBackward>
__global__ void __launch_bounds__(kTileThreads, D == 64 ? 2 : 3)
    posterior_kernel(const __grid_constant__ PosteriorLaunch launch) {  // hot
  const PosteriorArguments& a = launch.a;
  PosteriorMemory<D>& m = *(PosteriorMemory<D>*)simt::shared_memory();
  const int d = (int)a.d;
  const int64_t begin = simt::block() * (int64_t)kRows;
  const int row_warp = simt::warp() / kCodeWarps, code_warp = simt::warp() % kCodeWarps;
  const int g = simt::lane() / 4, q = simt::lane() % 4, first_row = 16 * row_warp, strip = kStrip * code_warp;
  const auto clamped = [&](int i) { return row_of(a, begin + i < a.rows ? begin + i : a.rows - 1); };

  for (int i = simt::thread(); i < kRows * D; i += kTileThreads) {
    const int64_t at = clamped(i / D) * d + i % D;
    m.x.value[i / D][i % D] = i % D < d ? a.x[at] : 0.f;
    if (kBackward) m.grad.value[i / D][i % D] = i % D < d ? a.grad[at] : 0.f;
  }
  simt::block_barrier();
  if (simt::thread() < kRows) {
    const int i = simt::thread();
    const int64_t row = clamped(i);
    float square = 0.f, shift = 0.f;
    for (int k = 0; k < d; ++k) {
      square = fmaf(m.x.value[i][k], m.x.value[i][k], square);
      if (kBackward) shift = fmaf(m.grad.value[i][k], a.x0[row * d + k], shift);
    }
    m.t[i] = a.t[row];
    m.length[i] = sqrtf(square);
    m.shift[i] = shift;
  }
  simt::block_barrier();

  int64_t source[2];
  float keep[2], along[2], norm_scale[2], base[2], length[2], most[2], total[2] = {0.f, 0.f}, sum[D / 8][4] = {};
  bool bad[2] = {false, false};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + g + 8 * r;
    const float t = m.t[row], inverse = 1.f / t;
    source[r] = clamped(row) % a.period;
    keep[r] = 1.f - t;
    along[r] = keep[r] * inverse * inverse;       // of x.c
    norm_scale[r] = keep[r] * keep[r] * inverse * inverse;  // of |c|^2 / 2
    length[r] = m.length[row];
    base[r] = .5f * length[r] * length[r] * inverse * inverse;
    most[r] = kBackward ? a.log_norm[clamped(row)] : kNegInf;
  }

  for (int64_t first = 0; first < a.V; first += kTileCodes) {
    float log_p[2][8];
#pragma unroll
    for (int r = 0; r < 2; ++r) load_log_probs(launch, source[r], first + strip + 8 * q, log_p[r]);
    simt::block_barrier();  // the last tile is done with
    load_codes<D>(m.codes, a.codebook, a.V, d, first);
    simt::block_barrier();
    float score[4][4];
    strip_dots<D>(m.x, m.codes, first_row, strip, score);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + g + 8 * r;
      // Lower bounds of the row's largest score, from approximate scores less their error.
      float least = most[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int slot = strip + i / 2 * 8 + 2 * q + i % 2;
        float& s = score[i / 2][i % 2 + 2 * r];
        const float size = fmaf(along[r] * length[r], m.codes.norm[slot], norm_scale[r] * m.codes.half_norm[slot]);
        bad[r] |= !(log_p[r][i] < INFINITY);
        s = fmaf(along[r], s, log_p[r][i]) - norm_scale[r] * m.codes.half_norm[slot] - base[r];
        const float low = s - kDotError<D> * (size + base[r]);
        least = low > least ? low : least;
      }
      if (!kBackward) least = row_max(least);
      float largest = kNegInf;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int slot = strip + i / 2 * 8 + 2 * q + i % 2;
        float& s = score[i / 2][i % 2 + 2 * r];
        const float size = fmaf(along[r] * length[r], m.codes.norm[slot], norm_scale[r] * m.codes.half_norm[slot]);
        if (size + base[r] / 16.f > kExactBeyond) {
          const bool matters = s + kDotError<D> * (size + base[r]) > least - kNegligible;
          s = kNegInf;
          if (matters) {
            float distance = 0.f;
            for (int k = 0; k < d; ++k) {
              const float c = m.codes.hi[slot][k] + m.codes.lo[slot][k];
              const float difference = fmaf(-keep[r], c, m.x.value[row][k]);
              distance = fmaf(difference, difference, distance);
            }
            s = fmaf(-.5f / (m.t[row] * m.t[row]), distance, log_p[r][i]);
          }
        }
        largest = s > largest ? s : largest;
      }
      if (!kBackward) {
        largest = row_max(largest);
        largest = most[r] > largest ? most[r] : largest;
        const float fade = largest == kNegInf ? 1.f : simt::fast_exp(most[r] - largest);
        most[r] = largest;
        total[r] *= fade;
#pragma unroll
        for (int k = 0; k < D / 8; ++k) {
          sum[k][2 * r] *= fade;
          sum[k][2 * r + 1] *= fade;
        }
      }
    }
    float dot[kBackward ? 4 : 1][4];
    if constexpr (kBackward) strip_dots<D>(m.grad, m.codes, first_row, strip, dot);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = most[r] == kNegInf ? 0.f : most[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& s = score[i / 2][i % 2 + 2 * r];
        const float relative = s - shift;
        // Written so that NaN stays.
        s = relative < -kNegligible ? 0.f : simt::fast_exp(relative);
        if constexpr (kBackward) s *= dot[i / 2][i % 2 + 2 * r] - m.shift[first_row + g + 8 * r];
        total[r] += s;
      }
    }
    add_weighted<D>(m.codes, strip, score, sum);
  }

  // Both halves of the codes, then the four lanes of a row.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + g + 8 * r;
    total[r] = row_sum(total[r]);
    const float any_bad = row_max(bad[r] ? 1.f : 0.f);
    if (code_warp == 1) {
      if (q == 0) {
        m.most[row] = most[r];
        m.total[row] = total[r];
        m.bad[row] = any_bad;
      }
#pragma unroll
      for (int k = 0; k < D; ++k)
        if (k % 8 / 2 == q) m.sum[row][k] = sum[k / 8][2 * r + k % 2];
    } else {
      bad[r] = any_bad > 0.f;
    }
  }
  static_assert(kCodeWarps == 2, "the merge below is of two");
  simt::block_barrier();
  if (code_warp == 1) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + g + 8 * r;
    if (begin + row >= a.rows) continue;
    const int64_t out = clamped(row);
    const float peak = most[r] > m.most[row] ? most[r] : m.most[row];
    const float own = kBackward || peak == kNegInf ? 1.f : simt::fast_exp(most[r] - peak);
    const float others = kBackward || peak == kNegInf ? 1.f : simt::fast_exp(m.most[row] - peak);
    const float all = own * total[r] + others * m.total[row];
    const bool usable = !bad[r] && m.bad[row] == 0.f && (kBackward || all > 0.f);
    if (!kBackward && q == 0) a.log_norm[out] = usable ? peak + logf(all) : NAN;
#pragma unroll
    for (int k = 0; k < D; ++k) {
      if (k % 8 / 2 != q || k >= d) continue;
      const float value = own * sum[k / 8][2 * r + k % 2] + others * m.sum[row][k];
      if (kBackward) {
        // The weights' rounding shifts every (c_j - x0_hat).g alike; subtracting all x0_hat removes that shift.
        a.dx[out * d + k] = usable ? along[r] * (value - all * a.x0[out * d + k]) : NAN;
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
  const PosteriorLaunch launch{a, (uintptr_t)a.log_probs % 16 == 0 && (a.period == 1 || a.stride % per_chunk == 0)};
  const auto run = [&](auto kernel, size_t shared) {
    return simt::launch(kernel, blocks, kTileThreads, shared, 1, stream, launch);
  };
  switch (dim_class(a.d)) {
    case 8: return run(posterior_kernel<8, kBackward>, sizeof(PosteriorMemory<8>));
    case 16: return run(posterior_kernel<16, kBackward>, sizeof(PosteriorMemory<16>));
    case 32: return run(posterior_kernel<32, kBackward>, sizeof(PosteriorMemory<32>));
    default: return run(posterior_kernel<64, kBackward>, sizeof(PosteriorMemory<64>));
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
