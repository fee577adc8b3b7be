// The kernels' own source files, compiled as C++ for the emulator, behind C functions for ctypes.
#include "emulator.h"

#include "../../kernels/flow_sample.cu"

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
