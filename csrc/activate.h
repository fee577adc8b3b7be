// activate: gelu (tanh form) or silu of every element, times another tensor's where there is one.
//
// gelu(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): 1/2 (1 + tanh u) is the logistic function of 2 u.
// Elements are numbered as the result holds them; a piece of them never crosses the end of a row.

static void activate_elements(void* context, int64_t begin, int64_t end) {
  const ActivateArgs& a = *(const ActivateArgs*)context;
  constexpr int64_t kPiece = 256;
  alignas(64) float x[kPiece], times[kPiece];
  int64_t row = begin / a.width, column = begin % a.width;
  for (int64_t first = begin; first < end;) {
    const int64_t count = min_of(kPiece, min_of(end - first, a.width - column));
    widen(a.x, a.dtype, row * a.x_stride + column, count, x);
    if (a.times) widen(a.times, a.dtype, row * a.times_stride + column, count, times);
    for (int64_t i = 0; i < count; i += W) {
      // Far below 0 the quotient's limit is 0, which exp(88), the largest there is, makes of no more than -1e4.
      const vf given = loada(x + i), v = select(given < splat(-1e4f), splat(-1e4f), given);
      const vf slope = a.gelu ? fma(v * v, splat(-2 * 0.79788456f * 0.044715f), splat(-2 * 0.79788456f)) : splat(-1.f);
      vf y = v / (vexp(vmin(v * slope, splat(88.f))) + 1.f);
      if (a.times) y *= loada(times + i);
      storea(x + i, y);
    }
    narrow(x, count, a.out, a.dtype, first);
    first += count;
    column += count;
    if (column == a.width) row++, column = 0;
  }
}

static void activate(const ActivateArgs& args, int threads) {
  parallel_for(args.rows * args.width, 4096, threads, activate_elements, (void*)&args);
}
