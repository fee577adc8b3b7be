// The module ddfast_cuda: the CUDA kernels over device addresses. Imports without a GPU and without a driver: the CUDA
// runtime is linked in statically and loads the driver at the first call.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels/codebook_posterior.h"
#include "../kernels/filter_logits.h"
#include "../kernels/flow_sample.h"
#include "../kernels/nearest_code.h"
#include "../kernels/noise.h"

namespace py = pybind11;

namespace {

using namespace ddfast;

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

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
  m.attr("abi") = 4;
  m.attr("version") = DDFAST_VERSION;
  m.attr("architectures") = DDFAST_CUDA_ARCHITECTURES;

  m.attr("max_dim") = std::min({kFlowMaxDim, kPosteriorMaxDim, kNearestMaxDim});

  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def("noise", [](uint64_t seed, Address index, int64_t count, int64_t per_sample, Address out, int device,
                    Address stream) {
    const DeviceGuard guard(device);
    check(noise_cuda(seed, pointer<const int64_t>(index), count, per_sample, pointer<float>(out), stream_of(stream)),
          "noise");
  }, no_gil);

  // For the cosine the codebook is normalised. cluster: 0 chooses.
  m.def("nearest_code", [](Address x, Address codebook, Address codes, int64_t rows, int64_t V, int64_t d, bool cosine,
                           int cluster, int device, Address stream) {
    const DeviceGuard guard(device);
    const NearestArguments arguments{pointer<const float>(x), pointer<const float>(codebook), pointer<int64_t>(codes),
                                     rows, V, d, cosine};
    check(nearest_code_cuda(arguments, cluster, stream_of(stream)), "nearest_code");
  }, no_gil);

  // Row r of x uses row r % period of log_probs.
  m.def("codebook_posterior_forward", [](Address x, Address t, Address log_probs, int dtype, int64_t stride,
                                         int64_t period, Address codebook, Address x0, Address log_norm, int64_t rows,
                                         int64_t V, int64_t d, int device, Address stream) {
    const DeviceGuard guard(device);
    const PosteriorArguments arguments{
        pointer<const float>(x), pointer<const float>(t), pointer<const void>(log_probs),
        pointer<const float>(codebook),
        pointer<float>(x0), pointer<float>(log_norm), nullptr, nullptr, stride, rows, period, V, d, dtype};
    check(codebook_posterior_forward_cuda(arguments, stream_of(stream)), "codebook_posterior_forward");
  }, no_gil);

  m.def("codebook_posterior_backward", [](Address grad, Address x, Address t, Address log_probs, int dtype,
                                          int64_t stride, int64_t period, Address codebook, Address x0,
                                          Address log_norm, Address dx, int64_t rows, int64_t V, int64_t d, int device,
                                          Address stream) {
    const DeviceGuard guard(device);
    const PosteriorArguments arguments{
        pointer<const float>(x), pointer<const float>(t), pointer<const void>(log_probs),
        pointer<const float>(codebook),
        pointer<float>(x0), pointer<float>(log_norm), pointer<const float>(grad), pointer<float>(dx), stride, rows,
        period, V, d, dtype};
    check(codebook_posterior_backward_cuda(arguments, stream_of(stream)), "codebook_posterior_backward");
  }, no_gil);

  // Bytes of device memory that filter_logits wants as `scratch`: 0 for the usual sizes.
  m.def("filter_scratch_bytes", [](int64_t rows, int64_t V, int cluster, int device) {
    const DeviceGuard guard(device);
    int64_t bytes = 0;
    check(filter_scratch_bytes(rows, V, cluster, &bytes), "filter_scratch_bytes");
    return bytes;
  });

  m.def("filter_logits", [](Address logits, int dtype, int64_t stride, Address uncond, int64_t uncond_stride,
                            Address cfg_scale, float temperature, int64_t top_k, double top_p, Address log_probs,
                            Address scratch, int64_t rows, int64_t V, int cluster, int device, Address stream) {
    const DeviceGuard guard(device);
    const FilterArguments arguments{
        pointer<const void>(logits), pointer<const void>(uncond), pointer<const float>(cfg_scale), stride,
        uncond_stride, rows, V, top_k, top_p, temperature, dtype};
    check(filter_logits_cuda(arguments, pointer<float>(log_probs), pointer<void>(scratch), cluster, stream_of(stream)),
          "filter_logits");
  }, no_gil);

  // Bytes of device memory that flow_sample and sample_codes want as `scratch`.
  m.def("flow_scratch_bytes", [](int64_t rows, int64_t V, int64_t d, int64_t top_k, double top_p, int cluster,
                                 int device) {
    const DeviceGuard guard(device);
    int64_t bytes = 0;
    check(flow_scratch_bytes(rows, V, d, top_k, top_p, cluster, &bytes), "flow_scratch_bytes");
    return bytes;
  });

  m.def("flow_sample", [](Address log_probs, int dtype, int64_t stride, Address noise, Address codebook,
                          Address geometry, Address codes, Address evaluations, Address scratch, int64_t rows,
                          int64_t V, int64_t d, int steps, int solver, float sigma_min, bool early_exit, int cluster,
                          int device, Address stream) {
    const DeviceGuard guard(device);
    const FlowArguments arguments{
        {pointer<const void>(log_probs), nullptr, nullptr, stride, 0, rows, V, 0, 1., 1.f, dtype},
        pointer<const float>(noise), pointer<const float>(codebook), pointer<const float>(geometry),
        pointer<int64_t>(codes), pointer<int32_t>(evaluations), pointer<void>(scratch), d, sigma_min, steps, solver,
        early_exit};
    check(flow_sample_cuda(arguments, cluster, stream_of(stream)), "flow_sample");
  }, no_gil);

  m.def("sample_codes", [](Address logits, int dtype, int64_t stride, Address uncond, int64_t uncond_stride,
                           Address cfg_scale, float temperature, int64_t top_k, double top_p, Address noise,
                           Address codebook, Address geometry, Address codes, Address evaluations, Address scratch,
                           int64_t rows, int64_t V, int64_t d, int steps, int solver, float sigma_min, bool early_exit,
                           int cluster, int device, Address stream) {
    const DeviceGuard guard(device);
    const FlowArguments arguments{
        {pointer<const void>(logits), pointer<const void>(uncond), pointer<const float>(cfg_scale), stride,
         uncond_stride, rows, V, top_k, top_p, temperature, dtype},
        pointer<const float>(noise), pointer<const float>(codebook), pointer<const float>(geometry),
        pointer<int64_t>(codes), pointer<int32_t>(evaluations), pointer<void>(scratch), d, sigma_min, steps, solver,
        early_exit};
    check(flow_sample_cuda(arguments, cluster, stream_of(stream)), "sample_codes");
  }, no_gil);
}
