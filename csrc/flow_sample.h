// flow_sample: the whole flow of one token, u = x / (1-t), du/dsigma = (u - D) / sigma, from noise to a code.
//
// Row by row, in one thread's memory: the support (codes of positive probability) is gathered once into vectors over
// codes, centred on its mean mu, so that scores lose nothing to a common offset; then every evaluation is
//   1. m_j = u.c_j - |c_j|^2 / 2, s_j = log p_j + m_j / sigma^2, their maxima           (K d multiply-adds)
//   2. w_j = exp(s_j - max) and D = sum w c / sum w, only for vectors of codes that hold some s_j > max - 25:
//      as sigma falls the weight concentrates, so this half soon costs nothing.
// Start, solvers (exponential Adams-Bashforth in -log sigma, or Heun) and the exit rule are those of the reference in
// ddfast/ops/flow_sample.py, which explains them. A row's result does not depend on other rows or on the threads.
// Memory per thread: K (d + 4) floats for the support and two rows of V.

enum Solver { kEuler = 1, kMultistep2 = 2, kMultistep3 = 3, kHeun = 4 };

// Of what is larger, which no normal distribution draws, products with the codes leave float32's range.
constexpr float kMostNoise = 1e15f;

constexpr int64_t kCachedFloats = 1 << 18;  // of an L2 cache

struct Support {  // padded to a multiple of kGroup with codes of log_p = -inf
  int64_t count, padded;
  int32_t* index;          // code of each entry
  float *log_p, *half_norm;  // [padded]; half_norm = |c|^2 / 2 of the centred code
  float* packed;           // [padded / W][d][W], centred codes
  float* score;            // [padded], then weights
  int32_t* active;         // [padded / W]
  float* mean;             // [d]
};

struct Flow {
  const FlowArgs* args;
  const FilterArgs* filter;  // sample_codes; else null
  int64_t status;
};

static Support support_buffers(int64_t V, int64_t d) {
  const int64_t n = round_up(V, kGroup);
  Support s = {};
  float* p = (float*)scratch(kSupport, (size_t)(n * (d + 5)) * sizeof(float));
  s.packed = p;
  s.log_p = p + n * d;
  s.half_norm = s.log_p + n;
  s.score = s.half_norm + n;
  s.index = (int32_t*)(s.score + n);
  s.active = s.index + n;
  return s;
}

// The codes of positive probability and their log p; false for a bad row.
static bool find_support(const Flow& f, int64_t row, Support& s) {
  const int64_t V = f.args->V;
  s.count = 0;
  if (f.filter) {
    float* x = (float*)scratch(kRow, (size_t)(2 * round_up(V, W)) * sizeof(float));
    Kept kept;
    if (!filter_row(*f.filter, row, x, kept)) return false;
    for (int64_t i = 0; i < V; i += W) {
      const vf v = loada(x + i), log_p = v - splat(kept.log_normaliser);
      s.count = append(kept_lanes(kept, v, i), log_p, lane_ids() + splat((int32_t)i), s.log_p, s.index, s.count);
    }
  } else {
    vi bad = {};
    for (int64_t i = 0; i < V; i += W) {
      const vf v = load_row(f.args->log_probs, row, i, V);
      bad |= ~(vi)(v < splat(kInf));
      s.count = append((vi)(v > splat(-kInf)), v, lane_ids() + splat((int32_t)i), s.log_p, s.index, s.count);
    }
    if (any(bad)) return false;
  }
  s.padded = round_up(s.count, kGroup);
  for (int64_t i = s.count; i < s.padded; ++i) {
    s.index[i] = s.count ? s.index[0] : 0;
    s.log_p[i] = -kInf;
  }
  return s.count > 0;
}

// out[k..k+K) = sum over the active vectors of score * code[k..k+K).
template <int K>
static void weighted_sums_at(const Support& s, int64_t d, int64_t active, int64_t k, float* out) {
  vf sum[K] = {};
  for (int64_t a = 0; a < active; ++a) {
    const int64_t v = s.active[a];
    const vf weight = loada(s.score + v * W);
    const float* c = s.packed + (v * d + k) * W;
    for (int i = 0; i < K; ++i) sum[i] = fma(weight, loada(c + i * W), sum[i]);
  }
  const vf all = lane_sums([&](int i) __attribute__((always_inline)) { return i < K ? sum[i] : vf{}; });
  __builtin_memcpy(out + k, &all, K * sizeof(float));
}

static void weighted_sums(const Support& s, int64_t d, int64_t active, float* out) {
  int64_t k = 0;
  for (; k + W <= d; k += W) weighted_sums_at<W>(s, d, active, k, out);
  for (; k + W / 2 <= d; k += W / 2) weighted_sums_at<W / 2>(s, d, active, k, out);
  for (; k < d; ++k) weighted_sums_at<1>(s, d, active, k, out);
}

// D (relative to the mean) of the weights exp(score - most), code `top` taken out; returns their sum.
static float weighted_mean(const Support& s, int64_t d, float most, int64_t top, float* out) {
  const vf shift = splat(most);
  vf mass = {};
  int64_t active = 0;
  s.score[top] = -kInf;  // its weight is 1; leaving it out keeps the rest's sum accurate when the rest is small
  for (int64_t j = 0; j < s.padded; j += W) {
    const vf relative = loada(s.score + j) - shift;
    if (!any((vi)(relative > splat(-kNegligible)))) continue;
    const vf weight = vexp(relative);
    mass += weight;
    storea(s.score + j, weight);
    s.active[active++] = (int32_t)(j / W);
  }
  const float rest = reduce_sum(mass), total = 1.f + rest;
  const float* code = s.packed + top / W * W * d + top % W;
  weighted_sums(s, d, active, out);
  for (int64_t k = 0; k < d; ++k) out[k] = (out[k] + code[k * W]) / total;
  return rest;
}

struct Evaluation {
  float most;     // max_j s_j
  int64_t top;    // the first entry with s_j = most
  float largest;  // max_j m_j
};

// u.c_j - |c_j|^2 / 2 for kTileVectors vectors of entries from j on. D = d where that is known at compile time, else 0.
template <int D>
static inline void dots(const float* packed, const float* half_norm, const float* u, int64_t d, int64_t j,
                        vf (&m)[kTileVectors]) {
  const float* c = packed + j * (D ? D : d);
  for (int v = 0; v < kTileVectors; ++v) m[v] = -loada(half_norm + j + v * W);
  for (int64_t k = 0; k < (D ? D : d); ++k)
    for (int v = 0; v < kTileVectors; ++v) m[v] = fma(splat(u[k]), loada(c + (v * (D ? D : d) + k) * W), m[v]);
}

static int64_t first_equal(const float* x, int64_t n, float value) {
  for (int64_t j = 0; j < n; j += W) {
    const uint32_t hit = bits((vi)(loada(x + j) == splat(value)));
    if (hit) return j + __builtin_ctz(hit);
  }
  return 0;
}

template <int D>
static Evaluation evaluate_scores(const Support& s, const float* u, int64_t d, float inverse_variance) {
  vf most = splat(-kInf), largest = splat(-kInf);
  for (int64_t j = 0; j < s.padded; j += kGroup) {
    vf m[kTileVectors];
    dots<D>(s.packed, s.half_norm, u, d, j, m);
    for (int v = 0; v < kTileVectors; ++v) {
      const vf score = fma(m[v], splat(inverse_variance), loada(s.log_p + j + v * W));
      storea(s.score + j + v * W, score);
      most = vmax(score, most);
      largest = vmax(m[v], largest);
    }
  }
  Evaluation e;
  e.most = reduce_max(most);
  e.largest = reduce_max(largest);  // padding repeats a code of the support
  e.top = first_equal(s.score, s.padded, e.most);
  return e;
}

static Evaluation evaluate_scores(const Support& s, const float* u, int64_t d, float inverse_variance) {
  return d == 8 ? evaluate_scores<8>(s, u, d, inverse_variance) : evaluate_scores<0>(s, u, d, inverse_variance);
}

// Subtracts the mean from a vector of codes; returns their squared norms.
static inline vf centre(float* c, const float* mean, int64_t d) {
  vf norm = {};
  for (int64_t k = 0; k < d; ++k) {
    const vf centred = loada(c + k * W) - splat(mean[k]);
    storea(c + k * W, centred);
    norm = fma(centred, centred, norm);
  }
  return norm;
}

// Subtracts the mean of p from the gathered codes; returns sqrt(E_p |c - mean|^2 / d).
static float centre_support(Support& s, int64_t d) {
  vf most = splat(-kInf);
  for (int64_t j = 0; j < s.padded; j += W) {
    const vf log_p = loada(s.log_p + j);
    storea(s.score + j, log_p);
    most = vmax(log_p, most);
  }
  const float largest = reduce_max(most);
  const int64_t top = first_equal(s.score, s.padded, largest);
  const float rest = weighted_mean(s, d, largest, top, s.mean);
  vf variance = {};
  for (int64_t j = 0; j < s.padded; j += W) {
    const vf norm = centre(s.packed + j * d, s.mean, d);
    storea(s.half_norm + j, norm * .5f);
    const vf relative = loada(s.log_p + j) - splat(largest);
    variance += vexp(relative) * norm;
  }
  return (float)sqrt((double)reduce_sum(variance) / ((1.0 + (double)rest) * (double)d));
}

// The exit rule (see the reference): every margin of `code` can only grow from here on if none is below the result.
static float deciding_gap(const FlowArgs& a, int64_t code, float rest) {
  const float delta = rest / (1.f + rest) + 1e-6f;
  const float nearest = .99f * a.geometry[code], reach = 2.f * delta * a.geometry[a.V];
  return reach <= nearest ? -nearest * (nearest - reach) : kInf;
}

// u.c - |c|^2 / 2 of one entry, with the roundings of an evaluation.
static float margin_of(const float* packed, const float* half_norm, const float* u, int64_t d, int64_t entry) {
  vf m[kTileVectors];
  const int64_t group = entry / kGroup * kGroup;
  if (d == 8)
    dots<8>(packed, half_norm, u, d, group, m);
  else
    dots<0>(packed, half_norm, u, d, group, m);
  return m[(entry - group) / W][entry % W];
}

// The grid sigma_max exp(-h i), and a step u' = g u + a0 D_i + a1 D_{i-1} + a2 D_{i-2}; Heun: a1 belongs to the
// predicted end's D.
struct Grid {
  double sigma_max, h, g, i0, a0, a1, a2;
};

static Grid grid_of(const FlowArgs& a, float spread) {
  const double sigma_max = max_of((a.d > 64 ? .25 * (double)a.d : 8.0) * (double)spread, 2.0 * a.sigma_min);
  const double h = log(sigma_max / a.sigma_min) / (double)a.steps;
  const double i0 = -expm1(-h), i1 = h - i0, i2 = h * h - 2 * i1;
  Grid grid = {sigma_max, h, 1 - i0, i0, i0, 0, 0};
  if (a.solver == kMultistep2) {
    grid.a0 = i0 + i1 / h;
    grid.a1 = -i1 / h;
  } else if (a.solver == kMultistep3) {
    const double first = i1 / (2 * h), second = i2 / (2 * h * h);
    grid.a0 = i0 + 3 * first + second;
    grid.a1 = -4 * first - 2 * second;
    grid.a2 = first + second;
  } else if (a.solver == kHeun) {
    grid.a0 = i0 - i1 / h;
    grid.a1 = i1 / h;
  }
  return grid;
}

// A row on its way from noise to a code. The next evaluation is at `at`, and leaves D in `out`.
struct Way {
  Grid grid;
  int64_t step;
  bool ahead;  // Heun: `at` is the predicted end of the step
  const float* at;
  float inverse_variance;
  float *out, *mean, *u, *d0, *d1, *d2, *predicted;
  int32_t evaluations;
};

constexpr int kWayVectors = 6;

static Way way_of(float* vectors, int64_t d) {
  Way w = {};
  w.mean = vectors;
  w.u = w.mean + d;
  w.d0 = w.u + d;
  w.d1 = w.d0 + d;
  w.d2 = w.d1 + d;
  w.predicted = w.d2 + d;
  return w;
}

static void look(const FlowArgs& a, Way& w, const float* at, int64_t step, float* out) {
  const double sigma = step < a.steps ? w.grid.sigma_max * exp(-w.grid.h * (double)step) : a.sigma_min;
  w.at = at;
  w.out = out;
  w.inverse_variance = (float)(1 / (sigma * sigma));
}

static void start(const FlowArgs& a, Way& w, float spread, const float* eps) {
  w.grid = grid_of(a, spread);
  w.step = 0;
  w.ahead = false;
  for (int64_t k = 0; k < a.d; ++k) w.u[k] = (float)w.grid.sigma_max * eps[k] + w.mean[k];
  look(a, w, w.u, 0, w.d0);
}

static bool at_the_end(const FlowArgs& a, const Way& w) { return w.step == a.steps; }

// Whether the row may end early where it was looked at.
static bool may_end(const FlowArgs& a, const Way& w) { return a.early_exit && w.step > 0 && !w.ahead; }

// Goes on from an evaluation to the next one.
static void advance(const FlowArgs& a, Way& w) {
  const Grid& grid = w.grid;
  const double g = grid.g;
  if (w.step == 0 && !w.ahead)
    // The step from sigma = infinity, where D is the mean, and the history that goes with it.
    for (int64_t k = 0; k < a.d; ++k) {
      const float first = w.d0[k] - w.mean[k];
      w.u[k] += .5f * first;
      w.d1[k] = w.mean[k] + (float)g * first;
      w.d2[k] = w.mean[k] + (float)(g * g) * first;
    }
  if (a.solver == kHeun && !w.ahead) {
    for (int64_t k = 0; k < a.d; ++k) w.predicted[k] = (float)(g * w.u[k] + grid.i0 * w.d0[k]);
    w.ahead = true;
    look(a, w, w.predicted, w.step + 1, w.d1);
    return;
  }
  for (int64_t k = 0; k < a.d; ++k)
    w.u[k] = (float)(g * w.u[k] + grid.a0 * w.d0[k] + grid.a1 * w.d1[k] + grid.a2 * w.d2[k]);
  float* oldest = w.d2;
  w.d2 = w.d1;
  w.d1 = w.d0;
  w.d0 = oldest;
  w.ahead = false;
  look(a, w, w.u, ++w.step, w.d0);
}

// eps at most kMostNoise; returns the entry of the support that the flow reaches. All is relative to the support's mean.
static int64_t flow_row(const FlowArgs& a, Support& s, Way& w, const float* eps) {
  const int64_t d = a.d;
  w.evaluations = 0;
  if (s.count == 1) return 0;
  gather_codes(a.codebook, s.index, s.padded, d, s.packed);
  const float spread = centre_support(s, d);
  if (!(spread > 0.f)) {
    float largest = -kInf;
    for (int64_t i = 0; i < s.count; ++i) largest = max_of(largest, s.log_p[i]);
    return first_equal(s.log_p, s.padded, largest);
  }
  for (start(a, w, spread, eps);; advance(a, w)) {
    const Evaluation e = evaluate_scores(s, w.at, d, w.inverse_variance);
    ++w.evaluations;
    if (at_the_end(a, w)) return e.top;
    const float rest = weighted_mean(s, d, e.most, e.top, w.out);
    if (!may_end(a, w)) continue;
    const float least = deciding_gap(a, s.index[e.top], rest);
    if (least < kInf && 2.f * (margin_of(s.packed, s.half_norm, w.at, d, e.top) - e.largest) >= least) return e.top;
  }
}

// Whether rows that keep most codes share one copy of the codebook: each its own would not stay in the L2 cache.
static bool shares_codes(const FlowArgs& a) { return a.V * a.d > kCachedFloats; }

// What rows do together.
struct Together {
  Flow* flow;
  const float *packed, *half_norm;  // all codes less their mean: [padded / W][d][W], [padded]
  int64_t padded, chunk;
  int64_t *rows, count;  // the rows that keep most codes
};

struct Found {  // by an evaluation, beside D
  float total;    // of the weights relative to the largest one
  int64_t top;    // the first code of the largest weight
  float largest;  // max_j m_j
};

// One evaluation of R rows, with a running maximum: a chunk's codes serve both products of all rows from the cache.
template <int R>
static void evaluate_together(const Together& s, int64_t d, Way* const* ways, const float* const* log_p,
                              const PosteriorTile& tile, Found* found) {
  float most[R], unused[R] = {};
  vf mass[R], largest[R];
  for (int r = 0; r < R; ++r) {
    most[r] = -kInf;
    mass[r] = vf{};
    largest[r] = splat(-kInf);
    found[r].top = 0;
  }
  for (int64_t i = 0; i < R * d * W; i += W) storea(tile.sum + i, vf{});
  for (int64_t j0 = 0; j0 < s.padded; j0 += s.chunk) {
    const int64_t n = min_of(s.chunk, s.padded - j0);
    const float* packed = s.packed + j0 * d;
    vf high[R];
    for (int r = 0; r < R; ++r) high[r] = splat(-kInf);
    for (int64_t j = 0; j < n; j += kGroup) {
      vf m[R][kTileVectors];
      for (int v = 0; v < kTileVectors; ++v)
        for (int r = 0; r < R; ++r) m[r][v] = -loada(s.half_norm + j0 + j + v * W);
      const float* c = packed + j * d;
      for (int64_t k = 0; k < d; ++k)
        for (int v = 0; v < kTileVectors; ++v) {
          const vf cv = loada(c + (v * d + k) * W);
          for (int r = 0; r < R; ++r) m[r][v] = fma(splat(ways[r]->at[k]), cv, m[r][v]);
        }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
          const vf p = loada(log_p[r] + j0 + j + v * W);
          const vf score = fma(m[r][v], splat(ways[r]->inverse_variance), p);
          storea(tile.score + r * s.chunk + j + v * W, score);
          high[r] = vmax(score, high[r]);
          largest[r] = vmax(select((vi)(p > splat(-kInf)), m[r][v], splat(-kInf)), largest[r]);
        }
    }
    for (int r = 0; r < R; ++r) {
      const float value = reduce_max(high[r]);
      if (!(value > most[r])) continue;
      raise_most(tile, r, d, value, most[r], mass[r]);
      found[r].top = j0 + first_equal(tile.score + r * s.chunk, n, value);
    }
    const int64_t active = posterior_weights<R, false>(tile, n, s.chunk, most, unused, mass);
    posterior_sums<R>(tile, packed, active, s.chunk, d);
  }
  for (int r = 0; r < R; ++r) {
    found[r].total = reduce_sum(mass[r]);
    found[r].largest = reduce_max(largest[r]);
    for (int64_t k = 0; k < d; ++k) ways[r]->out[k] = reduce_sum(loada(tile.sum + (r * d + k) * W)) / found[r].total;
  }
}

// log p of a row that find_support has taken, of every code: [padded].
static void fill_log_probs(const Flow& f, int64_t row, int64_t padded, float* log_p) {
  const int64_t V = f.args->V;
  Kept kept;
  float* x = f.filter ? (float*)scratch(kRow, (size_t)(2 * round_up(V, W)) * sizeof(float)) : nullptr;
  if (f.filter) filter_row(*f.filter, row, x, kept);
  for (int64_t i = 0; i < padded; i += W) {
    vf v = splat(-kInf);
    if (!f.filter) {
      v = load_row(f.args->log_probs, row, i, V);
    } else if (i < V) {
      const vf logit = loada(x + i);
      v = select(kept_lanes(kept, logit, i), logit - splat(kept.log_normaliser), v);
    }
    storea(log_p + i, v);
  }
}

// sqrt(E_p |c - mean|^2 / d), from the codes' norms and the mean's.
static float spread_of(const Together& s, const float* log_p, const float* mean, int64_t d) {
  vf most = splat(-kInf), mass = {}, norm = {};
  for (int64_t j = 0; j < s.padded; j += W) most = vmax(loada(log_p + j), most);
  const vf largest = splat(reduce_max(most));
  for (int64_t j = 0; j < s.padded; j += W) {
    const vf weight = vexp(loada(log_p + j) - largest);
    mass += weight;
    norm = fma(weight, loada(s.half_norm + j), norm);
  }
  double square = 2 * (double)reduce_sum(norm) / (double)reduce_sum(mass);
  for (int64_t k = 0; k < d; ++k) square -= (double)mean[k] * mean[k];
  return (float)sqrt(max_of(square, 0.0) / (double)d);
}

// Up to kTileRows rows are on their way at a time; where one ends, the next begins.
static void flow_rows_together(void* context, int64_t begin, int64_t end) {
  const Together& s = *(Together*)context;
  const FlowArgs& a = *s.flow->args;
  const int64_t d = a.d, size = s.padded + kWayVectors * d;
  float* memory = (float*)scratch(kSupport, (size_t)(kTileRows * round_up(size, W)) * sizeof(float));
  Way ways[kTileRows];
  float* log_p[kTileRows];
  int64_t rows[kTileRows];
  int going = 0;
  for (int r = 0; r < kTileRows; ++r) {
    log_p[r] = memory + r * round_up(size, W);
    ways[r] = way_of(log_p[r] + s.padded, d);
  }
  for (;;) {
    for (; going < kTileRows && begin < end; ++begin, ++going) {  // the first evaluation: at sigma = infinity, of the mean
      Way& w = ways[going];
      rows[going] = s.rows[begin];
      fill_log_probs(*s.flow, rows[going], s.padded, log_p[going]);
      for (int64_t k = 0; k < d; ++k) w.u[k] = 0;
      w.step = -1;
      w.at = w.u;
      w.out = w.mean;
      w.inverse_variance = 0;
      w.evaluations = 0;
    }
    if (going == 0) return;
    const PosteriorTile tile = posterior_tile(kTileRows, d, s.chunk);
    Way* in_hand[kTileRows];
    Found found[kTileRows];
    for (int r = 0; r < kTileRows; ++r) in_hand[r] = &ways[min_of(r, going - 1)];  // the last one again, unread
    const float* given[kTileRows];
    for (int r = 0; r < kTileRows; ++r) given[r] = log_p[min_of(r, going - 1)];
    if (going == 1)
      evaluate_together<1>(s, d, in_hand, given, tile, found);
    else
      evaluate_together<kTileRows>(s, d, in_hand, given, tile, found);
    for (int r = going - 1; r >= 0; --r) {
      Way& w = ways[r];
      if (w.step < 0) {
        start(a, w, spread_of(s, log_p[r], w.mean, d), a.noise + rows[r] * d);
        continue;
      }
      ++w.evaluations;
      bool ends = at_the_end(a, w);
      if (!ends && may_end(a, w)) {
        const float least = deciding_gap(a, found[r].top, max_of(found[r].total - 1.f, 0.f));
        ends = least < kInf &&
               2.f * (margin_of(s.packed, s.half_norm, w.at, d, found[r].top) - found[r].largest) >= least;
      }
      if (!ends) {
        advance(a, w);
        continue;
      }
      a.codes[rows[r]] = found[r].top;
      if (a.evaluations) a.evaluations[rows[r]] = w.evaluations;
      // The last one, which has had its turn, takes the free place.
      const int last = --going;
      const Way free_way = w;
      float* free_log_p = log_p[r];
      w = ways[last];
      ways[last] = free_way;
      log_p[r] = log_p[last];
      log_p[last] = free_log_p;
      rows[r] = rows[last];
    }
  }
}

static void run_together(Together& s, int threads) {
  const FlowArgs& a = *s.flow->args;
  s.padded = round_up(a.V, kGroup);
  s.chunk = chunk_of(a.d);
  float* packed = (float*)scratch(kShared, (size_t)(s.padded * (a.d + 2) + a.d) * sizeof(float));
  float* half_norm = packed + s.padded * a.d;
  int32_t* index = (int32_t*)(half_norm + s.padded);
  float* mean = (float*)(index + s.padded);
  for (int64_t j = 0; j < s.padded; ++j) index[j] = (int32_t)min_of(j, a.V - 1);
  gather_codes(a.codebook, index, s.padded, a.d, packed);
  mean_of(a.codebook, a.V, a.d, mean);
  for (int64_t j = 0; j < s.padded; j += W) storea(half_norm + j, centre(packed + j * a.d, mean, a.d) * .5f);
  s.packed = packed;
  s.half_norm = half_norm;
  parallel_for(s.count, (s.count + threads - 1) / threads, threads, flow_rows_together, &s);
}

static void flow_rows(void* context, int64_t begin, int64_t end) {
  Together& together = *(Together*)context;
  Flow& f = *together.flow;
  const FlowArgs& a = *f.args;
  Support s = support_buffers(a.V, a.d);
  s.mean = (float*)scratch(kAccumulators, (size_t)((1 + kWayVectors) * a.d) * sizeof(float));
  Way w = way_of(s.mean + a.d, a.d);
  for (int64_t k = 0; k < a.d; ++k) w.mean[k] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* eps = a.noise + row * a.d;
    bool finite = true;
    for (int64_t k = 0; k < a.d; ++k) finite &= __builtin_fabsf(eps[k]) <= kMostNoise;
    if (!finite || !find_support(f, row, s)) {
      report(&f.status, row);
      continue;
    }
    if (together.rows && s.count > a.V / 2) {
      together.rows[__atomic_fetch_add(&together.count, 1, __ATOMIC_RELAXED)] = row;
      continue;
    }
    a.codes[row] = s.index[flow_row(a, s, w, eps)];
    if (a.evaluations) a.evaluations[row] = w.evaluations;
  }
}

static int64_t run_flow(Flow f, int threads) {
  Together s = {};
  s.flow = &f;
  if (shares_codes(*f.args)) s.rows = (int64_t*)scratch(kSharedExtra, (size_t)f.args->rows * sizeof(int64_t));
  parallel_for(f.args->rows, 1, threads, flow_rows, &s);
  if (s.count) run_together(s, threads);
  return f.status;
}

static int64_t flow_sample(const FlowArgs& args, int threads) { return run_flow({&args, nullptr, kOk}, threads); }

// filter_logits and flow_sample in one pass over the row, without the filtered row in memory.
static int64_t sample_codes(const FilterArgs& filter, const FlowArgs& args, int threads) {
  return run_flow({&args, &filter, kOk}, threads);
}
