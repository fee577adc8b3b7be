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

}  // namespace ddfast
