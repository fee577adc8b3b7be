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
static inline void dots(const Support& s, const float* u, int64_t d, int64_t j, vf (&m)[kTileVectors]) {
  const float* c = s.packed + j * (D ? D : d);
  for (int v = 0; v < kTileVectors; ++v) m[v] = -loada(s.half_norm + j + v * W);
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
    dots<D>(s, u, d, j, m);
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

static Evaluation evaluate_scores(const Support& s, const float* u, int64_t d, double sigma) {
  const float inverse_variance = (float)(1 / (sigma * sigma));
  return d == 8 ? evaluate_scores<8>(s, u, d, inverse_variance) : evaluate_scores<0>(s, u, d, inverse_variance);
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
    float* c = s.packed + j * d;
    vf norm = {};
    for (int64_t k = 0; k < d; ++k) {
      const vf centred = loada(c + k * W) - splat(s.mean[k]);
      storea(c + k * W, centred);
      norm = fma(centred, centred, norm);
    }
    storea(s.half_norm + j, norm * .5f);
    const vf relative = loada(s.log_p + j) - splat(largest);
    variance += vexp(relative) * norm;
  }
  return (float)sqrt((double)reduce_sum(variance) / ((1.0 + (double)rest) * (double)d));
}

// The exit rule: codes k for which every margin can only grow from here on (see the reference).
static bool is_decided(const Flow& f, const Support& s, const float* u, const Evaluation& e, float rest) {
  const FlowArgs& a = *f.args;
  const float delta = rest / (1.f + rest) + 1e-6f;
  const float nearest = .99f * a.geometry[s.index[e.top]], reach = 2.f * delta * a.geometry[a.V];
  if (!(reach <= nearest)) return false;
  vf m[kTileVectors];
  const int64_t group = e.top / kGroup * kGroup;
  if (a.d == 8)
    dots<8>(s, u, a.d, group, m);
  else
    dots<0>(s, u, a.d, group, m);
  const float gap = 2.f * (m[(e.top - group) / W][e.top % W] - e.largest);
  return gap >= -nearest * (nearest - reach);
}

// eps at most kMostNoise; returns the entry of the support that the flow reaches.
static int64_t flow_row(const Flow& f, Support& s, const float* eps, int32_t* evaluations) {
  const FlowArgs& a = *f.args;
  const int64_t d = a.d;
  int32_t count = 0;
  float* u = s.mean + d;           // relative to the mean, like all D
  float *d0 = u + d, *d1 = d0 + d, *d2 = d1 + d, *predicted = d2 + d;
  if (s.count == 1) {
    *evaluations = 0;
    return 0;
  }
  gather_codes(a.codebook, s.index, s.padded, d, s.packed);
  const float spread = centre_support(s, d);
  if (!(spread > 0.f)) {
    *evaluations = 0;
    float largest = -kInf;
    for (int64_t i = 0; i < s.count; ++i) largest = max_of(largest, s.log_p[i]);
    return first_equal(s.log_p, s.padded, largest);
  }
  const double sigma_max = max_of(8.0 * (double)spread, 2.0 * a.sigma_min);
  const double h = log(sigma_max / a.sigma_min) / (double)a.steps;
  const double i0 = -expm1(-h), i1 = h - i0, i2 = h * h - 2 * i1;
  const double g = 1 - i0;
  // u' = g u + a0 D_i + a1 D_{i-1} + a2 D_{i-2}; Heun: a1 belongs to the predicted end's D.
  double a0 = i0, a1 = 0, a2 = 0;
  if (a.solver == kMultistep2) {
    a0 = i0 + i1 / h;
    a1 = -i1 / h;
  } else if (a.solver == kMultistep3) {
    const double first = i1 / (2 * h), second = i2 / (2 * h * h);
    a0 = i0 + 3 * first + second;
    a1 = -4 * first - 2 * second;
    a2 = first + second;
  } else if (a.solver == kHeun) {
    a0 = i0 - i1 / h;
    a1 = i1 / h;
  }
  for (int64_t k = 0; k < d; ++k) u[k] = (float)sigma_max * eps[k];
  Evaluation e = {};
  for (int64_t i = 0; i < a.steps; ++i) {
    e = evaluate_scores(s, u, d, sigma_max * exp(-h * (double)i));
    ++count;
    const float rest = weighted_mean(s, d, e.most, e.top, d0);
    if (i == 0) {
      // The step from sigma = infinity, where D is the mean (here 0), and the history that goes with it.
      for (int64_t k = 0; k < d; ++k) {
        u[k] += .5f * d0[k];
        d1[k] = (float)g * d0[k];
        d2[k] = (float)(g * g) * d0[k];
      }
    } else if (a.early_exit && is_decided(f, s, u, e, rest)) {
      *evaluations = count;
      return e.top;
    }
    if (a.solver == kHeun) {
      for (int64_t k = 0; k < d; ++k) predicted[k] = (float)(g * u[k] + i0 * d0[k]);
      const Evaluation end = evaluate_scores(s, predicted, d, sigma_max * exp(-h * (double)(i + 1)));
      ++count;
      weighted_mean(s, d, end.most, end.top, d1);
    }
    for (int64_t k = 0; k < d; ++k) u[k] = (float)(g * u[k] + a0 * d0[k] + a1 * d1[k] + a2 * d2[k]);
    float* oldest = d2;
    d2 = d1;
    d1 = d0;
    d0 = oldest;
  }
  e = evaluate_scores(s, u, d, a.sigma_min);
  *evaluations = count + 1;
  return e.top;
}

static void flow_rows(void* context, int64_t begin, int64_t end) {
  Flow& f = *(Flow*)context;
  const FlowArgs& a = *f.args;
  Support s = support_buffers(a.V, a.d);
  s.mean = (float*)scratch(kAccumulators, (size_t)(6 * a.d) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const float* eps = a.noise + row * a.d;
    bool finite = true;
    for (int64_t k = 0; k < a.d; ++k) finite &= __builtin_fabsf(eps[k]) <= kMostNoise;
    if (!finite || !find_support(f, row, s)) {
      report(&f.status, row);
      continue;
    }
    int32_t evaluations;
    a.codes[row] = s.index[flow_row(f, s, eps, &evaluations)];
    if (a.evaluations) a.evaluations[row] = evaluations;
  }
}

static int64_t flow_sample(const FlowArgs& args, int threads) {
  Flow f{&args, nullptr, kOk};
  parallel_for(args.rows, 1, threads, flow_rows, &f);
  return f.status;
}

// filter_logits and flow_sample in one pass over the row, without the filtered row in memory.
static int64_t sample_codes(const FilterArgs& filter, const FlowArgs& args, int threads) {
  Flow f{&args, &filter, kOk};
  parallel_for(args.rows, 1, threads, flow_rows, &f);
  return f.status;
}
