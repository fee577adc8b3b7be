// draw_codes: guidance, temperature, top-k and top-p, then the code at which the running sum of probabilities passes the
// row's uniform number: one launch, a cluster of blocks per row.
//
//   code = min { j : sum_{i <= j, kept} p_i > u sum_{kept} p_i },  at most the last code kept
//
// How the thresholds are found: row_filter.h; the code is found in the same way, by sums of p relative to the largest over
// ever shorter stretches of codes, V / 2048 and then one. Sums are in fixed point, so that neither the order of threads
// nor the number of blocks decides anything, and u times the whole is exact. A code that is kept and whose probability is
// not 0 in float64 weighs at least a unit: u = 0 draws the first of these, as the reference does. The likeliest code
// (top-k of 1 and u = 0) needs no thresholds.
// Blocks of 512 threads: a decoder's step has few rows, so a row fills a multiprocessor where it can.
// Shared memory: 4 bytes per code of the block's share, 32 KiB of histograms. Device memory: a row in (two with
// guidance), 12 bytes more, which is the floor. Operations: about 14 per code to read it, 5 to 9 in each of the three
// passes of a threshold, 11 to draw; 50 for each code kept; and 120 to 200 per thread for the digit that a pass finds,
// which bind where V is small.
// Built with -fmad=false: guidance and temperature round as in PyTorch.
#include "draw_codes.h"

#include "row_filter.h"

namespace ddfast {
namespace {

constexpr int kDrawThreads = 512;
constexpr int kDrawResident = 2;     // blocks to a multiprocessor, by their registers
constexpr int kDrawWords = 2;        // of a record
constexpr int kDrawCodes = 1 << 14;  // of a block, where clusters can share a longer row
constexpr float kLeastLog = -745.f;  // exp of less is 0 in float64

struct DrawLaunch {
  DrawArguments a;
  uint32_t* lists;  // global memory for the keys; null: they fit in shared memory
  float whole;      // units of mass of the largest p: 2^63 over as many codes as there may be
  int cluster, groups;  // blocks that share a row; clusters, which take the rows in turn
};

// The least sum above u times the total, at most the total; NaN counts as nearly 1.
__device__ __forceinline__ uint64_t draw_goal(float uniform, uint64_t total) {
  if (!(uniform < 1.f)) return total;
  const uint64_t part = uniform > 0.f ? (uint64_t)(uniform * 18446744073709551616.f) : 0;  // of 2^64
  return (uint64_t)((unsigned __int128)part * total >> 64) + 1;
}

template <bool kInShared>
__global__ void __launch_bounds__(kDrawThreads, kDrawResident)
    draw_kernel(const __grid_constant__ DrawLaunch launch) {  // hot
  const FilterArguments& a = launch.a.filter;
  Block<kDrawThreads> b;
  open_block(b, a, launch.cluster, sizeof(Control), kDrawWords, 1, kInShared ? nullptr : launch.lists);
  for (int row = simt::block() / b.cluster; row < (int)a.rows; row += launch.groups) {
    b.row = row;
    const float uniform = launch.a.uniform[row];
    const Statistics statistics = load_row(b);
    int64_t code = -1;
    if (!statistics.bad) {
      Threshold threshold = {statistics.most, kNone};
      if (!(a.top_k == 1 && uniform <= 0.f)) threshold = find_threshold(b, statistics);
      const float most = value_of_key(statistics.most);
      code = select_code(b, [&](uint64_t total) { return draw_goal(uniform, total); },
                         [&](uint32_t key, uint32_t j) { return is_kept(threshold, key, j); }, [&](uint32_t key) {
        const float log_weight = value_of_key(key) - most;
        return (uint64_t)(expf(log_weight) * launch.whole) + (log_weight > kLeastLog);
      });
    }
    if (b.rank == 0 && simt::thread() == 0) launch.a.codes[row] = code;
    simt::cluster_barrier(b.cluster);  // keys and histograms are free for the next row, or for the end
  }
}

struct DrawPlan {
  int cluster;
  int64_t groups;
  bool fits;      // the keys in shared memory
  size_t shared;  // bytes
};

DrawPlan draw_plan(const simt::Device& device, int64_t rows, int64_t V, int cluster) {
  if (cluster == 0)
    for (cluster = 1; device.clusters && cluster < kMaxCluster && V > kDrawCodes * cluster;) cluster *= 2;
  constexpr int kWarps = kDrawThreads / 32;
  const size_t fixed = sizeof(Control) + 2 * (size_t)cluster * kWarps * kDrawWords * sizeof(uint32_t);
  const size_t keys = (size_t)share(V, cluster) * sizeof(uint32_t);
  const bool fits = fixed + keys + kHistogramBytes <= (size_t)device.shared_bytes;
  const int64_t groups = fits ? rows : groups_in_flight(device, rows, kDrawResident, cluster);
  return {cluster, groups, fits, fixed + (fits ? keys : 0) + kHistogramBytes};
}

}  // namespace

cudaError_t draw_scratch_bytes(int64_t rows, int64_t V, int cluster, int64_t* bytes) {
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  const DrawPlan plan = draw_plan(device, rows, V, cluster);
  *bytes = plan.fits ? 0 : plan.groups * plan.cluster * share(V, plan.cluster) * (int64_t)sizeof(uint32_t);
  return cudaSuccess;
}

cudaError_t draw_codes_cuda(const DrawArguments& a, int cluster, cudaStream_t stream) {
  const FilterArguments& filter = a.filter;
  if (filter.rows == 0) return cudaSuccess;
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  if ((cluster != 0 && !simt::is_cluster_size(cluster)) || filter.V < 1 || filter.V > (int64_t)1 << 23 ||
      filter.rows > (int64_t)1 << 27)
    return cudaErrorInvalidValue;
  const DrawPlan plan = draw_plan(device, filter.rows, filter.V, cluster);
  if (!plan.fits && !a.scratch) return cudaErrorInvalidValue;
  int bits = 0;
  while (filter.V > (int64_t)1 << bits) ++bits;
  const DrawLaunch launch{a, (uint32_t*)a.scratch, ldexpf(1.f, 63 - bits), plan.cluster, (int)plan.groups};
  return simt::launch(plan.fits ? draw_kernel<true> : draw_kernel<false>, plan.groups * plan.cluster, kDrawThreads,
                      plan.shared, plan.cluster, stream, launch);
}

}  // namespace ddfast
