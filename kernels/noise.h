// Launches the noise kernel; see kernels/philox.h for what it computes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ddfast {

// out[i, e] for i < count, e < per_sample; index and out in device memory of the current device.
cudaError_t noise_cuda(uint64_t seed, const int64_t* index, int64_t count, int64_t per_sample, float* out,
                       cudaStream_t stream);

}  // namespace ddfast
