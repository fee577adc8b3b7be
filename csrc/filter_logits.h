// filter_logits: guidance, temperature, top-k, top-p and log_softmax of one row at a time.
//
// Nothing is sorted. A value is found by its rank (top-k) or by the mass above it (top-p) by narrowing an interval of
// values that must contain it: every step counts the row's entries above a pivot, and once few entries are left inside
// the interval they are copied out and settled one by one. Pivots interpolate; every third step halves the interval in
// the order of the floats' bit patterns, which bounds the number of steps for any input.
// Memory: two rows of V floats per thread.

constexpr int64_t kCandidates = 64;

// Floats in an order-preserving way on integers, and back.
static inline int32_t to_key(float x) {
  int32_t i;
  __builtin_memcpy(&i, &x, 4);
  return i ^ ((i >> 31) & 0x7fffffff);
}
static inline float from_key(int32_t key) {
  const int32_t i = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  __builtin_memcpy(&x, &i, 4);
  return x;
}

// A value strictly between lo and hi (whose keys differ by more than one), at `fraction` of the way on odd steps.
static inline float choose_pivot(float lo, float hi, double fraction, int step) {
  const int64_t klo = to_key(lo), khi = to_key(hi);
  int64_t key = klo + (khi - klo) / 2;
  if (step % 3 != 2) {
    const double value = (double)lo + ((double)hi - (double)lo) * fraction;
    key = to_key((float)value);
  }
  return from_key((int32_t)max_of(klo + 1, min_of(khi - 1, key)));
}

static int64_t count_from(const float* x, int64_t n, float pivot) {  // #(x >= pivot)
  vi count = {};
  for (int64_t i = 0; i < n; i += W) count -= (vi)(loada(x + i) >= splat(pivot));
  return reduce_sum(count);
}

// Indices, in ascending order, of the entries with lo <= x < hi; at most kCandidates.
static int64_t gather_between(const float* x, int64_t n, float lo, float hi, int32_t* index) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) {
    const vf v = loada(x + i);
    for (uint32_t left = bits((vi)(v >= splat(lo)) & (vi)(v < splat(hi))); left; left &= left - 1)
      index[count++] = (int32_t)(i + __builtin_ctz(left));
  }
  return count;
}

// Stable insertion sort of indices by descending value.
static void sort_descending(const float* x, int32_t* index, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const int32_t moving = index[i];
    int64_t j = i;
    for (; j > 0 && x[index[j - 1]] < x[moving]; --j) index[j] = index[j - 1];
    index[j] = moving;
  }
}

// The k-th largest of n entries (a multiple of W of them, padded with -inf), `finite` > k of which are above -inf, in
// [least, most].
static float kth_largest(const float* x, int64_t n, int64_t k, int64_t finite, float least, float most) {
  float lo = least, hi = most;
  int64_t above_lo = finite, above_hi = count_from(x, n, most);  // above_lo >= k > above_hi
  if (above_hi >= k) return most;
  for (int step = 0;; ++step) {
    if (above_lo - above_hi <= kCandidates) {
      int32_t index[kCandidates];
      sort_descending(x, index, gather_between(x, n, lo, hi, index));
      return x[index[k - above_hi - 1]];
    }
    if ((int64_t)to_key(hi) - to_key(lo) <= 1) return lo;
    const float pivot = choose_pivot(lo, hi, (double)(above_lo - k) / (double)(above_lo - above_hi), step);
    const int64_t above = count_from(x, n, pivot);
    if (above >= k) {
      lo = pivot;
      above_lo = above;
    } else {
      hi = pivot;
      above_hi = above;
    }
  }
}

// What a filtered row keeps: entries above the threshold, and those equal to it with an index up to last_tie.
struct Kept {
  float threshold, log_normaliser;  // log_prob = x - log_normaliser
  int32_t last_tie;
};

static inline vi kept_lanes(const Kept& kept, vf x, int64_t first) {
  const vi index = lane_ids() + splat((int32_t)first);
  return (vi)(x > splat(kept.threshold)) | ((vi)(x == splat(kept.threshold)) & (vi)(index <= splat(kept.last_tie)));
}

// Sum of weights in float64: float32 per lane over a few vectors, then widened.
struct MassSum {
  double lane[W] = {};
  void add(vf partial) {
    for (int i = 0; i < W; ++i) lane[i] += (double)partial[i];
  }
  double total() const {
    double r = 0;
    for (int i = 0; i < W; ++i) r += lane[i];
    return r;
  }
};

struct Mass {
  double mass;
  int64_t count;
};

static Mass mass_from(const float* x, const float* weight, int64_t n, float pivot) {  // over x >= pivot
  MassSum sum;
  vi count = {};
  for (int64_t i = 0; i < n;) {
    vf partial = {};
    for (const int64_t end = min_of(n, i + 8 * W); i < end; i += W) {
      const vi above = (vi)(loada(x + i) >= splat(pivot));
      partial += select(above, loada(weight + i), (vf){});
      count -= above;
    }
    sum.add(partial);
  }
  return {sum.total(), reduce_sum(count)};
}

// Sets kept.threshold and last_tie so that an entry stays while the mass of strictly earlier entries is below `goal`;
// returns the mass kept. The entries in question are those >= least; their total mass is `all`.
static double nucleus(const float* x, const float* weight, int64_t n, double goal, Mass all, float least, float most,
                      Kept& kept) {
  float lo = least, hi = most;
  Mass above_lo = all, above_hi = {0, 0};  // above_lo.mass >= goal > above_hi.mass
  const Mass top = mass_from(x, weight, n, most);
  if (top.mass >= goal)
    lo = most, above_lo = top;
  else
    above_hi = top;
  for (int step = 0; lo != hi; ++step) {
    if (above_lo.count - above_hi.count <= kCandidates) {
      int32_t index[kCandidates];
      const int64_t count = gather_between(x, n, lo, hi, index);
      sort_descending(x, index, count);
      double mass = above_hi.mass;
      int64_t i = 0;
      for (; i < count && mass < goal; ++i) mass += weight[index[i]];
      kept.threshold = x[index[i - 1]];
      kept.last_tie = index[i - 1];
      return mass;
    }
    if ((int64_t)to_key(hi) - to_key(lo) <= 1) break;
    const double fraction = (above_lo.mass - goal) / (above_lo.mass - above_hi.mass);
    const float pivot = choose_pivot(lo, hi, fraction, step);
    const Mass above = mass_from(x, weight, n, pivot);
    if (above.mass >= goal) {
      lo = pivot;
      above_lo = above;
    } else {
      hi = pivot;
      above_hi = above;
    }
  }
  // Everything in question equals lo: take ties in order.
  kept.threshold = lo;
  double mass = above_hi.mass;
  for (int64_t i = 0; i < n && mass < goal; ++i) {
    if (x[i] != lo) continue;
    mass += weight[i];
    kept.last_tie = (int32_t)i;
  }
  return mass;
}

// Fills x (round_up(V, W) floats) with the guided, tempered row; false if it holds NaN or +inf, or nothing above -inf.
static bool load_guided_row(const FilterArgs& a, int64_t row, float* x, int64_t& finite, float& least, float& most) {
  vf largest = splat(-kInf), smallest = splat(kInf);
  vi bad = {}, count = {};
  const vf scale = splat(a.uncond.data ? a.cfg_scale[row] : 1.f), temperature = splat((float)a.temperature);
  for (int64_t i = 0; i < a.V; i += W) {
    vf v = load_row(a.logits, row, i, a.V);
    if (a.uncond.data) {
      const vf u = load_row(a.uncond, row, i, a.V);
      const vf guided = u + scale * (v - u);
      v = select((vi)(v == splat(-kInf)) & (vi)(u == splat(-kInf)), v, guided);
    }
    if (a.temperature != 1) v /= temperature;
    storea(x + i, v);
    const vi above = (vi)(v > splat(-kInf));
    bad |= ~(vi)(v < splat(kInf));
    count -= above;
    largest = vmax(v, largest);
    smallest = vmin(select(above, v, splat(kInf)), smallest);
  }
  finite = reduce_sum(count);
  most = reduce_max(largest);
  least = reduce_min(smallest);
  return !any(bad) && finite > 0;
}

// x must hold 2 round_up(V, W) floats: the row, then working memory. False: a bad row.
static bool filter_row(const FilterArgs& a, int64_t row, float* x, Kept& kept) {
  int64_t finite;
  float least, most;
  if (!load_guided_row(a, row, x, finite, least, most)) return false;
  const int64_t n = round_up(a.V, W);
  if (a.top_k > 0 && a.top_k < finite) least = kth_largest(x, n, a.top_k, finite, least, most);
  kept.threshold = least;
  kept.last_tie = (int32_t)n;
  float* weight = x + n;
  MassSum sum;
  vi count = {};
  for (int64_t i = 0; i < n;) {
    vf partial = {};
    for (const int64_t end = min_of(n, i + 8 * W); i < end; i += W) {
      const vf v = loada(x + i);
      const vi above = (vi)(v >= splat(least));
      const vf w = select(above, vexp(v - splat(most)), (vf){});
      storea(weight + i, w);
      partial += w;
      count -= above;
    }
    sum.add(partial);
  }
  Mass all{sum.total(), reduce_sum(count)};
  if (a.top_p < 1) {
    const double goal = max_of(a.top_p * all.mass, 1e-300);  // the first entry always stays
    all.mass = nucleus(x, weight, n, goal, all, least, most, kept);
  }
  kept.log_normaliser = (float)((double)most + log(all.mass));
  return true;
}

struct Filter {
  const FilterArgs* args;
  float* out;
  int64_t status;
};

static inline void report(int64_t* status, int64_t row) {  // keeps the first bad row, whichever thread finds it
  int64_t seen = __atomic_load_n(status, __ATOMIC_RELAXED);
  while ((seen == kOk || row < seen) &&
         !__atomic_compare_exchange_n(status, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

static void filter_logits_rows(void* context, int64_t begin, int64_t end) {
  Filter& f = *(Filter*)context;
  const int64_t V = f.args->V;
  float* x = (float*)scratch(kRow, (size_t)(2 * round_up(V, W)) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    Kept kept;
    if (!filter_row(*f.args, row, x, kept)) {
      report(&f.status, row);
      continue;
    }
    float* out = f.out + row * V;
    for (int64_t i = 0; i < V; i += W) {
      const vf v = loada(x + i);
      const vf y = select(kept_lanes(kept, v, i), v - splat(kept.log_normaliser), splat(-kInf));
      if (i + W <= V)
        store(out + i, y);
      else
        __builtin_memcpy(out + i, &y, (size_t)(V - i) * sizeof(float));
    }
  }
}

// Rows that a thread takes at a time: of a small codebook many, or handing them out would cost more than the rows.
static inline int64_t filtered_at_a_time(const FilterArgs& args) { return max_of<int64_t>(1, 16384 / args.V); }

static int64_t filter_logits(const FilterArgs& args, float* out, int threads) {
  Filter f{&args, out, kOk};
  parallel_for(args.rows, filtered_at_a_time(args), threads, filter_logits_rows, &f);
  return f.status;
}
