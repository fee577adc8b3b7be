// Launches nearest_code; see kernels/nearest_code.cu.
#pragma once

#include <cstdint>

#include "cuda_api.h"

namespace ddfast {

constexpr int64_t kNearestMaxDim = 64;

struct NearestArguments {
  const float *x, *codebook;  // [rows, d], [V, d]; for the cosine the caller has normalised the codes
  int64_t* codes;             // [rows]
  int64_t rows, V, d;
  int32_t cosine;  // leave the codes' norms out
};

// cluster: blocks (1, 2, 4 or 8) that share the codes of the same rows, or 0 for a choice that fills the device; the
// result is the same for all.
cudaError_t nearest_code_cuda(const NearestArguments& arguments, int cluster, cudaStream_t stream);

}  // namespace ddfast
