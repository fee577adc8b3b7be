// Launches filter_logits; see kernels/filter_logits.cu.
#pragma once

#include <cstdint>

#include "cuda_api.h"

namespace ddfast {

// Rows of logits and what is done to them, here and in flow_sample.h.
struct FilterArguments {
  const void* logits;      // [rows, V]
  const void* uncond;      // the same dtype; null: no guidance
  const float* cfg_scale;  // [rows]; unused without uncond
  int64_t stride, uncond_stride;  // elements between rows
  int64_t rows, V;
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  float temperature;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
};

// Bytes of global memory that filter_logits_cuda needs where shared memory is too small for a row (0: none). cluster:
// blocks per row (1, 2, 4 or 8), or 0 for a choice by V; the same in both calls.
cudaError_t filter_scratch_bytes(int64_t rows, int64_t V, int cluster, int64_t* bytes);

// log_probs [rows, V]: normalised, -inf where filtered; NaN all over a row with NaN, +inf or nothing finite.
cudaError_t filter_logits_cuda(const FilterArguments& arguments, float* log_probs, void* scratch, int cluster,
                               cudaStream_t stream);

}  // namespace ddfast
