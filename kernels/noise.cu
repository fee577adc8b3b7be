// noise: one thread per four elements of a sample. Compiled with -fmad=false: the bits must equal the host's.
// Cost: about 150 float64 operations per thread for 16 bytes written, so float64 throughput bounds it on consumer GPUs.
#include "noise.h"

#include "philox.h"
#include "simt.h"

namespace ddfast {
namespace {

constexpr int kNoiseThreads = 256;

struct NoiseLaunch {
  NoiseArguments a;
  int64_t quads;  // of a sample
};

__global__ void __launch_bounds__(kNoiseThreads) noise_kernel(const __grid_constant__ NoiseLaunch launch) {
  const NoiseArguments& a = launch.a;
  const int64_t i = (int64_t)simt::block() * kNoiseThreads + simt::thread();
  const int64_t sample = i / launch.quads, quad = i - sample * launch.quads, left = a.per_sample - 4 * quad;
  if (sample >= a.count) return;
  float values[4];
  noise_quad(a.seed, a.index[sample], (uint32_t)quad, values);
  float* out = a.out + sample * a.per_sample + 4 * quad;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < left) out[j] = values[j];
}

}  // namespace

cudaError_t noise_cuda(const NoiseArguments& a, cudaStream_t stream) {
  const int64_t quads = (a.per_sample + 3) / 4, blocks = (a.count * quads + kNoiseThreads - 1) / kNoiseThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks >= (int64_t)1 << 31) return cudaErrorInvalidValue;
  return simt::launch(noise_kernel, blocks, kNoiseThreads, 0, 1, stream, NoiseLaunch{a, quads});
}

cudaError_t noise_cuda_is_loaded() { return simt::load(noise_kernel); }

}  // namespace ddfast
