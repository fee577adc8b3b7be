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

// Those from i on, where one load can read them.
__device__ __forceinline__ FourLogits load_logits(const void* data, int dtype, int64_t i) {
  if (dtype == 0) return *(const FourLogits*)((const float*)data + i);
  const TwoWords two = *(const TwoWords*)((const uint16_t*)data + i);
  return {{two.word[0], two.word[1], 0, 0}};
}

__device__ __forceinline__ void unpack_logits(const FourLogits& four, int dtype, float (&out)[4]) {
  if (dtype == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = simt::bits_float(four.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = float_of_bits16((uint16_t)(four.word[i / 2] >> 16 * (i % 2)), dtype);
  }
}

}  // namespace ddfast
