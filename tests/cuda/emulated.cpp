// The kernels' own source files, compiled as C++ for the emulator, behind C functions for ctypes.
#include "emulator.h"

#include "../../kernels/codebook_posterior.cu"
#include "../../kernels/flow_sample.cu"
#include "../../kernels/nearest_code.cu"

using namespace ddfast;

extern "C" {

const char* emulator_error() { return emulator::state.error.c_str(); }

// seed: draws the order in which threads run (0: ascending); the rest is what the device would report.
void emulator_configure(uint64_t seed, int shared_limit, int clusters) {
  emulator::state.seed = seed;
  emulator::state.shared_limit = shared_limit;
  emulator::state.clusters = clusters != 0;
}

int flow_sample_emulated(const FlowArguments* a, int cluster) { return flow_sample_cuda(*a, cluster, nullptr); }
int flow_cluster_emulated(int64_t V, int64_t d, int64_t top_k, int* out) { return flow_cluster(V, d, top_k, out); }
int flow_scratch_emulated(int64_t rows, int64_t V, int64_t d, int64_t top_k, int cluster, int64_t* out) {
  return flow_scratch_bytes(rows, V, d, top_k, cluster, out);
}

int posterior_emulated(const PosteriorArguments* a, int backward) {
  return backward ? codebook_posterior_backward_cuda(*a, nullptr) : codebook_posterior_forward_cuda(*a, nullptr);
}

int nearest_emulated(const NearestArguments* a, int cluster) { return nearest_code_cuda(*a, cluster, nullptr); }
float nearest_error(int dim) {
  return dim == 8 ? kDotError<8> : dim == 16 ? kDotError<16> : dim == 32 ? kDotError<32> : kDotError<64>;
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
