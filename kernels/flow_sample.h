// Launches flow_sample and sample_codes; see kernels/flow_sample.cu.
#pragma once

#include <cstdint>

#include "cuda_api.h"
#include "filter_logits.h"

namespace ddfast {

constexpr int64_t kFlowMaxDim = 64;

struct FlowArguments {
  FilterArguments filter;  // flow_sample: log-probabilities, and no guidance, temperature 1, top_k 0, top_p 1
  const float* noise;      // [rows, d]
  const float* codebook;   // [V, d]
  const float* geometry;   // [V + 1]: distance of each code to its nearest other one; a bound on the diameter
  int64_t* codes;          // [rows]; -1 where a row has NaN, +inf, nothing finite, or noise that is not finite
  int32_t* evaluations;    // [rows], or null
  void* scratch;           // flow_scratch_bytes() of them, or null where that is 0
  int64_t d;
  float sigma_min;
  int32_t steps, solver, early_exit;
};

// Bytes of global memory that the launches need: lists where shared memory is too small for them, and the rows that a
// first launch leaves to a second (0: neither). cluster: blocks of 256 threads per row (1, 2, 4 or 8), or 0 for a choice
// that depends on the problem's kind and the device, not on the number of rows, so that a row's result is the same in
// every batch, bit for bit. The same values in both calls; flow_sample's top_k is 0 and its top_p 1.
cudaError_t flow_scratch_bytes(int64_t rows, int64_t V, int64_t d, int64_t top_k, double top_p, int cluster,
                               int64_t* bytes);

cudaError_t flow_sample_cuda(const FlowArguments& arguments, int cluster, cudaStream_t stream);

}  // namespace ddfast
