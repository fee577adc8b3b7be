// Launches codebook_posterior, forward and backward; see kernels/codebook_posterior.cu.
#pragma once

#include <cstdint>

#include "cuda_api.h"

namespace ddfast {

constexpr int64_t kPosteriorMaxDim = 64;

struct PosteriorArguments {
  const float *x, *t;       // [rows, d], [rows] in (0, 1]
  const void* log_probs;    // [period, V]; row r uses row r % period
  const float* codebook;    // [V, d]
  float* x0;                // [rows, d]: x0_hat; forward writes, backward reads
  float* log_norm;          // [rows]: forward writes what backward reads; NaN, as x0, for a row without a distribution
  const float* grad;        // [rows, d]; backward
  float* dx;                // [rows, d]; backward writes
  int64_t stride;           // elements between rows of log_probs
  int64_t rows, period, V, d;  // rows: a multiple of period
  int32_t dtype;  // of log_probs: 0 float32, 1 bfloat16, 2 float16
};

cudaError_t codebook_posterior_forward_cuda(const PosteriorArguments& arguments, cudaStream_t stream);
cudaError_t codebook_posterior_backward_cuda(const PosteriorArguments& arguments, cudaStream_t stream);

}  // namespace ddfast
