// Reading logits and log-probabilities of any of the three dtypes.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt.h"

namespace ddfast {

constexpr float kNegInf = -INFINITY;

// dtype: 0 float32, 1 bfloat16, 2 float16, as DTYPE_CODES in ddfast/ops/native.py.
__device__ __forceinline__ float float_of_bits16(uint16_t bits, int dtype) {
  return dtype == 1 ? simt::bits_float((uint32_t)bits << 16) : simt::half_bits_to_float(bits);
}

__device__ __forceinline__ float load_logit(const void* data, int dtype, int64_t i) {
  return dtype == 0 ? ((const float*)data)[i] : float_of_bits16(((const uint16_t*)data)[i], dtype);
}

// Four neighbours as they lie in memory: of two bytes each, in the first two words.
struct alignas(16) FourLogits {
  uint32_t word[4];
};
struct alignas(8) TwoWords {
  uint32_t word[2];
};

// Those from i on, of which `left` are there. whole: all or none, at an address that one load can read.
__device__ __forceinline__ FourLogits load_logits(const void* data, int dtype, int64_t i, int64_t left, bool whole) {
  FourLogits out = {};
  const uint32_t* words = (const uint32_t*)data + i;
  const uint16_t* halves = (const uint16_t*)data + i;
  if (whole) {
    if (left > 0 && dtype == 0) out = *(const FourLogits*)words;
    if (left > 0 && dtype != 0) {
      const TwoWords two = *(const TwoWords*)halves;
      out.word[0] = two.word[0];
      out.word[1] = two.word[1];
    }
    return out;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n)
    if (n < left) {
      if (dtype == 0)
        out.word[n] = words[n];
      else
        out.word[n / 2] |= (uint32_t)halves[n] << 16 * (n % 2);
    }
  return out;
}

__device__ __forceinline__ float logit_of(const FourLogits& four, int dtype, int n) {
  if (dtype == 0) return simt::bits_float(four.word[n]);
  return float_of_bits16((uint16_t)(four.word[n / 2] >> 16 * (n % 2)), dtype);
}

}  // namespace ddfast
