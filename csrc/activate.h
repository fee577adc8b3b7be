// activate: gelu (tanh form) or silu of every element, times another tensor's where there is one.
//
// gelu(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): 1/2 (1 + tanh u) is the logistic function of 2 u.

static void activate_elements(void* context, int64_t begin, int64_t end) {
  const ActivateArgs& a = *(const ActivateArgs*)context;
  constexpr int64_t kPiece = 256;
  alignas(64) float x[kPiece], times[kPiece];
  for (int64_t first = begin; first < end; first += kPiece) {
    const int64_t count = min_of(kPiece, end - first);
    widen(a.x, a.dtype, first, count, x);
    if (a.times) widen(a.times, a.dtype, first, count, times);
    for (int64_t i = 0; i < count; i += W) {
      const vf v = loada(x + i);
      const vf slope = a.gelu ? fma(v * v, splat(-2 * 0.79788456f * 0.044715f), splat(-2 * 0.79788456f)) : splat(-1.f);
      vf y = v / (vexp(vmin(v * slope, splat(88.f))) + 1.f);
      if (a.times) y *= loada(times + i);
      storea(x + i, y);
    }
    narrow(x, count, a.out, a.dtype, first);
  }
}

static void activate(const ActivateArgs& args, int threads) {
  parallel_for(args.count, 4096, threads, activate_elements, (void*)&args);
}
