// filter_logits: guidance, temperature, top-k and top-p, then log-probabilities: one launch, a cluster of blocks per row.
//
// Formula: ddfast/ops/filter_logits.py; how the thresholds are found: row_filter.h. The values kept, relative to the
// largest, are summed as exponentials, thread by thread and record by record in a fixed order.
// Shared memory: 4 bytes per code of the block's share, 32 KiB of histograms. Device memory: a row in (two with
// guidance), a float32 row out, which is the floor; the rest is about 30 operations per code and threshold.
// Built with -fmad=false: guidance and temperature round as in PyTorch.
#include "filter_logits.h"

#include "row_filter.h"

namespace ddfast {
namespace {

constexpr int kFilterWords = 2;  // of a record
constexpr int kResident = 2;     // blocks to a multiprocessor, by their registers

struct FilterLaunch {
  FilterArguments a;
  float* log_probs;
  uint32_t* lists;  // global memory for the keys; null: they fit in shared memory
  int cluster, groups;  // blocks that share a row; clusters, which take the rows in turn
};

__global__ void __launch_bounds__(kWide, kResident) filter_kernel(const __grid_constant__ FilterLaunch launch) {  // hot
  const FilterArguments& a = launch.a;
  Block<kWide> b;
  open_block(b, a, launch.cluster, sizeof(Control), kFilterWords, 1, launch.lists);
  for (int row = simt::block() / b.cluster; row < (int)a.rows; row += launch.groups) {
    b.row = row;
    const Statistics statistics = load_row(b);
    const bool usable = !statistics.bad;
    Threshold threshold = {0, 0};
    float log_sum = 0.f;
    const float most = value_of_key(statistics.most);
    if (usable) {
      threshold = find_threshold(b, statistics);
      float sum = 0.f;
      for (int p = simt::thread(); p < b.positions; p += kWide)
        if (is_kept(b, threshold, p)) sum += expf(value_of_key(b.keys[p]) - most);
      sum = warp_sum(sum);
      if (simt::lane() == 0) post(b, 0, simt::float_bits(sum));
      const uint32_t* records = collect(b);
      float all = 0.f;
      for (int r = 0; r < b.cluster * b.kWarps; ++r) all += simt::bits_float(records[r * kFilterWords]);
      log_sum = logf(all);
    }
    float* out = launch.log_probs + row * a.V;
    for (int p = simt::thread(); p < b.positions; p += kWide) {
      const uint32_t code = code_of(b, p);
      if (code >= a.V) continue;
      const float log_p = is_kept(b, threshold, p) ? value_of_key(b.keys[p]) - most - log_sum : kNegInf;
      out[code] = usable ? log_p : NAN;
    }
    simt::block_barrier();  // the keys are free for the next row
  }
}

struct FilterPlan {
  int cluster, groups;
  bool fits;      // the keys in shared memory
  size_t shared;  // bytes
};

FilterPlan plan_of(const simt::Device& device, int64_t rows, int64_t V, int cluster) {
  if (cluster == 0)
    for (cluster = 1; device.clusters && cluster < kMaxCluster && V > 8192 * cluster;) cluster *= 2;
  const size_t fixed = sizeof(Control) + 2 * (size_t)cluster * kMaxWarps * kFilterWords * sizeof(uint32_t);
  const size_t keys = (size_t)share(V, cluster) * sizeof(uint32_t);
  const bool fits = fixed + keys + kHistogramBytes <= (size_t)device.shared_bytes;
  const int64_t groups = fits ? rows : groups_in_flight(device, rows, kResident, cluster);
  return {cluster, (int)groups, fits, fixed + (fits ? keys : 0) + kHistogramBytes};
}

}  // namespace

cudaError_t filter_scratch_bytes(int64_t rows, int64_t V, int cluster, int64_t* bytes) {
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  const FilterPlan plan = plan_of(device, rows, V, cluster);
  const int64_t lists = (int64_t)plan.groups * plan.cluster;
  *bytes = plan.fits ? 0 : lists * share(V, plan.cluster) * (int64_t)sizeof(uint32_t);
  return cudaSuccess;
}

cudaError_t filter_logits_cuda(const FilterArguments& a, float* log_probs, void* scratch, int cluster,
                               cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  if ((cluster != 0 && !simt::is_cluster_size(cluster)) || a.V < 1 || a.V > (int64_t)1 << 23 ||
      a.rows > (int64_t)1 << 27)
    return cudaErrorInvalidValue;
  const FilterPlan plan = plan_of(device, a.rows, a.V, cluster);
  if (!plan.fits && !scratch) return cudaErrorInvalidValue;
  const FilterLaunch launch{a, log_probs, plan.fits ? nullptr : (uint32_t*)scratch, plan.cluster, plan.groups};
  const int64_t blocks = (int64_t)plan.groups * plan.cluster;
  return simt::launch(filter_kernel, blocks, kWide, plan.shared, plan.cluster, stream, launch);
}

}  // namespace ddfast
