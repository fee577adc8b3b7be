// A stand-in for the part of CUDA's runtime that the host's side of a launch uses: two devices that keep what they are
// told, and refuse what a device would. What was asked of it is counted.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace stand_in {

constexpr int kDevices = 2, kMostShared = 227 << 10;

struct State {
  std::mutex lock;
  int device_sets = 0, attribute_queries = 0, function_sets = 0, launches = 0;
  unsigned last_cluster = 0;
  std::map<std::pair<const void*, int>, int> shared, carveout;  // of a kernel on a device
};
inline State state;
inline thread_local int current = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t done(cudaError_t status) {
  if (status) last_error = status;
  return status;
}

}  // namespace stand_in

inline cudaError_t cudaGetLastError() { return std::exchange(stand_in::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return stand_in::last_error; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
inline const char* cudaGetErrorString(cudaError_t) { return "its description"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = stand_in::current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  const std::lock_guard<std::mutex> guard(stand_in::state.lock);
  ++stand_in::state.device_sets;
  if (device < 0 || device >= stand_in::kDevices) return stand_in::done(cudaErrorInvalidDevice);
  stand_in::current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::lock_guard<std::mutex> guard(stand_in::state.lock);
  ++stand_in::state.attribute_queries;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 100 + device
           : attribute == cudaDevAttrClusterLaunch     ? device == 0
                                                       : stand_in::kMostShared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  {
    const std::lock_guard<std::mutex> guard(stand_in::state.lock);
    ++stand_in::state.function_sets;
    const bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (is_size && value > stand_in::kMostShared) return stand_in::done(cudaErrorInvalidValue);
    (is_size ? stand_in::state.shared : stand_in::state.carveout)[{kernel, stand_in::current}] = value;
  }
  std::this_thread::yield();  // another thread's turn between this and the launch
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const std::lock_guard<std::mutex> guard(stand_in::state.lock);
  const auto allowed = stand_in::state.shared.try_emplace({kernel, stand_in::current}, 48 << 10).first->second;
  if ((int)config->dynamicSmemBytes > allowed) return stand_in::done(cudaErrorInvalidValue);
  ++stand_in::state.launches;
  stand_in::state.last_cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  return cudaSuccess;
}
