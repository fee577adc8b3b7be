// How the module calls CUDA: errors become exceptions, and a device is current while it is needed.
#pragma once

#include <stdexcept>
#include <string>

#include "../kernels/cuda_api.h"

namespace ddfast {

// Raises what `what` returned. CUDA keeps a failed call's error for whoever asks next, which would be PyTorch after one
// of its own launches: reported here, it is forgotten there.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (cudaPeekAtLastError() == status) cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Makes a device current while it lives. Where it already is, nothing is set: that alone may create a context, of
// hundreds of megabytes, on a GPU that this process has no use for.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace ddfast
