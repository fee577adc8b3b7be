// noise: one thread per four elements of a sample. Compiled with -fmad=false: the bits must equal the host's.
// Cost: about 150 float64 operations per thread for 16 bytes written, so float64 throughput bounds it on consumer GPUs.
#include "noise.h"
#include "philox.h"

namespace ddfast {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    noise_kernel(uint64_t seed, const int64_t* __restrict__ index, int64_t quads, int64_t total, int64_t per_sample,
                 float* __restrict__ out) {
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < total; i += (int64_t)gridDim.x * kThreads) {
    const int64_t sample = i / quads, quad = i - sample * quads, element = 4 * quad;
    float values[4];
    noise_quad(seed, index[sample], (uint32_t)quad, values);
    float* row = out + sample * per_sample + element;
    const int64_t left = per_sample - element;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < left) row[j] = values[j];
  }
}

}  // namespace

cudaError_t noise_cuda(uint64_t seed, const int64_t* index, int64_t count, int64_t per_sample, float* out,
                       cudaStream_t stream) {
  const int64_t quads = (per_sample + 3) / 4, total = count * quads;
  if (total == 0) return cudaSuccess;
  const int64_t blocks = (total + kThreads - 1) / kThreads, most = 1 << 16;
  noise_kernel<<<(unsigned)(blocks < most ? blocks : most), kThreads, 0, stream>>>(seed, index, quads, total, per_sample,
                                                                                   out);
  return cudaGetLastError();
}

}  // namespace ddfast
