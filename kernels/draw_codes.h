// Launches draw_codes; see kernels/draw_codes.cu.
#pragma once

#include <cstdint>

#include "cuda_api.h"
#include "filter_logits.h"

namespace ddfast {

struct DrawArguments {
  FilterArguments filter;
  const float* uniform;  // [rows], in [0, 1)
  int64_t* codes;        // [rows]; -1 for a row with NaN, +inf or nothing finite
  void* scratch;         // draw_scratch_bytes; null where that is 0
};

// Bytes of global memory that draw_codes_cuda needs where shared memory is too small for a row (0: none). cluster:
// blocks per row (1, 2, 4 or 8), or 0 for a choice by V; the same in both calls.
cudaError_t draw_scratch_bytes(int64_t rows, int64_t V, int cluster, int64_t* bytes);

cudaError_t draw_codes_cuda(const DrawArguments& arguments, int cluster, cudaStream_t stream);

}  // namespace ddfast
