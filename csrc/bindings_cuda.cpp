// The module ddfast_cuda: the CUDA kernels over device addresses. Imports without a GPU and without a driver: the CUDA
// runtime is linked in statically and loads the driver at the first call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels/noise.h"

namespace py = pybind11;

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

PYBIND11_MODULE(ddfast_cuda, m) {
  m.doc() = "CUDA kernels of ddfast. Private: use ddfast.ops.";
  m.attr("abi") = 1;
  m.attr("version") = DDFAST_VERSION;
  m.attr("architectures") = DDFAST_CUDA_ARCHITECTURES;

  m.def("noise", [](uint64_t seed, std::uintptr_t index, int64_t count, int64_t per_sample, std::uintptr_t out, int device,
                    std::uintptr_t stream) {
    const DeviceGuard guard(device);
    check(ddfast::noise_cuda(seed, reinterpret_cast<const int64_t*>(index), count, per_sample,
                             reinterpret_cast<float*>(out), reinterpret_cast<cudaStream_t>(stream)),
          "noise");
  }, py::call_guard<py::gil_scoped_release>());
}
