// Scalar math of the filter and the flow, for host and device: floats ordered as integers, probability masses in fixed
// point, the time grid and the solvers' coefficients.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DDFAST_MATH __host__ __device__ __forceinline__
#else
#define DDFAST_MATH inline
#endif

namespace ddfast {

// Floats in an order-preserving way on unsigned integers, and back; -0 counts as 0. No float is below kKeyOfMinusInf
// but NaNs with the sign bit, and 0 stands for nothing at all.
constexpr uint32_t kKeyOfMinusInf = 0x007fffffu;

DDFAST_MATH uint32_t key_of(float x) {
  union {
    float f;
    uint32_t i;
  } bits;
  bits.f = x + 0.f;
  return bits.i & 0x80000000u ? ~bits.i : bits.i | 0x80000000u;
}

DDFAST_MATH float value_of_key(uint32_t key) {
  union {
    uint32_t i;
    float f;
  } bits;
  bits.i = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  return bits.f;
}

// A weight in [0, 1] in units of 2^-40: sums of up to 2^23 of them are exact, in any order.
DDFAST_MATH uint64_t fixed_mass(float weight) { return (uint64_t)(weight * 1099511627776.f); }

// The least fixed-point mass that is at least `fraction` of `total`; at least 1, so that the first entry always stays.
DDFAST_MATH uint64_t mass_goal(double fraction, uint64_t total) {
  const double goal = ceil(fraction * (double)total);
  return goal < 1. ? 1 : (uint64_t)goal;
}

enum FlowSolver { kSolverEuler = 1, kSolverMultistep2 = 2, kSolverMultistep3 = 3, kSolverHeun = 4 };

// Integrals of exp(-(h - s)) s^k over s in [0, h], k = 0, 1, 2, in float32. The differences h - i0 and h^2 - 2 i1
// cancel for small h, so there the power series is summed instead: i_k = k! sum_n (-1)^n h^(n+k+1) / (n+k+1)!.
DDFAST_MATH void exponential_integrals(float h, float* i0, float* i1, float* i2) {
  *i0 = -expm1f(-h);
  if (h > 1.f) {
    *i1 = h - *i0;
    *i2 = h * h - 2.f * *i1;
    return;
  }
  float term = h * h / 2.f, first = 0.f, second = 0.f;  // term = h^n / n!, signs apart
  for (int n = 2; n < 14; ++n) {
    const float sign = n % 2 ? -1.f : 1.f;
    first += sign * term;
    second -= n > 2 ? sign * term : 0.f;
    term = term * h / (float)(n + 1);
  }
  *i1 = first;
  *i2 = 2.f * second;
}

// The geometric grid sigma_i = sigma_max exp(-h i), i = 0 .. steps, and one step u' = g u + a0 D_i + a1 D_{i-1} + a2
// D_{i-2} (Heun: a1 belongs to the D of the predicted end).
struct FlowGrid {
  float sigma_max, h, g, i0, a0, a1, a2;
};

constexpr float kStartSpreads = 8.f;  // as _START_SPREADS in ddfast/ops/flow_sample.py

DDFAST_MATH FlowGrid flow_grid(float spread, float sigma_min, int steps, int solver) {
  FlowGrid grid;
  const float start = kStartSpreads * spread, least = 2.f * sigma_min;
  grid.sigma_max = start > least ? start : least;
  const float h = logf(grid.sigma_max / sigma_min) / (float)steps;
  float i1, i2;
  exponential_integrals(h, &grid.i0, &i1, &i2);
  grid.h = h;
  grid.g = 1.f - grid.i0;
  grid.a0 = grid.i0;
  grid.a1 = grid.a2 = 0.f;
  if (solver == kSolverMultistep2) {
    grid.a0 = grid.i0 + i1 / h;
    grid.a1 = -i1 / h;
  } else if (solver == kSolverMultistep3) {
    const float first = i1 / (2.f * h), second = i2 / (2.f * h * h);
    grid.a0 = grid.i0 + 3.f * first + second;
    grid.a1 = -4.f * first - 2.f * second;
    grid.a2 = first + second;
  } else if (solver == kSolverHeun) {
    grid.a0 = grid.i0 - i1 / h;
    grid.a1 = i1 / h;
  }
  return grid;
}

// The exit rule (docs/numerics.md, with its proof): code k keeps the largest weight down to sigma = 0 if
// 2 delta R <= n_k and every other margin g_j >= -n_k (n_k - 2 delta R). `rest` is the weight of the other codes
// relative to that of k, `gap` a lower bound on g_j; the 1 % and the slack on delta cover float32.
DDFAST_MATH bool flow_is_decided(float rest, float nearest, float diameter, float gap, float slack) {
  const float delta = rest / (1.f + rest) + slack;
  const float distance = .99f * nearest, reach = 2.f * delta * diameter;
  return reach <= distance && gap >= -distance * (distance - reach);
}

}  // namespace ddfast
