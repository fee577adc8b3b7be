// nearest_code: argmin_j |c_j|^2 / 2 - x.c_j (cosine: of -x.c_j, with codes of norm one), ties to the lowest j.
//
// The tensor cores give every score s_j within E_j = kDotError |x| |c_j| + a few roundings of |c_j|^2 / 2 of its
// float32 value v_j. While codes pass by, the smallest upper bound s_i + E_i so far is kept per row; a code with
// s_j - E_j above it cannot be the answer, and any other is computed in float32 at once:
//   v_j = fma(-x_k, c_k, ..) over k in order, from |c_j|^2 / 2 as a chain of fused products in order.
// So the index is exactly that of the least v_j, whatever the tensor cores round. In random order about log V codes
// per row are computed twice. Rows are shared by 4 lanes, 2 warps and up to 8 blocks; comparing pairs (v, j) is exact,
// so the split has no influence.
// Shared memory: a tile of 64 codes and 32 rows. Cost: 6 V d tensor-core FLOP-pairs per row; codes are read from L2
// once per 32 rows. Built with -fmad=false; fmaf is explicit.
#include "nearest_code.h"

#include "code_tile.h"
#include "flow_math.h"

namespace ddfast {
namespace {

struct NearestLaunch {
  NearestArguments a;
  int cluster;
};

struct Best {  // as one number: the least value first, then the lowest index
  uint32_t key, code;
};

__device__ __forceinline__ bool before(const Best& a, const Best& b) {
  return a.key < b.key || (a.key == b.key && a.code < b.code);
}

template <int D>
struct NearestMemory {
  CodeTile<D> codes;
  RowTile<D> rows;
  float norm[kRows];
  Best best[8][kCodeWarps][kRows];  // by block of the cluster
};

template <int D>
__device__ __forceinline__ float exact_score(const NearestMemory<D>& m, int row, int slot, int d, bool cosine) {
  float score = 0.f;
  if (!cosine) {
    for (int k = 0; k < d; ++k) {
      const float c = m.codes.hi[slot][k] + m.codes.lo[slot][k];
      score = fmaf(c, c, score);
    }
    score /= 2.f;
  }
  for (int k = 0; k < d; ++k) score = fmaf(-m.rows.value[row][k], m.codes.hi[slot][k] + m.codes.lo[slot][k], score);
  return score;
}

template <int D>
__global__ void __launch_bounds__(kTileThreads) nearest_kernel(const __grid_constant__ NearestLaunch launch) {  // hot
  const NearestArguments& a = launch.a;
  NearestMemory<D>& m = *(NearestMemory<D>*)simt::shared_memory();
  const int d = (int)a.d, rank = simt::cluster_rank(launch.cluster);
  const int64_t begin = simt::block() / launch.cluster * (int64_t)kRows;
  const int row_warp = simt::warp() / kCodeWarps, code_warp = simt::warp() % kCodeWarps;
  const int g = simt::lane() / 4, q = simt::lane() % 4, first_row = 16 * row_warp, strip = kStrip * code_warp;
  for (int i = simt::thread(); i < kRows * D; i += kTileThreads) {
    const int64_t row = begin + i / D;
    m.rows.value[i / D][i % D] = row < a.rows && i % D < d ? a.x[row * d + i % D] : 0.f;
  }
  simt::cluster_barrier(launch.cluster);  // the rows are there, and every block of the cluster runs
  if (simt::thread() < kRows) {
    float norm = 0.f;
    for (int k = 0; k < d; ++k) norm = fmaf(m.rows.value[simt::thread()][k], m.rows.value[simt::thread()][k], norm);
    m.norm[simt::thread()] = sqrtf(norm);
  }

  float bound[2] = {INFINITY, INFINITY};
  Best best[2] = {{0xffffffffu, 0}, {0xffffffffu, 0}};
  for (int64_t first = rank * (int64_t)kTileCodes; first < a.V; first += launch.cluster * (int64_t)kTileCodes) {
    simt::block_barrier();  // the last tile is done with
    load_codes<D>(m.codes, a.codebook, a.V, d, first);
    simt::block_barrier();
    float dot[4][4];
    strip_dots<D>(m.rows, m.codes, first_row, strip, dot);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + g + 8 * r;
      const float length = m.norm[row];
      float least = INFINITY;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int slot = strip + i / 2 * 8 + 2 * q + i % 2;
        const float half_norm = m.codes.half_norm[slot], offset = a.cosine ? 0.f : half_norm;
        const float error = kDotError<D> * (length * m.codes.norm[slot] + offset);
        const float upper = offset - dot[i / 2][i % 2 + 2 * r] + error;
        if (half_norm < kPaddingNorm) least = upper < least ? upper : least;
      }
      least = -row_max(-least);
      bound[r] = least < bound[r] ? least : bound[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int slot = strip + i / 2 * 8 + 2 * q + i % 2;
        const int64_t code = first + strip + 8 * q + i;
        const float offset = a.cosine ? 0.f : m.codes.half_norm[slot];
        const float error = kDotError<D> * (length * m.codes.norm[slot] + offset);
        // NaN counts as "may be": then every code is computed, and none is chosen over code 0.
        if (code < a.V && !(offset - dot[i / 2][i % 2 + 2 * r] - error > bound[r])) {
          const float score = exact_score<D>(m, row, slot, d, a.cosine);
          const Best one = {key_of(score), (uint32_t)code};
          if (score == score && before(one, best[r])) best[r] = one;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const Best other = {simt::shuffle_xor(best[r].key, mask), simt::shuffle_xor(best[r].code, mask)};
      if (before(other, best[r])) best[r] = other;
    }
    if (q == 0) *simt::of_rank(&m.best[rank][code_warp][first_row + g + 8 * r], 0, launch.cluster) = best[r];
  }
  simt::cluster_barrier(launch.cluster);
  const int64_t row = begin + simt::thread();
  if (rank != 0 || simt::thread() >= kRows || row >= a.rows) return;
  Best all = m.best[0][0][simt::thread()];
  for (int other = 0; other < launch.cluster; ++other)
    for (int warp = 0; warp < kCodeWarps; ++warp)
      if (before(m.best[other][warp][simt::thread()], all)) all = m.best[other][warp][simt::thread()];
  a.codes[row] = all.code;
}

}  // namespace

cudaError_t nearest_code_cuda(const NearestArguments& a, int cluster, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  const int64_t groups = (a.rows + kRows - 1) / kRows;
  if (cluster == 0)
    for (cluster = 1; device.clusters && cluster < 8 && groups * cluster * 2 <= 2 * device.multiprocessors &&
                      2 * cluster * kTileCodes <= a.V;)
      cluster *= 2;
  const bool known_size = cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8;
  if (!known_size || a.d < 1 || a.d > kNearestMaxDim || a.V < 1 || a.V >= (int64_t)1 << 31 ||
      groups * cluster >= (int64_t)1 << 31)
    return cudaErrorInvalidValue;
  const NearestLaunch launch{a, cluster};
  const auto run = [&](auto kernel, size_t shared) {
    return simt::launch(kernel, groups * cluster, kTileThreads, shared, cluster, stream, launch);
  };
  switch (dim_class(a.d)) {
    case 8: return run(nearest_kernel<8>, sizeof(NearestMemory<8>));
    case 16: return run(nearest_kernel<16>, sizeof(NearestMemory<16>));
    case 32: return run(nearest_kernel<32>, sizeof(NearestMemory<32>));
    default: return run(nearest_kernel<64>, sizeof(NearestMemory<64>));
  }
}

}  // namespace ddfast
