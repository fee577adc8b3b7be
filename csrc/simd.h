// Vectors of W floats for the instruction set of this translation unit, and the few functions on them that kernels need.
// Included inside an anonymous namespace of every variant: nothing here may have external linkage, or a machine without
// AVX-512 could be given the AVX-512 copy of a function. For the same reason variants use nothing of the C++ library.
// (DDFAST_NEON is ours: every compiler for 64-bit ARM defines __ARM_NEON, for the portable variant too.)

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));  // for arithmetic that may wrap
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef float vf_may_alias __attribute__((vector_size(4 * W), may_alias));

constexpr float kInf = __builtin_inff();

template <class T>
static inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max_of(T a, T b) {
  return a < b ? b : a;
}
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline vf splat(float x) { return x - (vf){}; }
static inline vi splat(int32_t x) { return x - (vi){}; }
static inline vf load(const float* p) { return *(const vf_unaligned*)p; }
static inline void store(float* p, vf x) { *(vf_unaligned*)p = x; }
// The first `count` < W floats at p, 0 in the other lanes; nothing beyond them is touched.
static inline vf load_part(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  vf x = {};
  __builtin_memcpy(&x, p, (size_t)count * sizeof(float));
  return x;
#endif
}
static inline void store_part(float* p, vf x, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#else
  __builtin_memcpy(p, &x, (size_t)count * sizeof(float));
#endif
}
static inline void copy(float* to, const float* from, int64_t count) {  // without a call, unlike memcpy of a variable size
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}
static inline vf loada(const float* p) { return *(const vf_may_alias*)p; }   // p aligned to the vector
static inline void storea(float* p, vf x) { *(vf_may_alias*)p = x; }
static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }

static inline vi lane_ids() {
  vi r;
  for (int i = 0; i < W; ++i) r[i] = i;
  return r;
}

// a * b + c. The files are compiled without contraction, so this is the only place where a product and a sum may fuse.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(DDFAST_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
static inline vf fnma(vf a, vf b, vf c) {  // c - a * b
#if defined(__AVX512F__)
  return (vf)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(DDFAST_NEON)
  return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return c - a * b;
#endif
}

// The larger (smaller); b where a is NaN.
static inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(DDFAST_NEON)
  return (vf)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(DDFAST_NEON)
  return (vf)vminnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a < b ? a : b;
#endif
}

// Bit i is set where lane i of the mask (0 or -1) is.
static inline uint32_t bits(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#elif defined(DDFAST_NEON)
  return vaddvq_u32(vandq_u32((uint32x4_t)mask, (uint32x4_t){1, 2, 4, 8}));
#else
  uint32_t r = 0;
  for (int i = 0; i < W; ++i) r |= (uint32_t)(mask[i] & 1) << i;
  return r;
#endif
}
static inline bool any(vi mask) {
#if defined(DDFAST_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return bits(mask) != 0;
#endif
}

static inline float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(DDFAST_NEON)
  return vmaxnmvq_f32((float32x4_t)x);
#else
  float r = x[0];
  for (int i = 1; i < W; ++i) r = max_of(r, (float)x[i]);
  return r;
#endif
}
static inline float reduce_min(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)x);
#elif defined(DDFAST_NEON)
  return vminnmvq_f32((float32x4_t)x);
#else
  float r = x[0];
  for (int i = 1; i < W; ++i) r = min_of(r, (float)x[i]);
  return r;
#endif
}
static inline float reduce_sum(vf x) {  // pairwise
#if defined(DDFAST_NEON)
  return vpadds_f32(vadd_f32(vget_low_f32((float32x4_t)x), vget_high_f32((float32x4_t)x)));
#else
  float a[W];
  __builtin_memcpy(a, &x, sizeof a);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
#endif
}
static inline int64_t reduce_sum(vi x) {
#if defined(DDFAST_NEON)
  return vaddlvq_s32((int32x4_t)x);
#else
  int64_t r = 0;
  for (int i = 0; i < W; ++i) r += x[i];
  return r;
#endif
}

// e^x for x <= 88, to about one unit in the last place; exactly 0 below -87; NaN stays NaN.
// x = n ln 2 + r: n is read from the mantissa of x / ln 2 + 1.5 2^23; the polynomial is the classical one of Cephes' expf.
static inline vf vexp(vf x) {
  const vf magic = splat(12582912.f);
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fnma(n, splat(0.693359375f), x);
  r = fnma(n, splat(-2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.f;
  const vf y = (vf)((vu)p + ((vu)shifted << 23));
  return select(x < splat(-87.f), (vf){}, y);
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, body = h & 0x7fff;
  uint32_t out;
  if (body >= 0x7c00) {
    out = sign | 0x7f800000u | (body & 0x3ff) << 13;
  } else if (body >= 0x400) {
    out = sign | ((body << 13) + 0x38000000u);
  } else {
    float f = (float)body * 5.9604644775390625e-8f;  // subnormal: body 2^-24
    __builtin_memcpy(&out, &f, 4);
    out |= sign;
  }
  float f;
  __builtin_memcpy(&f, &out, 4);
  return f;
}

// Rounded to the nearest, ties to even; NaN stays NaN.
static inline uint16_t float_to_bfloat16(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  if ((x & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(x >> 16 | 0x40);
  return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
static inline uint16_t float_to_half(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  const uint16_t sign = (uint16_t)(x >> 16 & 0x8000);
  x &= 0x7fffffffu;
  if (x > 0x7f800000u) return sign | 0x7e00;
  if (x >= 0x477ff000u) return sign | 0x7c00;  // rounds to 2^16 or more
  if (x < 0x38800000u) {                        // subnormal: adding 1/2 rounds at 2^-24
    float small;
    __builtin_memcpy(&small, &x, 4);
    small += .5f;
    __builtin_memcpy(&x, &small, 4);
    return sign | (uint16_t)(x - 0x3f000000u);
  }
  return sign | (uint16_t)((x - 0x38000000u + 0xfff + (x >> 13 & 1)) >> 13);
}

// W consecutive elements of `dtype` at element offset i, as floats.
static inline vf load_as_float(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat32) return load((const float*)data + i);
  const uint16_t* p = (const uint16_t*)data + i;
  if (dtype == kBFloat16) return (vf)(__builtin_convertvector(*(const vh_unaligned*)p, vu) << 16);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(DDFAST_NEON)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  vf r;
  for (int j = 0; j < W; ++j) r[j] = half_to_float(p[j]);
  return r;
#endif
}

// The same where fewer than W elements are left: the missing lanes are -inf.
static inline vf load_tail_as_float(const void* data, int dtype, int64_t i, int64_t count) {
  uint32_t raw[W] = {};
  const int64_t size = size_of(dtype);
  __builtin_memcpy(raw, (const char*)data + i * size, (size_t)(count * size));
  return select(lane_ids() < splat((int32_t)count), load_as_float(raw, dtype, 0), splat(-kInf));
}

// `count` elements of `dtype` from element `first` on as floats, and back.
static void widen(const void* from, int dtype, int64_t first, int64_t count, float* to) {
  if (dtype == kFloat32) {
    copy(to, (const float*)from + first, count);
    return;
  }
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load_as_float(from, dtype, first + i));
  if (i < count) store_part(to + i, load_tail_as_float(from, dtype, first + i, count - i), count - i);
}

static void narrow(const float* from, int64_t count, void* to, int dtype, int64_t first) {
  if (dtype == kFloat32)
    copy((float*)to + first, from, count);
  else
    for (int64_t i = 0; i < count; ++i)
      ((uint16_t*)to)[first + i] = dtype == kBFloat16 ? float_to_bfloat16(from[i]) : float_to_half(from[i]);
}

// Row `row` from element i on, W of them, -inf beyond V.
static inline vf load_row(const Rows& rows, int64_t row, int64_t i, int64_t V) {
  const char* data = (const char*)rows.data + row * rows.stride * size_of(rows.dtype);
  if (i + W <= V) return load_as_float(data, rows.dtype, i);
  return i < V ? load_tail_as_float(data, rows.dtype, i, V - i) : splat(-kInf);
}

#if defined(DDFAST_NEON)
// For every mask as bits, the bytes that move its lanes to the front.
#define DDFAST_LANE(i) 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3
alignas(16) static const uint8_t kToFront[16][16] = {
    {},
    {DDFAST_LANE(0)},
    {DDFAST_LANE(1)},
    {DDFAST_LANE(0), DDFAST_LANE(1)},
    {DDFAST_LANE(2)},
    {DDFAST_LANE(0), DDFAST_LANE(2)},
    {DDFAST_LANE(1), DDFAST_LANE(2)},
    {DDFAST_LANE(0), DDFAST_LANE(1), DDFAST_LANE(2)},
    {DDFAST_LANE(3)},
    {DDFAST_LANE(0), DDFAST_LANE(3)},
    {DDFAST_LANE(1), DDFAST_LANE(3)},
    {DDFAST_LANE(0), DDFAST_LANE(1), DDFAST_LANE(3)},
    {DDFAST_LANE(2), DDFAST_LANE(3)},
    {DDFAST_LANE(0), DDFAST_LANE(2), DDFAST_LANE(3)},
    {DDFAST_LANE(1), DDFAST_LANE(2), DDFAST_LANE(3)},
    {DDFAST_LANE(0), DDFAST_LANE(1), DDFAST_LANE(2), DDFAST_LANE(3)},
};
#endif

// Appends the masked lanes of value and index to two lists; may write W elements behind the new end.
static inline int64_t append(vi mask, vf value, vi index, float* values, int32_t* indices, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 m = _mm512_movepi32_mask((__m512i)mask);
  store(values + count, (vf)_mm512_maskz_compress_ps(m, (__m512)value));
  *(vi_unaligned*)(indices + count) = (vi)_mm512_maskz_compress_epi32(m, (__m512i)index);
  return count + __builtin_popcount(m);
#elif defined(DDFAST_NEON)
  const uint32_t m = bits(mask);
  const uint8x16_t front = vld1q_u8(kToFront[m]);
  store(values + count, (vf)vqtbl1q_u8((uint8x16_t)value, front));
  *(vi_unaligned*)(indices + count) = (vi)vqtbl1q_u8((uint8x16_t)index, front);
  return count + __builtin_popcount(m);
#else
  for (uint32_t left = bits(mask); left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    values[count] = value[lane];
    indices[count++] = index[lane];
  }
  return count;
#endif
}

#if defined(DDFAST_NEON)
// Lane i of the result is the sum of the lanes of vector(i), i < W.
template <class Vector>
static inline __attribute__((always_inline)) vf lane_sums(const Vector& vector) {
  const auto fold = [](vf a, vf b) { return vpaddq_f32((float32x4_t)a, (float32x4_t)b); };
  return (vf)fold((vf)fold(vector(0), vector(1)), (vf)fold(vector(2), vector(3)));
}
#else
template <int N>
static inline vf fold_lanes(vf a, vf b) {  // lanes with bit N come from b, each added to the lane that differs in bit N
#if defined(__clang__)
  vf own, other;
  for (int l = 0; l < W; ++l) {
    own[l] = l & N ? b[l] : a[l];
    other[l] = l & N ? b[l ^ N] : a[l ^ N];
  }
  return own + other;
#else
  vi own, other;
  for (int l = 0; l < W; ++l) {
    own[l] = l & N ? W + l : l;
    other[l] = l & N ? W + (l ^ N) : l ^ N;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// Lane i of the result is the sum of the lanes of vector(i), i < W; only about log2 W vectors are alive at a time.
template <int N = 1, class Vector>
static inline __attribute__((always_inline)) vf lane_sums(const Vector& vector, int i = 0) {
  if constexpr (N == W)
    return vector(i);
  else
    return fold_lanes<N>(lane_sums<2 * N>(vector, i), lane_sums<2 * N>(vector, i + N));
}
#endif

#if defined(__clang__)
#define DDFAST_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define DDFAST_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (vqi){i, j, k, l})
#endif
typedef float vq __attribute__((vector_size(16)));
typedef float vq_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t vqi __attribute__((vector_size(16)));

// Codes as vectors over codes: packed[j / W][k][j % W] = codebook[index[j]][k] for `count` entries, a multiple of W.
static inline void gather_codes(const float* codebook, const int32_t* index, int64_t count, int64_t d, float* packed) {
  for (int64_t j = 0; j < count; j += 4) {
    const float* c[4];
    for (int i = 0; i < 4; ++i) c[i] = codebook + index[j + i] * d;
    float* out = packed + j / W * W * d + j % W;
    int64_t k = 0;
    for (; k + 4 <= d; k += 4) {  // transposes 4 x 4 in registers
      const vq a0 = *(const vq_unaligned*)(c[0] + k), a1 = *(const vq_unaligned*)(c[1] + k);
      const vq a2 = *(const vq_unaligned*)(c[2] + k), a3 = *(const vq_unaligned*)(c[3] + k);
      const vq b0 = DDFAST_SHUFFLE4(a0, a1, 0, 4, 1, 5), b1 = DDFAST_SHUFFLE4(a0, a1, 2, 6, 3, 7);
      const vq b2 = DDFAST_SHUFFLE4(a2, a3, 0, 4, 1, 5), b3 = DDFAST_SHUFFLE4(a2, a3, 2, 6, 3, 7);
      *(vq_unaligned*)(out + k * W) = DDFAST_SHUFFLE4(b0, b2, 0, 1, 4, 5);
      *(vq_unaligned*)(out + (k + 1) * W) = DDFAST_SHUFFLE4(b0, b2, 2, 3, 6, 7);
      *(vq_unaligned*)(out + (k + 2) * W) = DDFAST_SHUFFLE4(b1, b3, 0, 1, 4, 5);
      *(vq_unaligned*)(out + (k + 3) * W) = DDFAST_SHUFFLE4(b1, b3, 2, 3, 6, 7);
    }
    for (; k < d; ++k)
      for (int i = 0; i < 4; ++i) out[k * W + i] = c[i][k];
  }
}
