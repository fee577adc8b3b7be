// The kernels' own source files, compiled as C++ for the emulator, behind C functions for ctypes.
#include "emulator.h"

#include "../../kernels/codebook_posterior.cu"
#include "../../kernels/draw_codes.cu"
#include "../../kernels/filter_logits.cu"
#include "../../kernels/flow_sample.cu"
#include "../../kernels/nearest_code.cu"
#include "../../kernels/noise.cu"

using namespace ddfast;

namespace {

// Kernels that are wrong on purpose, to see that the emulator says so. out: [64].
struct Mistake {
  int kind;
  float* out;
};

void mistake_kernel(const Mistake mistake) {
  float* shared = (float*)simt::shared_memory();  // [64]
  const int i = simt::thread();
  const bool half = i % 2;
  if (mistake.kind != 5) shared[i] = (float)i;
  if (mistake.kind == 1 && half) return;                                        // some leave, the others wait
  if (mistake.kind == 2 && i < 32) simt::warp_barrier();                        // no harm
  if (mistake.kind == 3) half ? (void)simt::ballot(true) : simt::warp_barrier();  // different collectives
  if (mistake.kind == 4 && i == 0) shared[64] = 1.f;                            // past the end
  if (mistake.kind != 6) simt::block_barrier();                                 // 6: forgotten
  mistake.out[i] = shared[63 - i];
}

// And some that touch what is not theirs. in, out: [64], of one block's threads.
enum TrespassKind {
  kPastTheEnd, kBeforeTheBeginning, kIntoAnInput, kPastSharedMemory, kMisaligned, kNobodys, kShift,
  kReturned, kNotStarted, kNoSuchRank,  // clusters of 2 blocks, of which the one of rank 1 writes `out`
};

struct Trespass {
  int kind;
  const float* in;
  float* out;
};

struct alignas(16) Vector {
  float value[4];
};

void trespass_kernel(const Trespass a) {
  float* shared = (float*)simt::shared_memory();  // [64]
  const int i = simt::thread(), rank = simt::cluster_rank(2);
  shared[i] = (float)i;
  if (a.kind == kNotStarted && rank == 0) *simt::of_rank(shared + i, 1, 2) = 0.f;
  simt::cluster_barrier(2);
  if (a.kind >= kReturned && rank == 0) return;
  float value = a.in[i];
  if (a.kind == kPastTheEnd) value = a.in[i + 1];
  if (a.kind == kBeforeTheBeginning) value = a.in[i - 1];
  if (a.kind == kIntoAnInput) ((float*)a.in)[i] = value + 1.f;
  if (a.kind == kPastSharedMemory) value = shared[i + 1];
  if (a.kind == kMisaligned) value = ((const Vector*)(a.in + i % 32))->value[3];
  if (a.kind == kNobodys) value = *(volatile float*)((uintptr_t)64 << 40);
  if (a.kind == kShift) value = (float)(1 << i);
  if (a.kind == kReturned) value = *simt::of_rank(shared + i, 0, 2);
  if (a.kind == kNoSuchRank) value = *simt::of_rank(shared + i, 2, 2);
  a.out[i] = value;
}

// out: [64], 1, 2, .. if the blocks run one after the other, which nothing here makes them do.
void chain_kernel(float* const out) {
  const int block = simt::block();
  simt::block_barrier();
  if (simt::thread() == 0) out[block] = block ? out[block - 1] + 1.f : 1.f;
}

enum ProductKind { kTf32, kBf16Short, kBf16 };

struct Product {
  const float *a, *b;
  float* out;
  int kind;
};

void product_kernel(const Product p) {  // out [16, 8] = a [16, K] b [K, 8]; K is 8, or 16 for kBf16
  const int g = simt::lane() / 4, q = simt::lane() % 4, K = p.kind == kBf16 ? 16 : 8;
  const auto at = [&](int row, int k) { return p.a[row * K + k]; };
  const auto bt = [&](int k, int column) { return p.b[k * 8 + column]; };
  float out[4] = {};
  if (p.kind == kTf32) {
    const auto bits = [](float x) { return simt::float_bits(x); };
    const uint32_t a[4] = {bits(at(g, q)), bits(at(g + 8, q)), bits(at(g, q + 4)), bits(at(g + 8, q + 4))};
    const uint32_t b[2] = {bits(bt(q, g)), bits(bt(q + 4, g))};
    simt::mma_tf32(out, a, b);
  } else {
    const auto a_pair = [&](int row, int k) { return k < K ? simt::pack_bf16(at(row, k), at(row, k + 1)) : 0u; };
    const auto b_pair = [&](int k) { return k < K ? simt::pack_bf16(bt(k, g), bt(k + 1, g)) : 0u; };
    const uint32_t a[4] = {a_pair(g, 2 * q), a_pair(g + 8, 2 * q), a_pair(g, 2 * q + 8), a_pair(g + 8, 2 * q + 8)};
    const uint32_t b[2] = {b_pair(2 * q), b_pair(2 * q + 8)};
    const float zero[4] = {};
    p.kind == kBf16 ? simt::mma_bf16_k16(out, a, b, zero) : simt::mma_bf16_k8(out, a, b, zero);
  }
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = out[i];
}

int64_t bytes_of_rows(int64_t rows, int64_t stride, int64_t V, int dtype) {
  return rows > 0 ? ((rows - 1) * stride + V) * (dtype == 0 ? 4 : 2) : 0;
}

void fence_filter(emulator::Tensors& tensors, FilterArguments& a) {
  tensors.input(a.logits, bytes_of_rows(a.rows, a.stride, a.V, a.dtype), "logits");
  tensors.input(a.uncond, bytes_of_rows(a.rows, a.uncond_stride, a.V, a.dtype), "uncond");
  tensors.input(a.cfg_scale, a.rows, "cfg_scale");
}

}  // namespace

extern "C" {

int mistake_emulated(int kind, float* out) {
  return simt::launch(mistake_kernel, 1, 64, 64 * sizeof(float), 1, nullptr, Mistake{kind, out});
}
int trespass_emulated(int kind, const float* in, float* out) {
  emulator::Tensors tensors;
  tensors.input(in, 64, "in");
  tensors.output(out, 64, "out");
  const int cluster = kind >= kReturned ? 2 : 1;
  return tensors.close(
      simt::launch(trespass_kernel, cluster, 64, 64 * sizeof(float), cluster, nullptr, Trespass{kind, in, out}));
}
int chain_emulated(float* out, int cluster) { return simt::launch(chain_kernel, 64, 64, 0, cluster, nullptr, out); }
int product_emulated(const float* a, const float* b, float* out, int kind) {
  return simt::launch(product_kernel, 1, 32, 0, 1, nullptr, Product{a, b, out, kind});
}
int filter_emulated(const FilterArguments* a, float* log_probs, void* scratch, int cluster) {
  emulator::Tensors tensors;
  FilterArguments fenced = *a;
  int64_t bytes = 0;
  filter_scratch_bytes(a->rows, a->V, cluster, &bytes);
  fence_filter(tensors, fenced);
  tensors.output(log_probs, a->rows * a->V, "log_probs");
  tensors.output(scratch, bytes, "scratch");
  return tensors.close(filter_logits_cuda(fenced, log_probs, scratch, cluster, nullptr));
}
int filter_scratch_emulated(int64_t rows, int64_t V, int cluster, int64_t* out) {
  return filter_scratch_bytes(rows, V, cluster, out);
}

int draw_emulated(const DrawArguments* a, int cluster) {
  emulator::Tensors tensors;
  DrawArguments fenced = *a;
  int64_t bytes = 0;
  draw_scratch_bytes(a->filter.rows, a->filter.V, cluster, &bytes);
  fence_filter(tensors, fenced.filter);
  tensors.input(fenced.uniform, a->filter.rows, "uniform");
  tensors.output(fenced.codes, a->filter.rows, "codes");
  tensors.output(fenced.scratch, bytes, "scratch");
  return tensors.close(draw_codes_cuda(fenced, cluster, nullptr));
}
int draw_scratch_emulated(int64_t rows, int64_t V, int cluster, int64_t* out) {
  return draw_scratch_bytes(rows, V, cluster, out);
}
int draw_cluster_emulated(int64_t V) {  // blocks per row
  simt::Device device;
  simt::device(&device);
  return draw_plan(device, 1, V, 0).cluster;
}

const char* emulator_error() { return emulator::state.error.c_str(); }

// seed: draws the order in which threads run (0: ascending); front: an access before a tensor is what must fail, not one
// past its end; the rest is what the device would report.
void emulator_configure(uint64_t seed, int shared_limit, int clusters, int multiprocessors, int front) {
  emulator::state.seed = seed;
  emulator::state.front = front != 0;
  emulator::state.shared_limit = shared_limit;
  emulator::state.has_clusters = clusters != 0;
  emulator::state.multiprocessors = multiprocessors;
}

int flow_sample_emulated(const FlowArguments* a, int cluster) {
  emulator::Tensors tensors;
  FlowArguments fenced = *a;
  const FilterArguments& filter = a->filter;
  int64_t bytes = 0;
  flow_scratch_bytes(filter.rows, filter.V, a->d, filter.top_k, filter.top_p, cluster, &bytes);
  fence_filter(tensors, fenced.filter);
  tensors.input(fenced.noise, filter.rows * a->d, "noise");
  tensors.input(fenced.codebook, filter.V * a->d, "codebook");
  tensors.input(fenced.geometry, filter.V + 1, "geometry");
  tensors.output(fenced.codes, filter.rows, "codes");
  tensors.output(fenced.evaluations, filter.rows, "evaluations");
  tensors.output(fenced.scratch, bytes, "scratch");
  return tensors.close(flow_sample_cuda(fenced, cluster, nullptr));
}
int flow_scratch_emulated(int64_t rows, int64_t V, int64_t d, int64_t top_k, double top_p, int cluster, int64_t* out) {
  return flow_scratch_bytes(rows, V, d, top_k, top_p, cluster, out);
}
// out: codes that a row may keep in a launch of narrow blocks (-1: there is none); blocks per row of the one of wide
// blocks (0: there is none).
void flow_plan_emulated(int64_t V, int64_t d, int64_t top_k, double top_p, int64_t* out) {
  simt::Device device;
  simt::device(&device);
  with_lanes(d, [&](auto lanes) {
    constexpr int L = decltype(lanes)::value;
    const Plan plan = plan_of<L>(device, 1, V, d, top_k, top_p, 0);
    out[0] = plan.narrow ? Shape<L, kNarrow>::kInRegisters + plan.narrow_memory.staged : -1;
    out[1] = plan.wide ? plan.cluster : 0;
  });
}

int posterior_emulated(const PosteriorArguments* a, int backward) {
  emulator::Tensors tensors;
  PosteriorArguments fenced = *a;
  const int64_t size = a->rows * a->d;
  tensors.input(fenced.x, size, "x");
  tensors.input(fenced.t, a->rows, "t");
  tensors.input(fenced.log_probs, bytes_of_rows(a->period, a->stride, a->V, a->dtype), "log_probs");
  tensors.input(fenced.codebook, a->V * a->d, "codebook");
  tensors.output(fenced.x0, size, "x0");
  tensors.output(fenced.log_norm, a->rows, "log_norm");
  if (!backward) return tensors.close(codebook_posterior_forward_cuda(fenced, nullptr));
  tensors.input(fenced.grad, size, "grad");
  tensors.output(fenced.dx, size, "dx");
  return tensors.close(codebook_posterior_backward_cuda(fenced, nullptr));
}

int nearest_emulated(const NearestArguments* a, int cluster) {
  emulator::Tensors tensors;
  NearestArguments fenced = *a;
  tensors.input(fenced.x, a->rows * a->d, "x");
  tensors.input(fenced.codebook, a->V * a->d, "codebook");
  tensors.output(fenced.codes, a->rows, "codes");
  return tensors.close(nearest_code_cuda(fenced, cluster, nullptr));
}

int noise_emulated(const NoiseArguments* a) {
  emulator::Tensors tensors;
  NoiseArguments fenced = *a;
  tensors.input(fenced.index, a->count, "index");
  tensors.output(fenced.out, a->count * a->per_sample, "out");
  return tensors.close(noise_cuda(fenced, nullptr));
}

// v of nearest_code, in the order of operations that defines it.
void nearest_scores(const float* x, const float* codebook, int64_t V, int64_t d, int cosine, float* out) {
  for (int64_t j = 0; j < V; ++j) {
    float score = 0.f;
    for (int64_t k = 0; k < d && !cosine; ++k) score = fmaf(codebook[j * d + k], codebook[j * d + k], score);
    score /= 2.f;
    for (int64_t k = 0; k < d; ++k) score = fmaf(-x[k], codebook[j * d + k], score);
    out[j] = score;
  }
}

// Shared math, as the host has it.
uint32_t math_key_of(float x) { return key_of(x); }
float math_value_of_key(uint32_t key) { return value_of_key(key); }
uint64_t math_fixed_mass(float weight) { return fixed_mass(weight); }
uint64_t math_mass_goal(double fraction, uint64_t total) { return mass_goal(fraction, total); }
void math_exponential_integrals(float h, float* out) { exponential_integrals(h, out, out + 1, out + 2); }
void math_flow_grid(float spread, float sigma_min, int steps, int solver, float* out) {
  const FlowGrid grid = flow_grid(spread, sigma_min, steps, solver);
  std::memcpy(out, &grid, sizeof grid);
}
int math_flow_is_decided(float rest, float nearest, float diameter, float gap, float slack) {
  return flow_is_decided(rest, nearest, diameter, gap, slack);
}
}
