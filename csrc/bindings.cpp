// The module ddfast_native: the CPU kernels over raw addresses. What a number alone tells is looked at here, in some
// nanoseconds of a call: sizes, strides, settings, addresses that are null or not aligned. That arrays are as long as the
// sizes say, and which of them may overlap, the caller (ddfast.ops) knows, who owns them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
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

constexpr int64_t kMostElements = int64_t(1) << 44;      // of one array: more bytes than an address space has
constexpr int64_t kMostCodes = (int64_t(1) << 31) - 129;  // codes are numbered by int32, rounded up to full vectors

template <class T>
void check(bool right, const char* name, T got, const char* expected) {
  if (!right) throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) + ", expected " + expected);
}

void check_size(const char* name, int64_t size, int64_t least = 1, int64_t most = kMostElements) {
  if (size < least || size > most)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(size) + ", expected from " +
                                std::to_string(least) + " to " + std::to_string(most));
}

// The product of sizes, none of which is negative; 0 if one of them is.
int64_t product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    if (count > kMostElements / size)
      throw std::invalid_argument(std::string(name) + ": got sizes of more elements than memory can hold");
    count *= size;
  }
  return count;
}

void check_address(const char* name, Address address, int64_t elements, Address alignment) {
  if (elements > 0 && address == 0) throw std::invalid_argument(std::string(name) + ": got no address");
  if (address % alignment)
    throw std::invalid_argument(std::string(name) + ": got an address that " + std::to_string(alignment) +
                                " does not divide, the size of an element: clone() has another");
}

template <class T>
T* array(const char* name, Address address, std::initializer_list<int64_t> sizes) {
  check_address(name, address, product(name, sizes), alignof(T));
  return pointer<T>(address);
}

template <class T>
T* optional(const char* name, Address address, std::initializer_list<int64_t> sizes) {
  return address ? array<T>(name, address, sizes) : nullptr;
}

void check_dtype(int dtype) {
  check(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16, "dtype", dtype, "0, 1 or 2");
}

// [rows, width] of a dtype, rows so many elements apart.
const void* strided(const char* name, Address data, int dtype, int64_t stride, int64_t rows, int64_t width) {
  check_size(name, stride, 0);
  product(name, {rows, stride});
  check_address(name, data, product(name, {rows, width}), size_of(dtype));
  return pointer<const void>(data);
}

Rows rows_of(const char* name, Address data, int dtype, int64_t stride, int64_t rows, int64_t V) {
  check_dtype(dtype);
  return {strided(name, data, dtype, stride, rows, V), dtype, stride};
}

void check_codes(int64_t rows, int64_t V) {
  check_size("rows", rows, 0);
  check_size("V", V, 1, kMostCodes);
}

// With room for what kernels keep of a codebook beside the codes.
const float* codebook_of(Address codebook, int64_t V, int64_t d) {
  check_size("d", d);
  product("codebook", {V + 128, d + 8});
  return array<const float>("codebook", codebook, {V, d});
}

FilterArgs filter_of(Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                     Address cfg_scale, double temperature, int64_t top_k, double top_p, int64_t rows, int64_t V) {
  check_codes(rows, V);
  check(temperature > 0, "temperature", temperature, "a positive number");
  check(top_k >= 0, "top_k", top_k, "0 or more");
  check(top_p >= 0 && top_p <= 1, "top_p", top_p, "0 <= top_p <= 1");
  FilterArgs args{rows_of("logits", logits, dtype, row_stride, rows, V), {}, nullptr, temperature, top_k, top_p, rows, V};
  if (uncond) {
    args.uncond = rows_of("uncond", uncond, dtype, uncond_row_stride, rows, V);
    args.cfg_scale = array<const float>("cfg_scale", cfg_scale, {rows});
  }
  return args;
}

PosteriorArgs posterior_of(Address x, Address t, Address log_probs, int dtype, int64_t row_stride, Address codebook,
                           int64_t rows, int64_t V, int64_t d) {
  check_codes(rows, V);
  const float* codes = codebook_of(codebook, V, d);
  return {array<const float>("x", x, {rows, d}), array<const float>("t", t, {rows}),
          rows_of("log_probs", log_probs, dtype, row_stride, rows, V), codes, rows, V, d};
}

// But for the rows of log_probs, which sample_codes makes itself.
FlowArgs flow_of(Address noise, Address codebook, Address geometry, Address codes, Address evaluations, int64_t rows,
                 int64_t V, int64_t d, int64_t steps, int solver, double sigma_min, bool early_exit) {
  check_codes(rows, V);
  check_size("steps", steps, 1, 1 << 30);  // evaluations, up to two a step, are counted in int32
  check(solver >= 1 && solver <= 4, "solver", solver, "1 to 4");
  check(sigma_min > 0 && sigma_min < 1e300, "sigma_min", sigma_min, "a positive number");
  const float* packed = codebook_of(codebook, V, d);
  return {Rows{}, array<const float>("noise", noise, {rows, d}), packed,
          array<const float>("geometry", geometry, {V + 1}), array<int64_t>("codes", codes, {rows}),
          optional<int32_t>("evaluations", evaluations, {rows}), rows, V, d, steps, solver, sigma_min, early_exit};
}

// Far more than a machine has: a runtime that is asked for them ends the process.
void check_threads(int threads) { check_size("threads", threads, 1, 4096); }

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
    check_threads(threads);
    check_size("count", count, 0);
    check_size("per_sample", per_sample, 0, (int64_t(1) << 34) - 4);  // in fours, which uint32 counts
    noise(seed, array<const int64_t>("index", index, {count}), count, per_sample,
          array<float>("out", out, {count, per_sample}), threads);
  }, release_gil());

  m.def("nearest_code", [](Address x, Address codebook, Address codes, int64_t rows, int64_t V, int64_t d, bool cosine,
                           int threads) {
    check_threads(threads);
    check_codes(rows, V);
    const float* packed = codebook_of(codebook, V, d);
    kernels().nearest_code({array<const float>("x", x, {rows, d}), packed, array<int64_t>("codes", codes, {rows}), rows, V,
                            d, cosine}, threads);
  }, release_gil());

  m.def("filter_logits", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                            Address cfg_scale, double temperature, int64_t top_k, double top_p, Address out, int64_t rows,
                            int64_t V, int threads) {
    check_threads(threads);
    const FilterArgs args = filter_of(logits, dtype, row_stride, uncond, uncond_row_stride, cfg_scale, temperature, top_k,
                                      top_p, rows, V);
    return kernels().filter_logits(args, array<float>("out", out, {rows, V}), threads);
  }, release_gil(), "Returns -1, or the first row that holds NaN or +inf, or nothing above -inf.");

  m.def("codebook_posterior_forward", [](Address x, Address t, Address log_probs, int dtype, int64_t row_stride,
                                         Address codebook, Address x0, Address lse, int64_t rows, int64_t V, int64_t d,
                                         int threads) {
    check_threads(threads);
    const PosteriorArgs args = posterior_of(x, t, log_probs, dtype, row_stride, codebook, rows, V, d);
    return kernels().posterior_forward(args, array<float>("x0", x0, {rows, d}), array<float>("lse", lse, {rows}), threads);
  }, release_gil(), "Returns -1, or the first bad row. lse = logsumexp_j(log p_j - |x - (1-t) c_j|^2 / (2 t^2)).");

  m.def("codebook_posterior_backward", [](Address grad, Address x, Address t, Address log_probs, int dtype,
                                          int64_t row_stride, Address codebook, Address x0, Address lse, Address dx,
                                          int64_t rows, int64_t V, int64_t d, int threads) {
    check_threads(threads);
    const PosteriorArgs args = posterior_of(x, t, log_probs, dtype, row_stride, codebook, rows, V, d);
    kernels().posterior_backward(args, array<const float>("grad", grad, {rows, d}), array<const float>("x0", x0, {rows, d}),
                                 array<const float>("lse", lse, {rows}), array<float>("dx", dx, {rows, d}), threads);
  }, release_gil());

  m.def("flow_sample", [](Address log_probs, int dtype, int64_t row_stride, Address noise, Address codebook,
                          Address geometry, Address codes, Address evaluations, int64_t rows, int64_t V, int64_t d,
                          int64_t steps, int solver, double sigma_min, bool early_exit, int threads) {
    check_threads(threads);
    FlowArgs args = flow_of(noise, codebook, geometry, codes, evaluations, rows, V, d, steps, solver, sigma_min,
                            early_exit);
    args.log_probs = rows_of("log_probs", log_probs, dtype, row_stride, rows, V);
    return kernels().flow_sample(args, threads);
  }, release_gil(), "Returns -1, or the first bad row. solver: 1 euler, 2 and 3 multistep, 4 heun.");

  m.def("sample_codes", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                           Address cfg_scale, double temperature, int64_t top_k, double top_p, Address noise,
                           Address codebook, Address geometry, Address codes, Address evaluations, int64_t rows, int64_t V,
                           int64_t d, int64_t steps, int solver, double sigma_min, bool early_exit, int threads) {
    check_threads(threads);
    const FilterArgs filter = filter_of(logits, dtype, row_stride, uncond, uncond_row_stride, cfg_scale, temperature, top_k,
                                        top_p, rows, V);
    const FlowArgs args = flow_of(noise, codebook, geometry, codes, evaluations, rows, V, d, steps, solver, sigma_min,
                                  early_exit);
    return kernels().sample_codes(filter, args, threads);
  }, release_gil(), "filter_logits, then flow_sample on what it keeps. Returns -1, or the first bad row.");

  m.def("draw_codes", [](Address logits, int dtype, int64_t row_stride, Address uncond, int64_t uncond_row_stride,
                         Address cfg_scale, double temperature, int64_t top_k, double top_p, Address uniform,
                         Address codes, int64_t rows, int64_t V, int threads) {
    check_threads(threads);
    const FilterArgs args = filter_of(logits, dtype, row_stride, uncond, uncond_row_stride, cfg_scale, temperature, top_k,
                                      top_p, rows, V);
    return kernels().draw_codes(args, array<const float>("uniform", uniform, {rows}), array<int64_t>("codes", codes, {rows}),
                                threads);
  }, release_gil(), "filter_logits, then the code that the uniform number draws. Returns -1, or the first bad row.");

  m.def("decode_attention", [](Address qkv, int dtype, int64_t qkv_stride, Address keys, Address values,
                               Address position, Address rope, Address first, Address out, int64_t rows, int64_t heads,
                               int64_t kv_heads, int64_t length, int64_t head_dim, float scale, int threads) {
    check_threads(threads);
    check_dtype(dtype);
    check_size("rows", rows, 0);
    check_size("kv_heads", kv_heads);
    check_size("heads", heads);
    check(heads % kv_heads == 0, "heads", heads, "a multiple of kv_heads");
    check_size("length", length);
    check_size("head_dim", head_dim);
    check(rope == 0 || head_dim % 2 == 0, "head_dim", head_dim, "an even one to rotate");
    const int64_t width = product("qkv", {heads, head_dim}) + 2 * product("qkv", {kv_heads, head_dim});
    const int64_t cached = product("keys", {rows, kv_heads, length + 16, head_dim});
    check_address("keys", keys, cached, size_of(dtype));
    check_address("values", values, cached, size_of(dtype));
    check_address("out", out, product("out", {rows, width}), size_of(dtype));
    const int64_t* here = array<const int64_t>("position", position, {1});
    if (rows > 0) check_size("position", *here, 0, length - 1);
    kernels().decode_attention({strided("qkv", qkv, dtype, qkv_stride, rows, width), dtype, qkv_stride, pointer<void>(keys),
                                pointer<void>(values), here, optional<const float>("rope", rope, {length, head_dim}),
                                optional<const int64_t>("first", first, {rows}), pointer<void>(out), rows, heads, kv_heads,
                                length, head_dim, scale}, threads);
  }, release_gil());

  m.def("activate", [](Address x, int64_t x_stride, Address times, int64_t times_stride, Address out, int dtype,
                       int64_t rows, int64_t width, bool gelu, int threads) {
    check_threads(threads);
    check_dtype(dtype);
    check_size("rows", rows, 0);
    check_size("width", width, 0);
    check_address("out", out, product("out", {rows, width}), size_of(dtype));
    kernels().activate({strided("x", x, dtype, x_stride, rows, width),
                        times ? strided("times", times, dtype, times_stride, rows, width) : nullptr, x_stride, times_stride,
                        pointer<void>(out), dtype, rows, width, gelu}, threads);
  }, release_gil());
}
