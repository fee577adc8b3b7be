// codebook_posterior: x0_hat = sum_j w_j c_j with w_j ∝ p_j exp(-|x - (1-t) c_j|^2 / (2 t^2)), and its vector-Jacobian
// product dx = (1-t)/t^2 sum_j w_j c_j ((c_j - x0_hat).g).
//
// An online softmax over chunks of codes that stay in the L1 cache: scores of a tile of rows, then weights, then weighted
// sums. Scores use the direct difference x - (1-t) c_j instead of dot products: for small t the products are of order
// 1/t^2 and cancel, the differences of the codes that matter are of order t, so float32 is enough for any t.
// Vectors of codes whose weights are all below e^-25 of the largest so far are skipped in the second half.
// Cost: 3 V d fused multiply-adds per row forward, 4 V d backward. Memory: one packed copy of the codebook.

constexpr float kNegligible = 25.f;

struct Posterior {
  const PosteriorArgs* args;
  const float* packed;
  float *x0, *lse;                       // forward: outputs
  const float *grad, *saved_x0, *saved_lse;  // backward: inputs
  float* dx;
  int64_t padded, chunk, status;
};

// Buffers of one thread for a tile of R rows.
struct PosteriorTile {
  float *x, *grad;     // [R][d]
  float *score, *dot;  // [R][chunk]: scores, then weights; backward: c.g
  float* sum;          // [R][d][W]
  int32_t* active;     // indices of the chunk's vectors that matter
};

static PosteriorTile posterior_tile(const Posterior& s, int R) {
  const int64_t d = s.args->d;
  PosteriorTile t;
  t.sum = (float*)scratch(kAccumulators, (size_t)(R * d * W) * sizeof(float));
  t.score = (float*)scratch(kScores, (size_t)(2 * R * s.chunk) * sizeof(float));
  t.dot = t.score + R * s.chunk;
  t.x = (float*)scratch(kRow, (size_t)(2 * R * d + s.chunk / W) * sizeof(float));
  t.grad = t.x + R * d;
  t.active = (int32_t*)(t.grad + R * d);
  return t;
}

// score[r][j] = log p_j - |x_r - (1-t_r) c_j|^2 / (2 t_r^2) for the chunk's codes; kGrad: also dot[r][j] = g_r.c_j.
// On entry score holds log p_j; groups without any code of positive probability are left at -inf.
template <int R, bool kGrad>
static void posterior_scores(const PosteriorTile& tile, const float* packed, int64_t n, int64_t chunk, int64_t d,
                             const float* keep, const float* scale) {
  for (int64_t j = 0; j < n; j += kGroup) {
    vf largest = splat(-kInf);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileVectors; ++v) largest = vmax(loada(tile.score + r * chunk + j + v * W), largest);
    if (!any((vi)(largest > splat(-kInf)))) continue;
    vf distance[R][kTileVectors] = {}, dot[kGrad ? R : 1][kTileVectors] = {};
    const float* c = packed + j * d;
    for (int64_t k = 0; k < d; ++k) {
      for (int v = 0; v < kTileVectors; ++v) {
        const vf cv = loada(c + (v * d + k) * W);
        for (int r = 0; r < R; ++r) {
          const vf difference = fnma(splat(keep[r]), cv, splat(tile.x[r * d + k]));
          distance[r][v] = fma(difference, difference, distance[r][v]);
          if (kGrad) dot[kGrad ? r : 0][v] = fma(splat(tile.grad[r * d + k]), cv, dot[kGrad ? r : 0][v]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileVectors; ++v) {
        float* score = tile.score + r * chunk + j + v * W;
        storea(score, fma(splat(scale[r]), distance[r][v], loada(score)));
        if (kGrad) storea(tile.dot + r * chunk + j + v * W, dot[kGrad ? r : 0][v]);
      }
  }
}

// sum[r][k] += sum over the active vectors of weight[r] * c[k].
template <int R>
static void posterior_sums(const PosteriorTile& tile, const float* packed, int64_t active, int64_t chunk, int64_t d) {
  constexpr int K = 4;
  int64_t k = 0;
  for (; k + K <= d; k += K) {
    vf sum[R][K];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < K; ++i) sum[r][i] = loada(tile.sum + (r * d + k + i) * W);
    for (int64_t a = 0; a < active; ++a) {
      const int64_t v = tile.active[a];
      const float* c = packed + (v * d + k) * W;
      for (int r = 0; r < R; ++r) {
        const vf weight = loada(tile.score + r * chunk + v * W);
        for (int i = 0; i < K; ++i) sum[r][i] = fma(weight, loada(c + i * W), sum[r][i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < K; ++i) storea(tile.sum + (r * d + k + i) * W, sum[r][i]);
  }
  for (; k < d; ++k)
    for (int r = 0; r < R; ++r) {
      vf sum = loada(tile.sum + (r * d + k) * W);
      for (int64_t a = 0; a < active; ++a) {
        const int64_t v = tile.active[a];
        sum = fma(loada(tile.score + r * chunk + v * W), loada(packed + (v * d + k) * W), sum);
      }
      storea(tile.sum + (r * d + k) * W, sum);
    }
}

template <int R, bool kGrad>
static void posterior_rows(void* context, int64_t begin, int64_t end) {
  Posterior& s = *(Posterior*)context;
  const PosteriorArgs& a = *s.args;
  const int64_t d = a.d, V = a.V, chunk = s.chunk;
  const PosteriorTile tile = posterior_tile(s, R);
  for (int64_t row = begin; row < end; row += R) {
    float keep[R], scale[R], most[R], shift[R];
    vf mass[R];
    vi bad[R];
    for (int r = 0; r < R; ++r) {
      const int64_t i = min_of(row + r, end - 1);  // the last tile repeats its last row
      keep[r] = 1.f - a.t[i];
      scale[r] = -.5f / (a.t[i] * a.t[i]);
      most[r] = kGrad ? s.saved_lse[i] : -kInf;
      shift[r] = 0;
      mass[r] = vf{};
      bad[r] = vi{};
      for (int64_t k = 0; k < d; ++k) tile.x[r * d + k] = a.x[i * d + k];
      if (kGrad)
        for (int64_t k = 0; k < d; ++k) {
          tile.grad[r * d + k] = s.grad[i * d + k];
          shift[r] += s.grad[i * d + k] * s.saved_x0[i * d + k];
        }
    }
    for (int64_t i = 0; i < R * d * W; i += W) storea(tile.sum + i, vf{});

    for (int64_t j0 = 0; j0 < s.padded; j0 += chunk) {
      const int64_t n = min_of(chunk, s.padded - j0);
      const float* packed = s.packed + j0 * d;
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < n; j += W) {
          const vf log_p = load_row(a.log_probs, min_of(row + r, end - 1), j0 + j, V);
          bad[r] |= ~(vi)(log_p < splat(kInf));
          storea(tile.score + r * chunk + j, log_p);
        }
      posterior_scores<R, kGrad>(tile, packed, n, chunk, d, keep, scale);
      if (!kGrad)
        for (int r = 0; r < R; ++r) {
          vf largest = splat(-kInf);
          for (int64_t j = 0; j < n; j += W) largest = vmax(loada(tile.score + r * chunk + j), largest);
          const float value = reduce_max(largest);
          if (!(value > most[r])) continue;
          const vf factor = vexp(splat(most[r] - value));
          mass[r] *= factor;
          for (int64_t k = 0; k < d; ++k) {
            float* sum = tile.sum + (r * d + k) * W;
            storea(sum, loada(sum) * factor);
          }
          most[r] = value;
        }
      int64_t active = 0;
      for (int64_t j = 0; j < n; j += W) {
        vi matters = {};
        for (int r = 0; r < R; ++r)
          matters |= (vi)(loada(tile.score + r * chunk + j) > splat(most[r] - kNegligible));
        if (!any(matters)) continue;
        tile.active[active++] = (int32_t)(j / W);
        for (int r = 0; r < R; ++r) {
          float* score = tile.score + r * chunk + j;
          const vf relative = loada(score) - splat(most[r]);
          // A row's own rule, so that its sum does not depend on the other rows of the tile.
          vf weight = any((vi)(relative > splat(-kNegligible))) ? vexp(relative) : vf{};
          if (kGrad) weight *= loada(tile.dot + r * chunk + j) - splat(shift[r]);
          mass[r] += weight;
          storea(score, weight);
        }
      }
      posterior_sums<R>(tile, packed, active, chunk, d);
    }

    for (int r = 0; r < R && row + r < end; ++r) {
      const float total = reduce_sum(mass[r]);
      const int64_t i = row + r;
      if (kGrad) {
        // The weights' rounding shifts every (c_j - x0).g alike; subtracting total * x0 removes that shift.
        const float factor = keep[r] * (-2.f * scale[r]);
        for (int64_t k = 0; k < d; ++k)
          s.dx[i * d + k] = factor * (reduce_sum(loada(tile.sum + (r * d + k) * W)) - total * s.saved_x0[i * d + k]);
        continue;
      }
      if (any(bad[r]) || !(total > 0.f)) {
        report(&s.status, i);
        continue;
      }
      for (int64_t k = 0; k < d; ++k) s.x0[i * d + k] = reduce_sum(loada(tile.sum + (r * d + k) * W)) / total;
      s.lse[i] = most[r] + (float)log((double)total);
    }
  }
}

static Posterior prepare_posterior(const PosteriorArgs& args) {
  Posterior s = {};
  s.args = &args;
  s.padded = round_up(args.V, kGroup);
  s.chunk = max_of(kGroup, 8192 / args.d / kGroup * kGroup);
  s.status = kOk;
  float* packed = (float*)scratch(kShared, (size_t)(s.padded * (args.d + 1)) * sizeof(float));
  int32_t* index = (int32_t*)(packed + s.padded * args.d);
  for (int64_t j = 0; j < s.padded; ++j) index[j] = (int32_t)min_of(j, args.V - 1);
  gather_codes(args.codebook, index, s.padded, args.d, packed);
  s.packed = packed;
  return s;
}

static int64_t posterior_forward(const PosteriorArgs& args, float* x0, float* lse, int threads) {
  if (args.rows == 0) return kOk;
  Posterior s = prepare_posterior(args);
  s.x0 = x0;
  s.lse = lse;
  parallel_for(args.rows, 2 * kTileRows, threads, posterior_rows<kTileRows, false>, &s);
  return s.status;
}

static void posterior_backward(const PosteriorArgs& args, const float* grad, const float* x0, const float* lse, float* dx,
                               int threads) {
  if (args.rows == 0) return;
  Posterior s = prepare_posterior(args);
  s.grad = grad;
  s.saved_x0 = x0;
  s.saved_lse = lse;
  s.dx = dx;
  parallel_for(args.rows, 4, threads, posterior_rows<2, true>, &s);
}
