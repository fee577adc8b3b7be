// draw_codes: filter_logits, then the code at which the running sum of probabilities passes the row's uniform number.

struct Draw {
  const FilterArgs* args;
  const float* uniform;
  int64_t* codes;
  int64_t status;
};

// The weights of eight vectors from entry i on that the filter keeps, 0 elsewhere; returns their sum.
static inline double kept_weights(const Kept& kept, const float* x, const float* weight, int64_t i, int64_t n) {
  vf sum = {};
  for (const int64_t end = min_of(n, i + 8 * W); i < end; i += W)
    sum += select(kept_lanes(kept, loada(x + i), i), loada(weight + i), (vf){});
  return (double)reduce_sum(sum);
}

static inline bool is_kept(const Kept& kept, const float* x, int64_t i) {
  return x[i] > kept.threshold || (x[i] == kept.threshold && i <= kept.last_tie);
}

static int64_t draw_code(const Kept& kept, const float* x, const float* weight, int64_t n, double uniform) {
  double total = 0;
  for (int64_t i = 0; i < n; i += 8 * W) total += kept_weights(kept, x, weight, i, n);
  const double goal = uniform * total;
  double before = 0;
  int64_t i = 0;
  for (; i + 8 * W < n; i += 8 * W) {
    const double here = kept_weights(kept, x, weight, i, n);
    if (before + here > goal) break;
    before += here;
  }
  int64_t last = -1;  // the last kept code so far: rounding may leave the sum at or below the goal
  for (; i < n && before <= goal; ++i) {
    if (!is_kept(kept, x, i)) continue;
    before += (double)weight[i];
    last = i;
  }
  if (last >= 0) return last;
  for (i = n - 1; !is_kept(kept, x, i);) --i;
  return i;
}

static void draw_codes_rows(void* context, int64_t begin, int64_t end) {
  Draw& d = *(Draw*)context;
  const int64_t n = round_up(d.args->V, W);
  float* x = (float*)scratch(kRow, (size_t)(2 * n) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    Kept kept;
    if (filter_row(*d.args, row, x, kept))
      d.codes[row] = draw_code(kept, x, x + n, n, (double)d.uniform[row]);
    else
      report(&d.status, row);
  }
}

static int64_t draw_codes(const FilterArgs& args, const float* uniform, int64_t* codes, int threads) {
  Draw d{&args, uniform, codes, kOk};
  parallel_for(args.rows, filtered_at_a_time(args), threads, draw_codes_rows, &d);
  return d.status;
}
