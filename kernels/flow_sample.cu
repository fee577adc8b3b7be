// flow_sample and sample_codes: one row of logits -> guidance, temperature, top-k, top-p -> the whole flow -> a code.
//
// Formulas: ddfast/ops/filter_logits.py and ddfast/ops/flow_sample.py, which explain them, and docs/numerics.md (exit
// rule).
//   score_j = log p_j + m_j / sigma^2,  m_j = u.c_j - |c_j|^2 / 2,  w = softmax(score),  D = sum w_j c_j
//   u' = g u + a0 D_i + a1 D_{i-1} + a2 D_{i-2}
//
// One cluster of 1, 2, 4 or 8 blocks of 256 threads, or one block of 128, does a row from beginning to end:
//   1. It finds the thresholds of top-k and top-p (row_filter.h).
//   2. The codes kept are listed, in order. L = ceil(d / 8) lanes share a code, 8 coordinates each; a thread holds its
//      coordinates of 16 codes in registers, centred on the row's mean, from here to the end. What does not fit
//      (more than 4096 / L codes kept per block of 256) is staged in shared memory, and what does not fit there is read
//      from the codebook in every evaluation.
//   3. An evaluation: dot products and weights within the warp, relative to the warp's largest score, a chunk of codes
//      at a time, of which the last ones are passed over where they hold none; one record per warp (largest score,
//      weight, d sums; where the flow may end also the best code and margins) to every block of the cluster; one
//      barrier, for two boards of records take turns; then every warp of every block merges the same records in the
//      same order, so all take the same decisions.
// Blocks of 128 threads, two to a multiprocessor so that one computes while the other waits, need fewer instructions
// for a row that keeps few codes. Where the filter's settings do not tell how many stay, they go first and leave rows
// with more to a second launch.
// Determinism: no floating-point atomics, fixed orders everywhere; how a row is done depends on the problem's kind and
// on how many of its codes stay, not on the number of rows.
// Shared memory: 8 bytes per code of the block's share (or global scratch where that is too much), 32 KiB of
// histograms, two boards of records, staged codes. Device memory: the logits once, the codebook's kept rows once.
// Cost per evaluation and code kept: 2 d fused multiply-adds, one exponential. Codes that no longer matter stay: see
// docs/numerics.md.
// Built with -fmad=false: sums are fused where fmaf says so, guidance and temperature round as in PyTorch.
#include "flow_sample.h"

#include <type_traits>

#include "flow_math.h"
#include "row_filter.h"
#include "simt.h"

namespace ddfast {
namespace {

constexpr int kNarrow = 128;  // threads of the smaller blocks; the others have kWide
constexpr int kHeld = 16;     // codes per thread in registers
constexpr int kDims = 8;      // coordinates per thread
constexpr int kMaxDim = (int)kFlowMaxDim;
constexpr float kMayDecide = 2.f;    // see flow_row
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kFarMargin = 3e38f;  // half norm of padding: its margin is never the largest, and 0 times it is 0

struct Launch {
  FlowArguments a;
  int cluster, staged;  // blocks that share a row; codes that a block can stage in shared memory
  int groups;           // clusters, which take the rows in turn
  uint32_t* lists;      // global memory for the lists; null: they fit in shared memory
  uint32_t* deferred;   // how many rows keep too many codes for a narrow block, and which; null: none may
  bool vector_loads;
};

// The record that a warp leaves for the others; 8 L sums come first. The odd length avoids bank conflicts.
enum Word { kMost, kRest, kTop, kOwn, kLargest, kWordCount };

struct CodeScalars {  // log2 p relative to the row's largest, and |c|^2 / 2 of the centred code
  float log2_p, half_norm;
};

template <int L, int T>
struct Shape {
  static constexpr int kDim = kDims * L;                    // d, padded with zeros
  static constexpr int kWords = kDim + kWordCount;          // of a record
  static constexpr int kGroups = T / L;                     // codes that a block works on at a time
  static constexpr int kInRegisters = kHeld * kGroups;      // codes of a block
  static constexpr int kLaneDims = L == 8 ? 2 : 1;          // of u, in the lanes that update it
  static constexpr int kParts = L == 8 ? 1 : 32 / kDim;     // lanes that share the records' sum for a dimension
  static constexpr int kChunk = L < 4 ? 4 : L;              // codes per thread that are scored or weighed at a time
  static constexpr size_t kStagedBytes = kDim * sizeof(float) + sizeof(CodeScalars);  // of one
};

// At the start of shared memory, so that addresses need no registers. After the thresholds a block's area holds the
// scalars of the codes in registers, by entry, and the staged codes.
struct Layout {
  Control control;
  // Every warp's copy: all registers are taken.
  float u[kMaxWarps][kMaxDim], mean[kMaxWarps][kMaxDim];
  FlowGrid grid[kMaxWarps];
  float slack[kMaxWarps];  // of the exit rule
  int turn[kMaxWarps];     // which of its rows the cluster is at
};

__device__ __forceinline__ Layout& layout() { return *(Layout*)simt::shared_memory(); }

template <int T>
struct FlowBlock : Block<T> {
  const Launch* launch;
};

// Sums v over the lanes that differ in the bits kFrom, kFrom / 2, .., kTo, and shares out the N sums as it goes: with
// every step a lane keeps half of what it has, the upper half if its bit is set, until one is left. Then the sum is
// v[0]. So log2 steps cost N shuffles in all instead of N each.
template <int N, int kFrom, int kTo>
__device__ __forceinline__ void fold(float* v) {
  if constexpr (kFrom >= kTo && kFrom > 0) {
    if constexpr (N > 1) {
      const bool upper = simt::lane() & kFrom;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float sent = upper ? v[i] : v[i + N / 2], own = upper ? v[i + N / 2] : v[i];
        v[i] = own + simt::shuffle_xor(sent, kFrom);
      }
      fold<N / 2, kFrom / 2, kTo>(v);
    } else {
      v[0] += simt::shuffle_xor(v[0], kFrom);
      fold<1, kFrom / 2, kTo>(v);
    }
  }
}

struct alignas(16) Quad {
  float value[4];
};

// This lane's 8 coordinates of entry e of the block's list; zeros beyond d and beyond the list.
template <int T>
__device__ __forceinline__ void load_code(const FlowBlock<T>& b, int count, int e, int first, float (&out)[kDims]) {
  const FlowArguments& a = b.launch->a;
  const int real = e < count ? (int)a.d - first : 0;  // how many of them there are: 0 or less, none
  const float* from = a.codebook + (int64_t)(real > 0 ? code_of(b, (int)b.kept[e]) : 0) * a.d + first;
  if (b.launch->vector_loads) {  // d is a multiple of 8 and the addresses of 16 bytes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad quad = {};
      if (real > 0) quad = ((const Quad*)from)[half];
#pragma unroll
      for (int k = 0; k < 4; ++k) out[4 * half + k] = quad.value[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDims; ++k) out[k] = k < real ? from[k] : 0.f;
  }
}

// Padding weighs nothing and has the least margin.
template <int T>
__device__ __forceinline__ CodeScalars scalars_of(const FlowBlock<T>& b, int count, int e, float log_most, float norm) {
  if (e >= count) return {kNegInf, kFarMargin};
  return {kLog2e * (value_of_key(b.keys[b.kept[e]]) - log_most), norm / 2.f};
}

__device__ __forceinline__ float norm_of(const float (&c)[kDims]) {
  float norm = 0.f;
#pragma unroll
  for (int k = 0; k < kDims; ++k) norm = fmaf(c[k], c[k], norm);
  return norm;
}

template <int L>
__device__ __forceinline__ float sum_over_places(float value) {
#pragma unroll
  for (int stride = L / 2; stride; stride /= 2) value += simt::shuffle_xor(value, stride);
  return value;
}

// Entries kInRegisters + slot of the list, slot < launch.staged, in shared memory: coordinates in two planes, half of a
// lane's share in each, which keeps the loads free of bank conflicts; then the scalars. All of it is written by the
// lane that reads it.
template <int L, int T>
struct Staged {
  Quad* quads;  // [2][capacity][L]
  CodeScalars* scalars;  // [capacity]
  int capacity, place;

  __device__ __forceinline__ explicit Staged(const FlowBlock<T>& b) {
    capacity = b.launch->staged;
    place = simt::lane() % L;
    quads = (Quad*)(b.area + Shape<L, T>::kInRegisters * sizeof(CodeScalars));
    scalars = (CodeScalars*)(quads + 2 * L * capacity);
  }
  __device__ __forceinline__ void load(int slot, float (&out)[kDims]) const {
#pragma unroll
    for (int k = 0; k < kDims; ++k) out[k] = quads[(k / 4 * capacity + slot) * L + place].value[k % 4];
  }
  __device__ __forceinline__ void store(int slot, const float (&from)[kDims]) const {
#pragma unroll
    for (int k = 0; k < kDims; ++k) quads[(k / 4 * capacity + slot) * L + place].value[k % 4] = from[k];
  }
};

// Entries first + n kGroups, n < kHeld: this thread's coordinates.
struct Held {
  float code[kHeld][kDims];
};

// The weighted sums of one warp so far, relative to its largest score.
struct Partial {
  float most;           // score of the warp
  float score, margin;  // this lane's best
  int entry;            //   and which it is
  float largest;        // this lane's largest margin
  float total;          // weights of the codes this lane answers for
  float sums[kDims];    // of the codes of this lane's group
};

// A chunk is kChunk codes per group of lanes, entries first + n kGroups, of which the lane answers for n = place
// kChunk / L + i, i < kChunk / L.
template <int L, int T>
struct CodeChunk {
  using S = Shape<L, T>;
  static constexpr int kMine = S::kChunk / L;

  static __device__ __forceinline__ int entry(int first, int i) {
    return first + (simt::lane() % L * kMine + i) * S::kGroups;
  }

  // Scores, and the lane's best; for the exit rule also which one it is, its margin and the largest.
  template <class Codes, class Scalars>
  static __device__ __forceinline__ void score(Partial& w, const Codes& codes, const Scalars& scalars, int first,
                                               const float (&u)[kDims], float steepness, bool deciding, float* score) {
    float dot[S::kChunk];
#pragma unroll
    for (int n = 0; n < S::kChunk; ++n) {
      float c[kDims];
      codes(n, c);
      dot[n] = 0.f;
#pragma unroll
      for (int k = 0; k < kDims; ++k) dot[n] = fmaf(u[k], c[k], dot[n]);
    }
    fold<S::kChunk, L / 2, 1>(dot);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const CodeScalars own = scalars(i);
      dot[i] -= own.half_norm;
      score[i] = fmaf(dot[i], steepness, own.log2_p);
    }
    if (deciding) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        w.largest = dot[i] > w.largest ? dot[i] : w.largest;
        if (score[i] > w.score) {
          w.score = score[i];
          w.margin = dot[i];
          w.entry = entry(first, i);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMine; ++i) w.score = score[i] > w.score ? score[i] : w.score;
    }
  }

  // Adds the codes' weights, of scores that are at most w.most.
  template <class Codes>
  static __device__ __forceinline__ void weigh(Partial& w, const Codes& codes, const float* score) {
    const float shift = w.most == kNegInf ? 0.f : w.most;
    float weight[kMine], all[S::kChunk];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      weight[i] = simt::fast_exp2(score[i] - shift);
      w.total += weight[i];
    }
#pragma unroll
    for (int n = 0; n < S::kChunk; ++n)
      all[n] = L == 1 ? weight[n % kMine] : simt::shuffle_within<L>(weight[n % kMine], n / kMine);
#pragma unroll
    for (int n = 0; n < S::kChunk; ++n) {
      float c[kDims];
      codes(n, c);
#pragma unroll
      for (int k = 0; k < kDims; ++k) w.sums[k] = fmaf(all[n], c[k], w.sums[k]);
    }
  }
};

__device__ __forceinline__ float warp_max(float value) { return value_of_key(simt::reduce_max(key_of(value))); }

// Makes the warp's largest score the one that weights are relative to, if it has grown.
__device__ __forceinline__ void rescale(Partial& w) {
  const float most = warp_max(w.score);
  if (!(most > w.most)) return;
  const float fade = simt::fast_exp2(w.most - most);
  w.most = most;
  w.total *= fade;
#pragma unroll
  for (int k = 0; k < kDims; ++k) w.sums[k] *= fade;
}

struct Evaluation {
  float rest;     // weight of the other codes relative to the one of the largest score
  uint32_t top;   // that code, the lowest of several; it and what follows only if asked for
  float margin;   // m of that code
  float largest;  // max_j m_j
};

// What stays the same over a row's evaluations.
struct Flow {
  int count;       // codes kept in this block
  int in_cluster;  // and in all blocks of the cluster
  float log_most;  // the largest logit
};

// D at u, in the lanes that update it; everything relative to the mean in the layout. deciding: whether the code of the
// largest score is asked for, and what tells if it can still change.
template <int L, int T>
__device__ Evaluation evaluate(FlowBlock<T>& b, const Flow& flow, const Held& held,
                               const float (&position)[Shape<L, T>::kLaneDims], float steepness, bool deciding,
                               float (&mean)[Shape<L, T>::kLaneDims]) {
  using S = Shape<L, T>;
  using C = CodeChunk<L, T>;
  constexpr int N = S::kChunk;
  const int lane = simt::lane(), group = simt::thread() / L, place = lane % L;

  float u[kDims];
  float* mine = layout().u[simt::warp()];
#pragma unroll
  for (int i = 0; i < S::kLaneDims; ++i)
    if (lane < S::kDim) mine[lane + 32 * i] = position[i];
  simt::warp_barrier();
#pragma unroll
  for (int k = 0; k < kDims; ++k) u[k] = mine[place * kDims + k];

  Partial w = {kNegInf, kNegInf, 0.f, 0x7fffffff, kNegInf, 0.f, {}};
  {  // The codes in registers: chunks that hold none, the last ones, are passed over by the whole block.
    float score[kHeld / L];
    const auto in_registers = [&](int chunk) {
      return [&held, chunk](int n, float (&c)[kDims]) {
#pragma unroll
        for (int k = 0; k < kDims; ++k) c[k] = held.code[chunk * N + n][k];
      };
    };
#pragma unroll
    for (int chunk = 0; chunk < kHeld / N; ++chunk) {
      const int first = chunk * N * S::kGroups;
      if (first >= flow.count) continue;
      const auto scalars = [&](int i) { return ((const CodeScalars*)b.area)[C::entry(first + group, i)]; };
      float* mine_of_chunk = score + chunk * C::kMine;
      C::score(w, in_registers(chunk), scalars, first + group, u, steepness, deciding, mine_of_chunk);
    }
    w.most = warp_max(w.score);
#pragma unroll
    for (int chunk = 0; chunk < kHeld / N; ++chunk)
      if (chunk * N * S::kGroups < flow.count) C::weigh(w, in_registers(chunk), score + chunk * C::kMine);
  }

  const Staged<L, T> staged(b);
  int first = S::kInRegisters;
  for (; first < flow.count && first < S::kInRegisters + staged.capacity; first += N * S::kGroups) {
    const int slot = first - S::kInRegisters + group;
    const auto load = [&](int n, float (&c)[kDims]) { staged.load(slot + n * S::kGroups, c); };
    const auto scalars = [&](int i) { return staged.scalars[C::entry(slot, i)]; };
    float score[C::kMine];
    C::score(w, load, scalars, first + group, u, steepness, deciding, score);
    rescale(w);
    if (L == 8) simt::warp_barrier();  // Read them anew: there is no room to keep as many.
    C::weigh(w, load, score);
  }
  for (; first < flow.count; first += N * S::kGroups) {
    float norm[N];
    const auto load = [&](int n, float (&c)[kDims]) {
      if (L == 8 && n % 4 == 0) simt::warp_barrier();  // no more at a time: there is no room
      load_code(b, flow.count, first + group + n * S::kGroups, place * kDims, c);
#pragma unroll
      for (int k = 0; k < kDims; ++k) c[k] -= layout().mean[simt::warp()][place * kDims + k];
    };
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float c[kDims];
      load(n, c);
      norm[n] = norm_of(c);
    }
    fold<N, L / 2, 1>(norm);
    const auto scalars = [&](int i) {
      return scalars_of(b, flow.count, C::entry(first + group, i), flow.log_most, norm[i]);
    };
    float score[C::kMine];
    C::score(w, load, scalars, first + group, u, steepness, deciding, score);
    rescale(w);
    C::weigh(w, load, score);
  }

  // This warp's record: a scalar in each of the first lanes, and the sums.
  uint32_t top = kNone;
  float own = 0.f, largest = 0.f, rest = w.total;
  if (deciding) {
    const uint32_t best = simt::reduce_min(w.score == w.most ? (uint32_t)w.entry : kNone);
    const bool some = w.most > kNegInf, owner = some && w.score == w.most && (uint32_t)w.entry == best;
    top = some ? code_of(b, (int)b.kept[best]) : kNone;
    rest -= owner ? 1.f : 0.f;
    own = simt::shuffle(w.margin, simt::lowest_bit(simt::ballot(owner) | 0x80000000u));
    largest = warp_max(w.largest);
  }
  rest = warp_sum(rest);  // otherwise the weight of all
  const float scalar = lane == kMost ? w.most : lane == kRest ? rest : lane == kOwn ? own : largest;
  if (lane < (deciding ? kWordCount : kTop)) post(b, S::kDim + lane, lane == kTop ? top : simt::float_bits(scalar));
  // fold leaves the sums of coordinate `place * 8 + the lane's upper bits`; the lanes below 4 hold copies if L < 4.
  fold<kDims, 16, L>(w.sums);
  const int upper = (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (L <= 4 && (lane & 4) ? 1 : 0);
  if (L >= 4 || lane % 4 < L)
#pragma unroll
    for (int i = 0; i < S::kLaneDims; ++i) post(b, place * kDims + upper + i, simt::float_bits(w.sums[i]));

  // The same merge in every warp, a record per lane; there are 4 to 64 of them, a multiple of 4.
  const uint32_t* records = collect(b);
  const int count = b.cluster * b.kWarps;
  uint32_t most_key = 0, largest_key = 0, lowest = kNone;
#pragma unroll 1
  for (int r = lane; r < count; r += 32) {
    const uint32_t* record = records + r * S::kWords + S::kDim;
    const uint32_t key = key_of(simt::bits_float(record[kMost]));
    if (deciding) {
      const uint32_t margin = key_of(simt::bits_float(record[kLargest]));
      if (key > most_key || (key == most_key && record[kTop] < lowest)) lowest = record[kTop];
      largest_key = margin > largest_key ? margin : largest_key;
    }
    most_key = key > most_key ? key : most_key;
  }
  const uint32_t all_most = simt::reduce_max(most_key);
  const float most_score = value_of_key(all_most);
  Evaluation e = {0.f, kNone, 0.f, 0.f};
  if (deciding) {
    e.top = simt::reduce_min(most_key == all_most ? lowest : kNone);
    e.largest = value_of_key(simt::reduce_max(largest_key));
  }
  const int part = lane / S::kDim, dim = lane % S::kDim;  // for L = 8: part 0, dimensions lane and lane + 32
  float rest_of_lane = 0.f, margin = 0.f, sum[S::kLaneDims] = {};
  bool has_top = false;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += 32) {
    float factor = 0.f;
    if (begin + lane < count) {
      const uint32_t* record = records + (begin + lane) * S::kWords + S::kDim;
      factor = simt::fast_exp2(simt::bits_float(record[kMost]) - most_score);
      const bool is_top = deciding && record[kTop] == e.top;
      rest_of_lane += factor * (simt::bits_float(record[kRest]) + (deciding && !is_top ? 1.f : 0.f));
      margin = is_top ? simt::bits_float(record[kOwn]) : margin;
      has_top |= is_top;
    }
    const int here = count - begin < 32 ? count - begin : 32;
#pragma unroll 1
    for (int r = 0; r < here; r += 4)
#pragma unroll
      for (int j = 0; j < 4; j += S::kParts) {
        const float* of_record = (const float*)records + (begin + r + j + part) * S::kWords;
        const float scale = simt::shuffle(factor, r + j + part);
#pragma unroll
        for (int i = 0; i < S::kLaneDims; ++i) sum[i] = fmaf(scale, of_record[dim + 32 * i], sum[i]);
      }
  }
  const float weight = warp_sum(rest_of_lane), total = deciding ? 1.f + weight : weight;
  e.rest = deciding ? weight : weight - 1.f;
  if (deciding) e.margin = simt::shuffle(margin, simt::lowest_bit(simt::ballot(has_top) | 0x80000000u));
#pragma unroll
  for (int stride = 16; stride >= S::kDim; stride /= 2) sum[0] += simt::shuffle_xor(sum[0], stride);
#pragma unroll
  for (int i = 0; i < S::kLaneDims; ++i) mean[i] = sum[i] / total;
  return e;
}

// Reads the codes kept, as they are in the codebook: the origin is 0.
template <int L, int T>
__device__ __forceinline__ void hold_codes(const FlowBlock<T>& b, const Flow& flow, Held& held) {
  using S = Shape<L, T>;
  constexpr int N = S::kChunk;
  const int lane = simt::lane(), place = lane % L, group = simt::thread() / L;
#pragma unroll
  for (int i = 0; i < S::kLaneDims; ++i)
    if (lane < S::kDim) layout().mean[simt::warp()][lane + 32 * i] = 0.f;
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int e = n * S::kGroups + group;
    if (n / N * N * S::kGroups >= flow.count) continue;
    load_code(b, flow.count, e, place * kDims, held.code[n]);
    if (n % N / (N / L) == place) ((CodeScalars*)b.area)[e] = scalars_of(b, flow.count, e, flow.log_most, 0.f);
  }
  const Staged<L, T> staged(b);
  for (int slot = group; S::kInRegisters + slot - group < flow.count && slot < staged.capacity; slot += N * S::kGroups)
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      const int at = slot + n * S::kGroups, e = S::kInRegisters + at;
      float c[kDims];
      load_code(b, flow.count, e, place * kDims, c);
      staged.store(at, c);
      if (n / (N / L) == place) staged.scalars[at] = scalars_of(b, flow.count, e, flow.log_most, 0.f);
    }
  simt::warp_barrier();  // the origin
}

// Moves the origin to the mean [kLaneDims].
template <int L, int T>
__device__ __forceinline__ void centre_codes(const FlowBlock<T>& b, const Flow& flow,
                                             const float (&mean)[Shape<L, T>::kLaneDims], Held& held) {
  using S = Shape<L, T>;
  constexpr int N = S::kChunk;
  const int lane = simt::lane(), place = lane % L, group = simt::thread() / L;
  simt::warp_barrier();
#pragma unroll
  for (int i = 0; i < S::kLaneDims; ++i)
    if (lane < S::kDim) layout().mean[simt::warp()][lane + 32 * i] = mean[i];
  simt::warp_barrier();
  float origin[kDims];
#pragma unroll
  for (int k = 0; k < kDims; ++k) origin[k] = layout().mean[simt::warp()][place * kDims + k];
  const auto centre = [&](float (&c)[kDims], bool owner, CodeScalars* scalars) {  // of padding the margin stays
#pragma unroll
    for (int k = 0; k < kDims; ++k) c[k] -= origin[k];
    const float norm = sum_over_places<L>(norm_of(c));
    if (owner && scalars->half_norm < kFarMargin) scalars->half_norm = norm / 2.f;
  };
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int e = n * S::kGroups + group;
    if (n / N * N * S::kGroups >= flow.count) continue;
    centre(held.code[n], n % N / (N / L) == place, (CodeScalars*)b.area + e);
  }
  const Staged<L, T> staged(b);
  for (int slot = group; S::kInRegisters + slot - group < flow.count && slot < staged.capacity; slot += N * S::kGroups)
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      const int at = slot + n * S::kGroups;
      float c[kDims];
      staged.load(at, c);
      centre(c, n / (N / L) == place, staged.scalars + at);
      staged.store(at, c);
    }
}

// sum_j p_j |c_j|^2 / 2 over the cluster, p relative to its largest, of centred codes.
template <int L, int T>
__device__ float half_variance(FlowBlock<T>& b, const Flow& flow) {
  using S = Shape<L, T>;
  constexpr int N = S::kChunk;
  const int place = simt::lane() % L, group = simt::thread() / L;
  float sum = 0.f;
  const auto add = [&](const CodeScalars& own) {
    if (own.log2_p > kNegInf) sum = fmaf(simt::fast_exp2(own.log2_p), own.half_norm, sum);
  };
#pragma unroll 1
  for (int chunk = 0; chunk < kHeld / N; ++chunk)
#pragma unroll
    for (int i = 0; i < N / L && chunk * N * S::kGroups < flow.count; ++i)
      add(((const CodeScalars*)b.area)[CodeChunk<L, T>::entry(chunk * N * S::kGroups + group, i)]);
  const Staged<L, T> staged(b);
  int first = S::kInRegisters;
  for (; first < flow.count && first < S::kInRegisters + staged.capacity; first += N * S::kGroups)
#pragma unroll
    for (int i = 0; i < N / L; ++i)
      add(staged.scalars[CodeChunk<L, T>::entry(first - S::kInRegisters + group, i)]);
#pragma unroll 1
  for (int e = first + group; e < flow.count; e += S::kGroups) {
    float c[kDims];
    load_code(b, flow.count, e, place * kDims, c);
#pragma unroll
    for (int k = 0; k < kDims; ++k) c[k] -= layout().mean[simt::warp()][place * kDims + k];
    add(scalars_of(b, flow.count, e, flow.log_most, norm_of(c)));  // the lane's share of the norm
  }
  sum = warp_sum(sum);
  if (simt::lane() == 0) post(b, 0, simt::float_bits(sum));
  const uint32_t* records = collect(b);
  float all = 0.f;
  for (int r = 0; r < b.cluster * b.kWarps; ++r) all += simt::bits_float(records[r * b.words]);
  return all;
}

// The flow of the codes kept; all threads of the cluster return the same code.
template <int L, int T>
__device__ uint32_t flow_row(FlowBlock<T>& b, Flow& flow, int32_t* evaluations) {
  using S = Shape<L, T>;
  constexpr int K = S::kLaneDims;
  const FlowArguments& a = b.launch->a;
  const int dim = simt::lane() % S::kDim;
  FlowGrid& grid = layout().grid[simt::warp()];
  Held held;
  float u[K] = {};                                 // the token
  float d[K], d0[K] = {}, d1[K] = {}, d2[K] = {};  // D where it was asked for, at this step, and before it
  *evaluations = 0;

  // One loop with one evaluation in its body: inlined several times it would not fit the instruction cache. Step -1: D
  // at u = 0 and infinite sigma is the mean, on which the codes are then centred. predicting: Heun's second evaluation.
  bool predicting = false, soon = false;
  hold_codes<L>(b, flow, held);
  for (int step = -1;;) {
    float steepness = 0.f;  // log2 e / sigma^2
    if (step >= 0) {
      const float grown = expf(-grid.h * (float)(step + predicting));
      const float sigma = step == a.steps ? a.sigma_min : grid.sigma_max * grown;
      steepness = kLog2e / (sigma * sigma);
    }
    // Which code it is matters at the end, where there is no spread, and where the exit rule may hold, which needs a
    // small rest: not yet when it was large one evaluation before. (Of 300 tokens at the papers' shapes and 20 steps,
    // none had a rest above 1 then.) An exit missed so comes one evaluation later.
    const bool may_exit = a.early_exit && step > 0 && !predicting && soon;
    float at[K];
#pragma unroll
    for (int i = 0; i < K; ++i) at[i] = predicting ? fmaf(grid.g, u[i], (1.f - grid.g) * d0[i]) : u[i];
    const Evaluation e = evaluate<L>(b, flow, held, at, steepness, may_exit || step < 0 || step == a.steps, d);
    soon = e.rest < kMayDecide;
    if (step < 0) {
      centre_codes<L>(b, flow, d, held);
      const float variance = 2.f * half_variance<L>(b, flow) / ((1.f + e.rest) * (float)a.d);
      if (!(variance > 0.f)) return e.top;  // without spread there is no flow: the likeliest code
      const FlowGrid made = flow_grid(sqrtf(variance), a.sigma_min, a.steps, a.solver);
      if (simt::lane() == 0) {
        grid = made;
        // For the rounding of one lane's own sum; like all that decides, the same in every block.
        layout().slack[simt::warp()] = 1e-6f * (float)(2 + flow.in_cluster / S::kInRegisters);
      }
      simt::warp_barrier();
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const int k = dim + 32 * i;
        u[i] = k < (int)a.d ? grid.sigma_max * a.noise[b.row * a.d + k] : 0.f;
      }
      step = 0;
      continue;
    }
    bool ended = step == a.steps;
    if (may_exit && e.rest < 1.f) {
      const float nearest = a.geometry[e.top], diameter = a.geometry[a.filter.V];
      ended |= flow_is_decided(e.rest, nearest, diameter, 2.f * (e.margin - e.largest), layout().slack[simt::warp()]);
    }
    if (ended) {
      *evaluations = (a.solver == kSolverHeun ? 2 * step : step) + 1;
      return e.top;
    }
    if (!predicting) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
        d0[i] = d[i];
        if (step > 0) continue;
        // The step from sigma = infinity, where D is the mean (here 0), and the history that goes with it.
        u[i] += .5f * d[i];
        d1[i] = grid.g * d[i];
        d2[i] = grid.g * d1[i];
      }
      if (a.solver == kSolverHeun) {
        predicting = true;
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float before = predicting ? d[i] : d1[i];
      u[i] = fmaf(grid.g, u[i], fmaf(grid.a0, d0[i], fmaf(grid.a1, before, grid.a2 * d2[i])));
      d2[i] = d1[i];
      d1[i] = d0[i];
    }
    predicting = false;
    ++step;
  }
}

template <int L, int T>
__global__ void __launch_bounds__(T, kWide / T) flow_kernel(const __grid_constant__ Launch launch) {  // hot
  const FlowArguments& a = launch.a;
  FlowBlock<T> b;
  b.launch = &launch;
  const int cluster = T == kNarrow ? 1 : launch.cluster;  // known to the compiler where it can be
  open_block(b, a.filter, cluster, sizeof(Layout), Shape<L, T>::kWords, 2, launch.lists);
  const bool of_deferred = T == kWide && launch.deferred;
  int& turn = layout().turn[simt::warp()];
  if (simt::lane() == 0) turn = simt::block() / b.cluster;
  simt::warp_barrier();
  const auto row_at = [&](int i) { return of_deferred ? (int)launch.deferred[1 + i] : i; };
  while (turn < (of_deferred ? (int)launch.deferred[0] : (int)a.filter.rows)) {
    b.row = row_at(turn);
    simt::forget(b.positions);  // the bounds of the row's loops need no registers during the flow
    const Statistics row = load_row(b);
    bool noise_is_finite = true;
    for (int k = 0; k < (int)a.d; ++k) {
      const float eps = a.noise[b.row * a.d + k];
      noise_is_finite &= eps - eps == 0.f;
    }
    int64_t code = -1;
    int32_t evaluations = 0;  // -1: left to the second launch
    if (!row.bad && noise_is_finite) {
      Flow flow;
      const Threshold threshold = find_threshold(b, row);
      flow.count = list_kept(b, threshold, &flow.in_cluster);
      flow.log_most = value_of_key(row.most);
      if (T == kNarrow && launch.deferred && flow.count > Shape<L, T>::kInRegisters + launch.staged)
        evaluations = -1;
      else
        code = flow_row<L>(b, flow, &evaluations);
    }
    if (b.rank == 0 && simt::thread() == 0) {
      b.row = row_at(turn);  // again, rather than a register for it
      if (evaluations < 0) {
        launch.deferred[1 + simt::count_up(launch.deferred)] = (uint32_t)b.row;
      } else {
        a.codes[b.row] = code == (int64_t)kNone ? -1 : code;  // noise so large that no score is a number
        if (a.evaluations) a.evaluations[b.row] = evaluations;
      }
    }
    if (T == kNarrow) return;  // such a block has one row, which saves the registers that a loop would keep
    simt::block_barrier();     // the lists are free for the next row
    if (simt::lane() == 0) turn += launch.groups;
    simt::warp_barrier();
  }
}

int lanes_per_code(int64_t d) { return d <= 8 ? 1 : d <= 16 ? 2 : d <= 32 ? 4 : 8; }

int64_t most_kept(int64_t V, int64_t top_k) { return top_k > 0 && top_k < V ? top_k : V; }  // but for ties

// The memory of blocks of T threads.
struct Memory {
  bool lists_fit, possible;
  int staged;     // codes
  size_t shared;  // bytes
};

template <int L, int T>
Memory memory_of(const simt::Device& device, int64_t V, int64_t top_k, int cluster) {
  using S = Shape<L, T>;
  constexpr int64_t kCodes = S::kChunk * S::kGroups;
  constexpr size_t kScalars = S::kInRegisters * sizeof(CodeScalars);
  const size_t half = (size_t)device.shared_per_multiprocessor / 2 - 1024, all = (size_t)device.shared_bytes;
  const size_t limit = T == kNarrow && half < all ? half : all;
  const size_t lists = (size_t)(2 * share(V, cluster)) * sizeof(uint32_t);
  size_t fixed = sizeof(Layout) + 2 * (size_t)cluster * (T / 32) * S::kWords * sizeof(uint32_t);
  const size_t least = kHistogramBytes > kScalars ? kHistogramBytes : kScalars;
  Memory m = {fixed + lists + least <= limit, fixed + least <= limit, 0, 0};
  if (!m.possible) return m;
  if (m.lists_fit) fixed += lists;
  const int64_t most = most_kept(V, top_k), in_block = most < share(V, cluster) ? most : share(V, cluster);
  const int64_t wanted = in_block > S::kInRegisters ? (in_block - S::kInRegisters + kCodes - 1) / kCodes * kCodes : 0;
  const int64_t room = (int64_t)((limit - fixed - kScalars) / S::kStagedBytes) / kCodes * kCodes;
  m.staged = (int)(wanted < room ? wanted : room);
  const size_t used = kScalars + (size_t)m.staged * S::kStagedBytes;
  m.shared = fixed + (used > kHistogramBytes ? used : kHistogramBytes);
  return m;
}

int choose_cluster(const simt::Device& device, int64_t V, int64_t d, int64_t top_k) {
  const int64_t held = kHeld * kWide / lanes_per_code(d);
  int cluster = 1;
  if (device.clusters)
    while (cluster < kMaxCluster && (most_kept(V, top_k) > held * cluster || V > 8192 * cluster)) cluster *= 2;
  return cluster;
}

// Which launches a problem takes, and with what.
struct Plan {
  bool narrow, wide;
  int cluster, groups;  // of the wide one
  Memory narrow_memory, wide_memory;
  int64_t deferred_bytes, list_bytes;
};

template <int L>
Plan plan_of(const simt::Device& device, int64_t rows, int64_t V, int64_t d, int64_t top_k, double top_p, int cluster) {
  Plan plan = {false, true, cluster ? cluster : choose_cluster(device, V, d, top_k), (int)rows, {}, {}, 0, 0};
  if (cluster == 0) {
    plan.narrow_memory = memory_of<L, kNarrow>(device, V, top_k, 1);
    const int64_t capacity = Shape<L, kNarrow>::kInRegisters + plan.narrow_memory.staged, most = most_kept(V, top_k);
    const bool known = most < V && !(top_p < 1.);  // how many codes every row keeps
    plan.narrow = plan.narrow_memory.lists_fit && (most <= capacity || !known);
    plan.wide = !(plan.narrow && most <= capacity);
  }
  plan.wide_memory = memory_of<L, kWide>(device, V, top_k, plan.cluster);
  const bool lists_fit = plan.wide_memory.lists_fit;
  // A block has a multiprocessor to itself. After narrow blocks there may be no rows to do.
  if (plan.narrow || !lists_fit) plan.groups = (int)groups_in_flight(device, rows, 1, plan.cluster);
  if (plan.narrow && plan.wide) plan.deferred_bytes = (rows + 4) / 4 * 16;  // a count and the rows, 4 bytes each
  if (plan.wide && !lists_fit)
    plan.list_bytes = (int64_t)plan.groups * plan.cluster * 2 * share(V, plan.cluster) * (int64_t)sizeof(uint32_t);
  return plan;
}

template <int L>
cudaError_t launch_flow(const simt::Device& device, const FlowArguments& a, int cluster, cudaStream_t stream) {
  const Plan plan = plan_of<L>(device, a.filter.rows, a.filter.V, a.d, a.filter.top_k, a.filter.top_p, cluster);
  if ((plan.wide && !plan.wide_memory.possible) || (plan.deferred_bytes + plan.list_bytes > 0 && !a.scratch))
    return cudaErrorInvalidValue;
  const int rows = (int)a.filter.rows;
  Launch launch{a, 1, plan.narrow_memory.staged, rows, nullptr, nullptr,
                a.d % kDims == 0 && (uintptr_t)a.codebook % 16 == 0};
  if (plan.deferred_bytes) launch.deferred = (uint32_t*)a.scratch;
  if (plan.narrow) {
    cudaError_t status = plan.wide ? simt::clear(launch.deferred, sizeof(uint32_t), stream) : cudaSuccess;
    if (!status)
      status = simt::launch(flow_kernel<L, kNarrow>, rows, kNarrow, plan.narrow_memory.shared, 1, stream, launch);
    if (status || !plan.wide) return status;
  }
  launch.cluster = plan.cluster;
  launch.groups = plan.groups;
  launch.staged = plan.wide_memory.staged;
  if (plan.list_bytes) launch.lists = (uint32_t*)((unsigned char*)a.scratch + plan.deferred_bytes);
  return simt::launch(flow_kernel<L, kWide>, launch.groups * plan.cluster, kWide, plan.wide_memory.shared,
                      plan.cluster, stream, launch);
}

// Calls `run` with the number of lanes per code as a constant.
template <class Run>
auto with_lanes(int64_t d, const Run& run) {
  switch (lanes_per_code(d)) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return run(std::integral_constant<int, 8>());
  }
}

}  // namespace

cudaError_t flow_scratch_bytes(int64_t rows, int64_t V, int64_t d, int64_t top_k, double top_p, int cluster,
                               int64_t* bytes) {
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  const Plan plan = with_lanes(d, [&](auto lanes) {
    return plan_of<decltype(lanes)::value>(device, rows, V, d, top_k, top_p, cluster);
  });
  *bytes = plan.deferred_bytes + plan.list_bytes;
  return cudaSuccess;
}

cudaError_t flow_sample_cuda(const FlowArguments& a, int cluster, cudaStream_t stream) {
  if (a.filter.rows == 0) return cudaSuccess;
  simt::Device device;
  const cudaError_t status = simt::device(&device);
  if (status) return status;
  if ((cluster != 0 && !simt::is_cluster_size(cluster)) || a.d < 1 || a.d > kFlowMaxDim || a.filter.V < 1 ||
      a.filter.V > (int64_t)1 << 23 || a.steps < 1 || a.filter.rows > (int64_t)1 << 27)
    return cudaErrorInvalidValue;
  return with_lanes(a.d, [&](auto lanes) {
    return launch_flow<decltype(lanes)::value>(device, a, cluster, stream);
  });
}

}  // namespace ddfast
