// The host's side of a launch: what the current device has, and what a kernel is allowed there. Of CUDA only the
// functions of its C interface, so that tests/cuda/launch.cpp compiles this file with g++ on a stand-in for them.
// Nothing here holds Python's lock: two threads may be anywhere in it at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "cuda_api.h"

namespace ddfast {
namespace simt {

struct Device {
  int shared_bytes;  // that one block may have
  int shared_per_multiprocessor;
  int multiprocessors;
  bool clusters;
};

// The current device. Each is asked once: none of this changes.
inline cudaError_t device(Device* out) {
  static std::mutex lock;
  static std::map<int, Device> known;
  int id, clusters;
  cudaError_t status = cudaGetDevice(&id);
  if (status) return status;
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = known.find(id);
  if (found != known.end()) {
    *out = found->second;
    return cudaSuccess;
  }
  status = cudaDeviceGetAttribute(&out->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (!status)
    status = cudaDeviceGetAttribute(&out->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  if (!status) status = cudaDeviceGetAttribute(&out->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (!status) status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, id);
  if (status) return status;
  out->clusters = clusters != 0;
  known[id] = *out;
  return cudaSuccess;
}

constexpr size_t kSharedByDefault = 48 << 10;  // bytes that every kernel may have

// Lets `kernel` have all the shared memory of the current device if it wants more than the default: once per kernel and
// device, for the attribute belongs to both, and a thread that lowered it would make the launch of another one fail.
inline cudaError_t allow_shared_memory(const void* kernel, size_t shared_bytes) {
  static std::mutex lock;
  static std::set<std::pair<const void*, int>> allowed;
  if (shared_bytes <= kSharedByDefault) return cudaSuccess;
  int id;
  Device here;
  cudaError_t status = cudaGetDevice(&id);
  if (!status) status = device(&here);
  if (status) return status;
  const std::lock_guard<std::mutex> guard(lock);
  if (allowed.count({kernel, id})) return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, here.shared_bytes);
  // A block that uses much of it should not be alone on its multiprocessor because the rest went to the L1 cache.
  if (!status)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  if (!status) allowed.insert({kernel, id});
  return status;
}

// Its status is this launch's own, whatever failed before it (cudaGetLastError would tell of that too).
inline cudaError_t launch(const void* kernel, int64_t blocks, int threads, size_t shared_bytes, int cluster,
                          cudaStream_t stream, void** arguments) {
  const cudaError_t status = allow_shared_memory(kernel, shared_bytes);
  if (status) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace simt
}  // namespace ddfast
