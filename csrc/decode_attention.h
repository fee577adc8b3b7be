// decode_attention: one new position per row: rotate, append to the cache, attend to what the cache holds.
//
// A piece is one key head of one row with the query heads that share it. Scores of W keys at a time are dot products
// along K whose lanes are summed together; the softmax is taken over all scores at once, which fit the nearest cache.
// Memory per thread: L floats of scores, 3 K of query, key and result, and 2 L K where elements are not float32.

constexpr int64_t kPrefetched = 1024;  // floats

// x rotated by the angles of one position, in place: (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos) for each pair.
static inline void rotate(float* x, const float* rope, int64_t K) {
  for (int64_t k = 0; k < K; k += 2) {
    const float a = x[k], b = x[k + 1], c = rope[k], s = rope[k + 1];
    x[k] = a * c - b * s;
    x[k + 1] = a * s + b * c;
  }
}

static void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t K, float scale,
                   float* score, float* out) {
  vf most = splat(-kInf);
  for (int64_t j = 0; j < count; j += W) {
    const int64_t present = min_of<int64_t>(W, count - j);
    const vf dots = lane_sums([&](int i) __attribute__((always_inline)) {
      vf sum = {};
      if (i < present) {
        const float* key = keys + (j + i) * K;
        int64_t k = 0;
        for (; k + W <= K; k += W) sum = fma(load(query + k), load(key + k), sum);
        if (k < K) sum = fma(load_part(query + k, K - k), load_part(key + k, K - k), sum);
      }
      return sum;
    });
    const vf scores = select(lane_ids() < splat((int32_t)present), dots * scale, splat(-kInf));
    storea(score + j, scores);
    most = vmax(scores, most);
  }
  const vf shift = splat(reduce_max(most));
  vf mass = {};
  for (int64_t j = 0; j < count; j += W) {
    const vf weight = vexp(loada(score + j) - shift);
    mass += weight;
    storea(score + j, weight);
  }
  const vf normaliser = splat(1.f / reduce_sum(mass));
  for (int64_t k = 0; k < K; k += W) {
    const int64_t present = min_of<int64_t>(W, K - k);
    vf sum = {};
    if (present == W)
      for (int64_t j = 0; j < count; ++j) sum = fma(splat(score[j]), load(values + j * K + k), sum);
    else
      for (int64_t j = 0; j < count; ++j) sum = fma(splat(score[j]), load_part(values + j * K + k, present), sum);
    if (present == W)
      store(out + k, sum * normaliser);
    else
      store_part(out + k, sum * normaliser, present);
  }
}

static void decode_attention_pieces(void* context, int64_t begin, int64_t end) {
  const AttentionArgs& a = *(const AttentionArgs*)context;
  const int64_t K = a.head_dim, L = a.length, group = a.heads / a.kv_heads, position = *a.position;
  const bool wide = a.dtype == kFloat32;
  float* score = (float*)scratch(kScores, (size_t)round_up(L, W) * sizeof(float));
  float* query = (float*)scratch(kRow, (size_t)(3 * K) * sizeof(float));
  float *key = query + K, *out = key + K;
  float* widened = wide ? nullptr : (float*)scratch(kWeights, (size_t)(2 * L * K) * sizeof(float));
  const float* rope = a.rope ? a.rope + position * K : nullptr;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / a.kv_heads, head = piece % a.kv_heads, from = row * a.qkv_stride;
    const int64_t cache = piece * L * K, at = cache + position * K;
    widen(a.qkv, a.dtype, from + (a.heads + head) * K, K, key);
    if (rope) rotate(key, rope, K);
    narrow(key, K, a.keys, a.dtype, at);
    widen(a.qkv, a.dtype, from + (a.heads + a.kv_heads + head) * K, K, key);
    narrow(key, K, a.values, a.dtype, at);
    const int64_t first = a.first ? max_of<int64_t>(0, min_of(a.first[row], position)) : 0, count = position + 1 - first;
    const float *keys = (const float*)a.keys + cache + first * K, *values = (const float*)a.values + cache + first * K;
    if (wide && piece + 1 < end) {  // the next piece's, which lies a whole sequence further: no hardware foresees it
      const int64_t ahead = min_of<int64_t>(count * K, kPrefetched);
      for (int64_t i = 0; i < ahead; i += 16) {
        __builtin_prefetch(keys + L * K + i);
        __builtin_prefetch(values + L * K + i);
      }
    }
    if (!wide) {
      widen(a.keys, a.dtype, cache + first * K, count * K, widened);
      widen(a.values, a.dtype, cache + first * K, count * K, widened + count * K);
      keys = widened;
      values = widened + count * K;
    }
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      widen(a.qkv, a.dtype, from + h * K, K, query);
      if (rope) rotate(query, rope, K);
      attend(query, keys, values, count, K, a.scale, score, out);
      narrow(out, K, a.out, a.dtype, (row * a.heads + h) * K);
    }
  }
}

static void decode_attention(const AttentionArgs& args, int threads) {
  // Long runs of pieces, so that what is fetched ahead is mostly one's own.
  const int64_t pieces = args.rows * args.kv_heads;
  parallel_for(pieces, max_of<int64_t>(16, pieces / (2 * threads)), threads, decode_attention_pieces, (void*)&args);
}
