// codebook_posterior: x0_hat = sum_j w_j c_j with w_j ∝ p_j exp(-|x - (1-t) c_j|^2 / (2 t^2)), and its vector-Jacobian
// product dx = (1-t)/t^2 sum_j w_j c_j ((c_j - x0_hat).g).
//
// An online softmax over chunks of codes that stay in the L1 cache: scores of a tile of rows, then weights, then weighted
// sums. Scores use the direct difference x - (1-t) c_j instead of dot products: for small t the products are of order
// 1/t^2 and cancel, the differences of the codes that matter are of order t, so float32 is enough for any t.
// Vectors of codes whose weights are all below e^-25 of the largest so far are skipped in the second half.
// Cost: 3 V d fused multiply-adds per row forward, 4 V d backward. Memory: one packed copy of the codebook.
//
// Rows where less than half of the codes have p > 0 take another way if d is a multiple of the vector width: only those
// codes are read, as rows of the codebook in place, and dot products are summed across lanes W codes at a time.
// Which way a row takes depends on that row alone.

constexpr float kNegligible = 25.f;

struct Posterior {
  const PosteriorArgs* args;
  const float* packed;
  float *x0, *lse;                       // forward: outputs
  const float *grad, *saved_x0, *saved_lse;  // backward: inputs
  float* dx;
  int64_t padded, chunk, status;
  int64_t *dense, dense_rows;  // rows left for the dense way; null: all
};

// Buffers of one thread for a tile of R rows.
struct PosteriorTile {
  float *x, *grad;     // [R][d]
  float *score, *dot;  // [R][chunk]: scores, then weights; backward: c.g
  float* sum;          // [R][d][W]
  int32_t* active;     // indices of the chunk's vectors that matter
};

static PosteriorTile posterior_tile(int R, int64_t d, int64_t chunk) {
  PosteriorTile t;
  t.sum = (float*)scratch(kAccumulators, (size_t)(R * d * W) * sizeof(float));
  t.score = (float*)scratch(kScores, (size_t)(2 * R * chunk) * sizeof(float));
  t.dot = t.score + R * chunk;
  t.x = (float*)scratch(kRow, (size_t)(2 * R * d + chunk / W) * sizeof(float));
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

// Makes `value` a row's largest score so far: the others' weights fade.
static inline void raise_most(const PosteriorTile& tile, int r, int64_t d, float value, float& most, vf& mass) {
  const vf factor = vexp(splat(most - value));
  mass *= factor;
  for (int64_t k = 0; k < d; ++k) {
    float* sum = tile.sum + (r * d + k) * W;
    storea(sum, loada(sum) * factor);
  }
  most = value;
}

// Turns the chunk's scores into weights, kGrad: times (c_j - x0).g; returns how many vectors of them matter.
template <int R, bool kGrad>
static int64_t posterior_weights(const PosteriorTile& tile, int64_t n, int64_t chunk, const float (&most)[R],
                                 const float (&shift)[R], vf (&mass)[R]) {
  int64_t active = 0;
  for (int64_t j = 0; j < n; j += W) {
    vi matters = {};
    for (int r = 0; r < R; ++r) matters |= (vi)(loada(tile.score + r * chunk + j) > splat(most[r] - kNegligible));
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
  return active;
}

template <int R, bool kGrad>
static void posterior_rows(void* context, int64_t begin, int64_t end) {
  Posterior& s = *(Posterior*)context;
  const PosteriorArgs& a = *s.args;
  const int64_t d = a.d, V = a.V, chunk = s.chunk;
  const PosteriorTile tile = posterior_tile(R, d, chunk);
  for (int64_t row = begin; row < end; row += R) {
    float keep[R], scale[R], most[R], shift[R];
    vf mass[R];
    vi bad[R];
    int64_t rows[R];
    for (int r = 0; r < R; ++r) {
      const int64_t position = min_of(row + r, end - 1);  // the last tile repeats its last row
      const int64_t i = rows[r] = s.dense ? s.dense[position] : position;
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
          const vf log_p = load_row(a.log_probs, rows[r], j0 + j, V);
          bad[r] |= ~(vi)(log_p < splat(kInf));
          storea(tile.score + r * chunk + j, log_p);
        }
      posterior_scores<R, kGrad>(tile, packed, n, chunk, d, keep, scale);
      if (!kGrad)
        for (int r = 0; r < R; ++r) {
          vf largest = splat(-kInf);
          for (int64_t j = 0; j < n; j += W) largest = vmax(loada(tile.score + r * chunk + j), largest);
          const float value = reduce_max(largest);
          if (value > most[r]) raise_most(tile, r, d, value, most[r], mass[r]);
        }
      const int64_t active = posterior_weights<R, kGrad>(tile, n, chunk, most, shift, mass);
      posterior_sums<R>(tile, packed, active, chunk, d);
    }

    for (int r = 0; r < R && row + r < end; ++r) {
      const float total = reduce_sum(mass[r]);
      const int64_t i = rows[r];
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

// Codes of a sparse row that are worked on together, so that they are read from the L1 cache after the first time.
constexpr int64_t kSparseChunk = 128;

// sum[p..p+W) += sum_j weight_j code_j over the listed codes; the lists are padded to a multiple of 4 by zero weights.
static void sparse_sums(const float* codebook, int64_t d, const float* weight, const int32_t* index, int64_t count,
                        float* sum) {
  for (int64_t p = 0; p < d; p += W) {
    vf part[4] = {};
    for (int64_t j = 0; j < count; j += 4)
      for (int i = 0; i < 4; ++i) part[i] = fma(splat(weight[j + i]), load(codebook + index[j + i] * d + p), part[i]);
    store(sum + p, load(sum + p) + ((part[0] + part[1]) + (part[2] + part[3])));
  }
}

// The row with log_p and index of its `count` codes, padded to a multiple of W. P = d / W if known at compile time, or 0.
template <bool kGrad, int P>
static void posterior_sparse_row(Posterior& s, int64_t row, const float* log_p, const int32_t* index, int64_t count,
                                 float* sum) {
  const PosteriorArgs& a = *s.args;
  const int64_t d = P ? P * W : a.d;
  const float *codebook = a.codebook, *x = a.x + row * d, *grad = s.grad + row * d, *x0 = s.saved_x0 + row * d;
  const vf keep = splat(1.f - a.t[row]);
  const float scale = -.5f / (a.t[row] * a.t[row]);
  float largest = kGrad ? s.saved_lse[row] : -kInf, shift = 0;
  vf mass = {};
  for (int64_t k = 0; k < d; ++k) sum[k] = 0;
  if (kGrad)
    for (int64_t k = 0; k < d; ++k) shift += grad[k] * x0[k];

  for (int64_t begin = 0; begin < count; begin += kSparseChunk) {
    const int64_t end = min_of(begin + kSparseChunk, count);
    float score[kSparseChunk], weight[kSparseChunk + W];
    int32_t active[kSparseChunk + W];
    vf most = splat(-kInf);
    for (int64_t j = begin; j < end; j += W) {
      const vf distance = lane_sums([&](int i) __attribute__((always_inline)) {
        const float* code = codebook + index[j + i] * d;
        vf sum = {};
        for (int64_t p = 0; p < d; p += W) {
          const vf difference = fnma(keep, load(code + p), load(x + p));
          sum = fma(difference, difference, sum);
        }
        return sum;
      });
      const vf value = fma(splat(scale), distance, load(log_p + j));
      store(score + j - begin, value);
      most = vmax(value, most);
    }
    if (!kGrad && reduce_max(most) > largest) {
      const vf factor = vexp(splat(largest - reduce_max(most)));
      largest = reduce_max(most);
      mass *= factor;
      for (int64_t p = 0; p < d; p += W) store(sum + p, load(sum + p) * factor);
    }
    int64_t actives = 0;
    for (int64_t j = begin; j < end; j += W) {
      const vf relative = load(score + j - begin) - splat(largest);
      const vi matters = (vi)(relative > splat(-kNegligible));
      if (!any(matters)) continue;
      const vf w = select(matters, vexp(relative), (vf){});
      if (!kGrad) mass += w;
      actives = append(matters, w, *(const vi_unaligned*)(index + j), weight, active, actives);
    }
    const int64_t padded = round_up(actives, W);
    for (int64_t i = actives; i < padded; ++i) {
      weight[i] = 0.f;
      active[i] = index[0];
    }
    if (kGrad)
      for (int64_t j = 0; j < padded; j += W) {
        const vf dot = lane_sums([&](int i) __attribute__((always_inline)) {
          const float* code = codebook + active[j + i] * d;
          vf sum = {};
          for (int64_t p = 0; p < d; p += W) sum = fma(load(grad + p), load(code + p), sum);
          return sum;
        });
        const vf w = load(weight + j) * (dot - splat(shift));
        mass += w;
        store(weight + j, w);
      }
    sparse_sums(codebook, d, weight, active, padded, sum);
  }

  const float total = reduce_sum(mass);
  if (kGrad) {
    const float factor = keep[0] * (-2.f * scale);
    for (int64_t k = 0; k < d; ++k) s.dx[row * d + k] = factor * (sum[k] - total * x0[k]);  // as in posterior_rows
  } else if (total > 0.f) {
    for (int64_t k = 0; k < d; ++k) s.x0[row * d + k] = sum[k] / total;
    s.lse[row] = largest + (float)log((double)total);
  } else {
    report(&s.status, row);
  }
}

// Does the sparse rows and lists the others.
template <bool kGrad>
static void posterior_sparse_rows(void* context, int64_t begin, int64_t end) {
  Posterior& s = *(Posterior*)context;
  const int64_t V = s.args->V, d = s.args->d, limit = V / 2, room = limit + 2 * W;
  float* log_p = (float*)scratch(kSupport, (size_t)(2 * room + d) * sizeof(float));
  int32_t* index = (int32_t*)(log_p + room);
  float* sum = (float*)(index + room);
  for (int64_t row = begin; row < end; ++row) {
    int64_t count = 0;
    vi bad = {};
    for (int64_t i = 0; i < V && count <= limit; i += W) {
      const vf v = load_row(s.args->log_probs, row, i, V);
      bad |= ~(vi)(v < splat(kInf));
      count = append((vi)(v > splat(-kInf)), v, lane_ids() + splat((int32_t)i), log_p, index, count);
    }
    if (count > limit) {
      s.dense[__atomic_fetch_add(&s.dense_rows, 1, __ATOMIC_RELAXED)] = row;
      continue;
    }
    if (any(bad) || count == 0) {
      if (!kGrad) report(&s.status, row);
      if (kGrad)  // which the forward pass has refused
        for (int64_t k = 0; k < d; ++k) s.dx[row * d + k] = __builtin_nanf("");
      continue;
    }
    for (int64_t i = count; i < round_up(count, W); ++i) {
      log_p[i] = -kInf;
      index[i] = index[0];
    }
    count = round_up(count, W);
    if (d == W)
      posterior_sparse_row<kGrad, 1>(s, row, log_p, index, count, sum);
    else if (d == 2 * W)
      posterior_sparse_row<kGrad, 2>(s, row, log_p, index, count, sum);
    else if (d == 4 * W)
      posterior_sparse_row<kGrad, 4>(s, row, log_p, index, count, sum);
    else
      posterior_sparse_row<kGrad, 0>(s, row, log_p, index, count, sum);
  }
}

template <int R, bool kGrad>
static void run_posterior(Posterior& s, int threads) {
  const PosteriorArgs& a = *s.args;
  if (a.rows == 0) return;
  int64_t rows = a.rows;
  if (a.d % W == 0) {
    s.dense = (int64_t*)scratch(kSharedExtra, (size_t)rows * sizeof(int64_t));
    parallel_for(rows, 2, threads, posterior_sparse_rows<kGrad>, &s);
    rows = s.dense_rows;
    if (rows == 0) return;
  }
  s.padded = round_up(a.V, kGroup);
  s.chunk = chunk_of(a.d);
  float* packed = (float*)scratch(kShared, (size_t)(s.padded * (a.d + 1)) * sizeof(float));
  int32_t* index = (int32_t*)(packed + s.padded * a.d);
  for (int64_t j = 0; j < s.padded; ++j) index[j] = (int32_t)min_of(j, a.V - 1);
  gather_codes(a.codebook, index, s.padded, a.d, packed);
  s.packed = packed;
  parallel_for(rows, 2 * R, threads, posterior_rows<R, kGrad>, &s);
}

static int64_t posterior_forward(const PosteriorArgs& args, float* x0, float* lse, int threads) {
  Posterior s = {};
  s.args = &args;
  s.status = kOk;
  s.x0 = x0;
  s.lse = lse;
  run_posterior<kTileRows, false>(s, threads);
  return s.status;
}

static void posterior_backward(const PosteriorArgs& args, const float* grad, const float* x0, const float* lse, float* dx,
                               int threads) {
  Posterior s = {};
  s.args = &args;
  s.status = kOk;
  s.grad = grad;
  s.saved_x0 = x0;
  s.saved_lse = lse;
  s.dx = dx;
  run_posterior<2, true>(s, threads);
}
