// The CPU kernels: arguments and the table of one instruction-set variant. Pointers, sizes and a thread count only.
// Arrays are contiguous and row-major unless a stride is given; sizes in elements; V codes of dimension d.
#pragma once

#include <cstdint>

namespace ddfast {

constexpr int64_t kOk = -1;  // other statuses are the first bad row

enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Of an element, in bytes. Static: every variant has its own.
static constexpr int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Rows {  // [rows, V] of any dtype, rows `stride` elements apart
  const void* data;
  int dtype;
  int64_t stride;
};

struct NearestCodeArgs {
  const float *x, *codebook;
  int64_t* codes;
  int64_t rows, V, d;
  bool cosine;
};

struct FilterArgs {
  Rows logits, uncond;     // uncond.data may be null; the same dtype as logits
  const float* cfg_scale;  // [rows], used with uncond
  double temperature;
  int64_t top_k;
  double top_p;
  int64_t rows, V;
};

struct PosteriorArgs {
  const float *x, *t;
  Rows log_probs;
  const float* codebook;
  int64_t rows, V, d;
};

struct FlowArgs {
  Rows log_probs;  // unused by sample_codes
  const float *noise, *codebook;
  const float* geometry;  // [V + 1]: distance of each code to its nearest other code; a bound on the codebook's diameter
  int64_t* codes;
  int32_t* evaluations;  // [rows], or null
  int64_t rows, V, d, steps;
  int solver;
  double sigma_min;
  bool early_exit;
};

struct AttentionArgs {
  const void* qkv;  // [rows, (heads + 2 kv_heads) head_dim], rows qkv_stride elements apart
  int dtype;        // of qkv, keys, values and out
  int64_t qkv_stride;
  void *keys, *values;      // [rows, kv_heads, length, head_dim]
  const int64_t* position;  // [1]
  const float* rope;        // [length, head_dim / 2, 2], cosine and sine; or null
  const int64_t* first;     // [rows], or null
  void* out;                // [rows, heads, head_dim]
  int64_t rows, heads, kv_heads, length, head_dim;
  float scale;
};

struct ActivateArgs {
  const void *x, *times;  // [rows, width], rows so many elements apart; times may be null
  int64_t x_stride, times_stride;
  void* out;              // [rows, width]
  int dtype;              // of all three
  int64_t rows, width;
  bool gelu;              // else silu
};

struct Kernels {
  const char* name;
  void (*nearest_code)(const NearestCodeArgs&, int threads);
  int64_t (*filter_logits)(const FilterArgs&, float* out, int threads);
  int64_t (*posterior_forward)(const PosteriorArgs&, float* x0, float* lse, int threads);
  void (*posterior_backward)(const PosteriorArgs&, const float* grad, const float* x0, const float* lse, float* dx,
                             int threads);
  int64_t (*flow_sample)(const FlowArgs&, int threads);
  int64_t (*sample_codes)(const FilterArgs&, const FlowArgs&, int threads);
  int64_t (*draw_codes)(const FilterArgs&, const float* uniform, int64_t* codes, int threads);
  void (*decode_attention)(const AttentionArgs&, int threads);
  void (*activate)(const ActivateArgs&, int threads);
};

#if defined(DDFAST_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#elif defined(DDFAST_ARM64)
namespace neon {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

void noise(uint64_t seed, const int64_t* index, int64_t count, int64_t per_sample, float* out, int threads);

}  // namespace ddfast
