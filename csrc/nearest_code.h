// nearest_code: argmin_j |x - c_j|^2 (or argmax of the cosine), ties to the lowest j.
//
// A float32 sweep over the packed codebook computes s_j = |c_j|^2 / 2 - x.c_j (cosine: -x.c_j / |c_j|), d fused products
// per code, with kTileRows x 4 vectors of accumulators in registers, and keeps only the minimum of each block of codes.
// Every code whose s_j may still be the best, given a bound of the float32 error, is then compared in float64 with the
// direct formula. So the answer is that of float64, and the sweep needs no indices. Both sides are first centred on the
// codebook's mean, which keeps the bound small for data far from the origin.
// Cost: V d fused multiply-adds per row; memory: one packed copy of the codebook.

#if defined(__AVX512F__) || defined(DDFAST_NEON)  // which have 32 registers
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileVectors = 4;
constexpr int64_t kGroup = kTileVectors * W;  // codes are padded to a multiple of this
constexpr int64_t kSweepRows = 16 * kTileRows;  // that meet a block of codes before the next block is read

// Codes that are worked on together, so that they come from a cache after the first time.
static inline int64_t chunk_of(int64_t d) { return max_of(kGroup, 4096 / d / kGroup * kGroup); }

// Of V codes, in float64 and rounded.
static void mean_of(const float* codebook, int64_t V, int64_t d, float* mean) {
  double* sums = (double*)scratch(kAccumulators, (size_t)d * sizeof(double));
  for (int64_t k = 0; k < d; ++k) sums[k] = 0;
  for (int64_t j = 0; j < V; ++j)
    for (int64_t k = 0; k < d; ++k) sums[k] += codebook[j * d + k];
  for (int64_t k = 0; k < d; ++k) mean[k] = (float)(sums[k] / (double)V);
}

struct NearestCode {
  const NearestCodeArgs* args;
  const float *packed, *offset;  // [padded / W][d][W]; s_j = offset_j - x.c_j: [padded], +inf beyond V
  const float* mean;             // [d]
  const double* inverse_norm;    // [V], cosine only
  double max_norm, max_offset;
  int64_t padded, block;  // block: codes that share one minimum
};

// minima[r][b] of block b, for kTileRows rows of centred x (row r at x + r d).
static void sweep(const NearestCode& s, const float* x, int64_t b, int64_t blocks, float* minima) {
  const int64_t d = s.args->d;
  vf best[kTileRows];
  for (int r = 0; r < kTileRows; ++r) best[r] = splat(kInf);
  const int64_t end = min_of((b + 1) * s.block, s.padded);
  for (int64_t j = b * s.block; j < end; j += kGroup) {
    vf acc[kTileRows][kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      for (int r = 0; r < kTileRows; ++r) acc[r][v] = loada(s.offset + j + v * W);
    const float* c = s.packed + j * d;
    for (int64_t k = 0; k < d; ++k) {
      for (int r = 0; r < kTileRows; ++r) {
        const vf xk = splat(x[r * d + k]);
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = fnma(xk, loada(c + (v * d + k) * W), acc[r][v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r)
      best[r] = vmin(vmin(vmin(acc[r][0], acc[r][1]), vmin(acc[r][2], acc[r][3])), best[r]);
  }
  for (int r = 0; r < kTileRows; ++r) minima[r * blocks + b] = reduce_min(best[r]);
}

// The float64 comparison of the codes whose float32 score is not above the threshold.
static int64_t refine(const NearestCode& s, const float* x, const float* centred, int64_t blocks, const float* minima) {
  const int64_t d = s.args->d, V = s.args->V;
  float least = kInf;
  for (int64_t b = 0; b < blocks; ++b) least = min_of(least, minima[b]);
  double norm = 0;
  for (int64_t k = 0; k < d; ++k) norm += (double)centred[k] * centred[k];
  // d products and sums, the rounding of the offset and of the centred inputs; 6e-8 is one rounding.
  const double error = 6e-8 * (double)(d + 6) * (s.max_offset + sqrt(norm) * s.max_norm);
  const float threshold = (float)((double)least + 2.1 * error);
  const vf limit = splat(threshold);

  int64_t code = 0;
  double best = __builtin_inf();
  for (int64_t b = 0; b < blocks; ++b) {
    if (minima[b] > threshold) continue;
    const int64_t end = min_of((b + 1) * s.block, s.padded);
    for (int64_t j = b * s.block; j < end; j += W) {
      vf score = loada(s.offset + j);
      const float* c = s.packed + j * d;
      for (int64_t k = 0; k < d; ++k) score = fnma(splat(centred[k]), loada(c + k * W), score);
      for (uint32_t left = bits(~(score > limit)); left; left &= left - 1) {
        const int64_t i = j + __builtin_ctz(left);
        if (i >= V) break;
        const float* ci = s.args->codebook + i * d;
        double value = 0;
        if (s.args->cosine) {
          for (int64_t k = 0; k < d; ++k) value -= (double)x[k] * ci[k];
          value *= s.inverse_norm[i];
        } else {
          for (int64_t k = 0; k < d; ++k) {
            const double difference = (double)x[k] - ci[k];
            value += difference * difference;
          }
        }
        if (value < best) {
          best = value;
          code = i;
        }
      }
    }
  }
  return code;
}

static void nearest_code_rows(void* context, int64_t begin, int64_t end) {
  const NearestCode& s = *(const NearestCode*)context;
  const int64_t d = s.args->d, blocks = (s.padded + s.block - 1) / s.block;
  float* minima = (float*)scratch(kScores, (size_t)(kSweepRows * (blocks + d)) * sizeof(float));
  float* x = minima + kSweepRows * blocks;
  for (int64_t first = begin; first < end; first += kSweepRows) {
    const int64_t count = min_of(kSweepRows, end - first);
    for (int64_t r = 0; r < round_up(count, kTileRows); ++r) {
      const float* from = s.args->x + min_of(first + r, end - 1) * d;  // the last tile repeats its last row
      for (int64_t k = 0; k < d; ++k) x[r * d + k] = from[k] - s.mean[k];
    }
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t r = 0; r < count; r += kTileRows) sweep(s, x + r * d, b, blocks, minima + r * blocks);
    for (int64_t r = 0; r < count; ++r)
      s.args->codes[first + r] = refine(s, s.args->x + (first + r) * d, x + r * d, blocks, minima + r * blocks);
  }
}

static void nearest_code(const NearestCodeArgs& args, int threads) {
  if (args.rows == 0) return;
  const int64_t V = args.V, d = args.d, padded = round_up(V, kGroup);
  float* packed = (float*)scratch(kShared, (size_t)(padded * d + padded) * sizeof(float));
  float* offset = packed + padded * d;
  double* inverse_norm = (double*)scratch(kSharedExtra, (size_t)V * sizeof(double) + (size_t)d * sizeof(float));
  float* mean = (float*)(inverse_norm + V);
  if (args.cosine)
    for (int64_t k = 0; k < d; ++k) mean[k] = 0.f;
  else
    mean_of(args.codebook, V, d, mean);

  double max_norm = 0, max_offset = 0;
  for (int64_t j = 0; j < padded; ++j) {
    float* out = packed + j / W * W * d + j % W;
    if (j >= V) {
      for (int64_t k = 0; k < d; ++k) out[k * W] = 0.f;
      offset[j] = kInf;
      continue;
    }
    const float* c = args.codebook + j * d;
    double norm = 0, scale = 1;
    if (args.cosine) {
      for (int64_t k = 0; k < d; ++k) norm += (double)c[k] * c[k];
      scale = inverse_norm[j] = norm > 0 ? 1 / sqrt(norm) : 0;
      norm = norm > 0;
    }
    for (int64_t k = 0; k < d; ++k) {
      const float value = args.cosine ? (float)(c[k] * scale) : c[k] - mean[k];
      if (!args.cosine) norm += (double)value * value;
      out[k * W] = value;
    }
    offset[j] = args.cosine ? 0.f : (float)(norm / 2);
    max_norm = max_of(max_norm, norm);
    max_offset = max_of(max_offset, (double)offset[j]);
  }
  NearestCode s{&args, packed, offset, mean, inverse_norm, sqrt(max_norm), max_offset, padded, chunk_of(d)};
  parallel_for(args.rows, kSweepRows, threads, nearest_code_rows, &s);
}
