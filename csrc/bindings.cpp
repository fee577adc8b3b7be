// The module ddfast_native: the CPU kernels over raw addresses. The caller (ddfast.ops) owns and validates all arrays.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

using namespace ddfast;

// Fastest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> list;
#if defined(DDFAST_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    list.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2::kernels);
#elif defined(DDFAST_ARM64)
  list.push_back(&neon::kernels);  // which no such processor lacks
#endif
  list.push_back(&baseline::kernels);
  return list;
}

std::atomic<const Kernels*> g_kernels{available().front()};

const Kernels& kernels() { return *g_kernels.load(std::memory_order_relaxed); }

using Address = std::uintptr_t;
using py::ssize_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(Address data, int dtype, int64_t stride) { return {pointer<const void>(data), dtype, stride}; }

}  // namespace

PYBIND11_MODULE(ddfast_native, m) {
  m.doc() = "CPU kernels of ddfast. Private: use ddfast.ops.";
  m.attr("abi") = DDFAST_ABI;
  m.attr("version") = DDFAST_VERSION;

  m.def("isa_available", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(k->name);
    return names;
  }, "Instruction-set variants this machine can run, fastest first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The variant in use.");
  m.def("set_isa", [](const std::string& name) {
    std::string names;
    for (const Kernels* k : available()) {
      if (name == k->name) {
        g_kernels.store(k);
        return;
      }
      names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw py::value_error("name: got '" + name + "', expected one of " + names);
  }, "Use another variant from now on, in the whole process.");

  m.def("use_openmp", [](Address gomp_parallel) { use_openmp(pointer<void>(gomp_parallel)); },
        "Run on the threads of the OpenMP runtime that this address of GOMP_parallel belongs to; 0: on threads of our own.");

  using release_gil = py::call_guard<py::gil_scoped_release>;

  m.def("noise", [](uint64_t seed, Address index, int64_t count, int64_t per_sample, Address out, int threads) {
    noise(seed, pointer<const int64_t>(index), count, per_sample, pointer<float>(out), threads);
  }, release_gil());

  m.def("nearest_code", [](Address x, Address codebook, Address codes, int64_t rows, int64_t V, int64_t d, bool cosine,
                           int threads) {
    kernels().nearest_code({pointer<const float>(x), pointer<const float>(codebook), pointer<int64_t>(codes), rows, V, d,
                            cosine}, threads);
  }, release_gil());

  m.def("filter_logits", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                            Address cfg_scale, double temperature, int64_t top_k, double top_p, Address out, int64_t rows,
                            int64_t V, int threads) {
    return kernels().filter_logits({rows_of(logits, dtype, row_stride), rows_of(uncond, dtype, uncond_row_stride),
                                    pointer<const float>(cfg_scale), temperature, top_k, top_p, rows, V},
                                   pointer<float>(out), threads);
  }, release_gil(), "Returns -1, or the first row that holds NaN or +inf, or nothing above -inf.");

  m.def("codebook_posterior_forward", [](Address x, Address t, Address log_probs, int dtype, int64_t row_stride,
                                         Address codebook, Address x0, Address lse, int64_t rows, int64_t V, int64_t d,
                                         int threads) {
    return kernels().posterior_forward({pointer<const float>(x), pointer<const float>(t),
                                        rows_of(log_probs, dtype, row_stride), pointer<const float>(codebook), rows, V, d},
                                       pointer<float>(x0), pointer<float>(lse), threads);
  }, release_gil(), "Returns -1, or the first bad row. lse = logsumexp_j(log p_j - |x - (1-t) c_j|^2 / (2 t^2)).");

  m.def("codebook_posterior_backward", [](Address grad, Address x, Address t, Address log_probs, int dtype,
                                          int64_t row_stride, Address codebook, Address x0, Address lse, Address dx,
                                          int64_t rows, int64_t V, int64_t d, int threads) {
    kernels().posterior_backward({pointer<const float>(x), pointer<const float>(t), rows_of(log_probs, dtype, row_stride),
                                  pointer<const float>(codebook), rows, V, d},
                                 pointer<const float>(grad), pointer<const float>(x0), pointer<const float>(lse),
                                 pointer<float>(dx), threads);
  }, release_gil());

  m.def("flow_sample", [](Address log_probs, int dtype, int64_t row_stride, Address noise, Address codebook,
                          Address geometry, Address codes, Address evaluations, int64_t rows, int64_t V, int64_t d,
                          int64_t steps, int solver, double sigma_min, bool early_exit, int threads) {
    return kernels().flow_sample({rows_of(log_probs, dtype, row_stride), pointer<const float>(noise),
                                  pointer<const float>(codebook), pointer<const float>(geometry), pointer<int64_t>(codes),
                                  pointer<int32_t>(evaluations), rows, V, d, steps, solver, sigma_min, early_exit},
                                 threads);
  }, release_gil(), "Returns -1, or the first bad row. solver: 1 euler, 2 and 3 multistep, 4 heun.");

  m.def("sample_codes", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                           Address cfg_scale, double temperature, int64_t top_k, double top_p, Address noise,
                           Address codebook, Address geometry, Address codes, Address evaluations, int64_t rows, int64_t V,
                           int64_t d, int64_t steps, int solver, double sigma_min, bool early_exit, int threads) {
    return kernels().sample_codes({rows_of(logits, dtype, row_stride), rows_of(uncond, dtype, uncond_row_stride),
                                   pointer<const float>(cfg_scale), temperature, top_k, top_p, rows, V},
                                  {Rows{}, pointer<const float>(noise), pointer<const float>(codebook),
                                   pointer<const float>(geometry), pointer<int64_t>(codes), pointer<int32_t>(evaluations),
                                   rows, V, d, steps, solver, sigma_min, early_exit}, threads);
  }, release_gil(), "filter_logits, then flow_sample on what it keeps. Returns -1, or the first bad row.");

  m.def("draw_codes", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                         Address cfg_scale, double temperature, int64_t top_k, double top_p, Address uniform,
                         Address codes, int64_t rows, int64_t V, int threads) {
    return kernels().draw_codes({rows_of(logits, dtype, row_stride), rows_of(uncond, dtype, uncond_row_stride),
                                 pointer<const float>(cfg_scale), temperature, top_k, top_p, rows, V},
                                pointer<const float>(uniform), pointer<int64_t>(codes), threads);
  }, release_gil(), "filter_logits, then the code that the uniform number draws. Returns -1, or the first bad row.");

  m.def("decode_attention", [](Address qkv, int dtype, int64_t qkv_stride, Address keys, Address values,
                               Address position, Address rope, Address first, Address out, int64_t rows, int64_t heads,
                               int64_t kv_heads, int64_t length, int64_t head_dim, float scale, int threads) {
    kernels().decode_attention({pointer<const void>(qkv), dtype, qkv_stride, pointer<void>(keys), pointer<void>(values),
                                pointer<const int64_t>(position), pointer<const float>(rope),
                                pointer<const int64_t>(first), pointer<void>(out), rows, heads, kv_heads, length,
                                head_dim, scale}, threads);
  }, release_gil());

  m.def("activate", [](Address x, int64_t x_stride, Address times, int64_t times_stride, Address out, int dtype,
                       int64_t rows, int64_t width, bool gelu, int threads) {
    kernels().activate({pointer<const void>(x), pointer<const void>(times), x_stride, times_stride, pointer<void>(out),
                        dtype, rows, width, gelu}, threads);
  }, release_gil());
}
