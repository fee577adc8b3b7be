// Launches the noise kernel; see kernels/philox.h for what it computes.
#pragma once

#include <cstdint>

#include "cuda_api.h"

namespace ddfast {

struct NoiseArguments {
  const int64_t* index;  // [count]
  float* out;            // [count, per_sample]
  uint64_t seed;
  int64_t count, per_sample;
};

cudaError_t noise_cuda(const NoiseArguments& arguments, cudaStream_t stream);

// The error with which any kernel of this build would fail on the current device; the noise's is the smallest.
cudaError_t noise_cuda_is_loaded();

}  // namespace ddfast
