// One row of logits in the hands of a cluster of blocks, and which of its codes guidance, temperature, top-k and top-p
// leave: what filter_logits.cu and flow_sample.cu share.
//
//   1. Every block reads its share of the logits (granules of 32 codes, dealt to the blocks in turn) and keeps them as
//      order-preserving integers.
//   2. Thresholds without sorting: radix selection, 11 bits a pass, on a histogram of counts (top-k), of fixed-point
//      probability mass (top-p: integer sums do not depend on their order), or of indices (ties at top-p's edge).
// Warps tell each other what they found by records: a warp posts words to every block of the cluster, and after one
// barrier all warps read the same records in the same order, so all take the same decisions.
// Formulas: ddfast/ops/filter_logits.py. To be built with -fmad=false: guidance and temperature round as in PyTorch.
#pragma once

#include <cmath>
#include <cstdint>

#include "filter_logits.h"
#include "flow_math.h"
#include "logits.h"
#include "simt.h"

namespace ddfast {
namespace {

constexpr int kWide = 256;  // threads of a block, at most
constexpr int kMaxWarps = kWide / 32;
constexpr int kGranule = 32;
constexpr int kDigit = 11, kBins = 1 << kDigit;
constexpr size_t kHistogramBytes = 2 * kBins * sizeof(uint64_t);
constexpr int kMaxCluster = 8;
constexpr uint32_t kNone = 0xffffffffu;

// Clusters that take the rows in turn where more would only wait for a place (and for scratch, where their lists are in
// global memory): as many as a device holds that has `per_multiprocessor` blocks on each multiprocessor.
inline int64_t groups_in_flight(const simt::Device& device, int64_t rows, int per_multiprocessor, int cluster) {
  const int64_t places = (int64_t)device.multiprocessors * per_multiprocessor / cluster;
  return rows < places ? rows : places > 1 ? places : 1;
}

DDFAST_MATH int64_t share(int64_t V, int cluster) {  // codes per block, at most
  const int64_t granules = (V + kGranule - 1) / kGranule;
  return (granules + cluster - 1) / cluster * kGranule;
}

// A block's scalars, at the start of its shared memory.
struct alignas(16) Control {
  uint64_t warp_mass[kMaxWarps];
  uint64_t above, at;  // of the digit found by select
  uint32_t digit;
};

// What a block of T threads knows of its row. Shared memory: what the kernel has at constant addresses, Control first;
// two boards of records; the lists, if they fit; and the area.
template <int T>
struct Block {
  static constexpr int kWarps = T / 32;
  const FilterArguments* filter;
  uint32_t* boards;       // [2][cluster][kWarps][words]
  uint32_t *keys, *kept;  // lists [share], in shared or in global memory; some kernels have no second one
  unsigned char* area;    // two histograms [2][kBins] of uint64_t while thresholds are sought; free after that
  int row;  // at most 2^27
  int rank, cluster, positions, words;
  int histogram_turn, board_turn;
};

// first: bytes at constant addresses; words: of a record; lists: how many; in_scratch: where they are in global memory,
// or null. After it every block of the cluster has started, so others may write to its shared memory.
template <int T>
__device__ __forceinline__ void open_block(Block<T>& b, const FilterArguments& filter, int cluster, size_t first,
                                           int words, int lists, uint32_t* in_scratch) {
  b.filter = &filter;
  b.cluster = cluster;
  b.rank = simt::cluster_rank(cluster);
  b.words = words;
  b.board_turn = 0;
  b.positions = (int)share(filter.V, cluster);
  b.boards = (uint32_t*)(simt::shared_memory() + first);
  uint32_t* after = b.boards + 2 * cluster * b.kWarps * words;
  b.keys = in_scratch ? in_scratch + (int64_t)simt::block() * lists * b.positions : after;
  b.kept = b.keys + b.positions;
  b.area = (unsigned char*)(in_scratch ? after : after + lists * b.positions);
  simt::cluster_barrier(cluster);
}

template <int T>
DDFAST_MATH uint32_t code_of(const Block<T>& b, int position) {
  const uint32_t p = (uint32_t)position;
  return (p / kGranule * (uint32_t)b.cluster + (uint32_t)b.rank) * kGranule + p % kGranule;
}

// ---- records ------------------------------------------------------------------------------------------------------

template <int T>
__device__ __forceinline__ uint32_t* board_of(const Block<T>& b) {
  return b.boards + b.board_turn * b.cluster * b.kWarps * b.words;
}

// Puts a word of this warp's record where every block of the cluster will find it.
template <int T>
__device__ __forceinline__ void post(const Block<T>& b, int word, uint32_t value) {
  uint32_t* at = board_of(b) + (b.rank * b.kWarps + simt::warp()) * b.words + word;
#pragma unroll 1
  for (int rank = 0; rank < b.cluster; ++rank) *simt::of_rank(at, rank, b.cluster) = value;
}

// After it every record is there. Two boards take turns, so one barrier per exchange is enough: whoever posts to a
// board again has passed the other board's barrier, which all reach after reading this one.
template <int T>
__device__ __forceinline__ const uint32_t* collect(Block<T>& b) {
  const uint32_t* records = board_of(b);
  b.board_turn ^= 1;
  simt::cluster_barrier(b.cluster);
  return records;
}

// Sum of a number per warp over all warps of the cluster.
template <int T>
__device__ uint64_t sum_over_warps(Block<T>& b, uint64_t value) {
  if (simt::lane() == 0) {
    post(b, 0, (uint32_t)value);
    post(b, 1, (uint32_t)(value >> 32));
  }
  const uint32_t* records = collect(b);
  uint64_t sum = 0;
  for (int r = 0; r < b.cluster * b.kWarps; ++r)
    sum += (uint64_t)records[r * b.words] | (uint64_t)records[r * b.words + 1] << 32;
  return sum;
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int stride = 16; stride; stride /= 2) {
    const uint32_t low = simt::shuffle_xor((uint32_t)value, stride);
    const uint32_t high = simt::shuffle_xor((uint32_t)(value >> 32), stride);
    value += (uint64_t)low | (uint64_t)high << 32;
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int stride = 16; stride; stride /= 2) value += simt::shuffle_xor(value, stride);
  return value;
}

// ---- the filter ---------------------------------------------------------------------------------------------------

struct Statistics {
  uint32_t most;    // key of the largest value
  uint32_t finite;  // how many are above -inf
  bool bad;
};

// Keys of the guided, tempered row, and clear histograms; its exchange makes both visible to all threads.
template <int T>
__device__ Statistics load_row(Block<T>& b) {
  const FilterArguments& a = *b.filter;
  b.histogram_turn = 0;
  for (int i = simt::thread(); i < 2 * kBins; i += T) ((uint64_t*)b.area)[i] = 0;
  const int64_t at = b.row * a.stride, uncond_at = b.row * a.uncond_stride;
  const float scale = a.uncond ? a.cfg_scale[b.row] : 1.f;
  uint32_t most = 0, finite = 0, bad = 0;
#pragma unroll 4
  for (int p = simt::thread(); p < b.positions; p += T) {
    const uint32_t j = code_of(b, p);
    uint32_t key = 0;
    if (j < (uint32_t)a.V) {
      float value = load_logit(a.logits, a.dtype, at + j);
      if (a.uncond) {
        const float base = load_logit(a.uncond, a.dtype, uncond_at + j);
        if (!(value == kNegInf && base == kNegInf)) value = base + scale * (value - base);
      }
      value /= a.temperature;
      bad |= !(value < INFINITY);
      finite += value > kNegInf;
      key = key_of(value);
      most = key > most ? key : most;
    }
    b.keys[p] = key;
  }
  most = simt::reduce_max(most);
  finite = simt::reduce_add(finite);
  bad = simt::reduce_max(bad);
  if (simt::lane() == 0) {
    post(b, 0, most);
    post(b, 1, finite);
    post(b, 2, bad);
  }
  const uint32_t* records = collect(b);
  Statistics s = {0, 0, false};
  for (int r = 0; r < b.cluster * b.kWarps; ++r) {
    const uint32_t* record = records + r * b.words;
    s.most = record[0] > s.most ? record[0] : s.most;
    s.finite += record[1];
    s.bad |= record[2] != 0;
  }
  return s;
}

struct Selection {
  uint32_t key;    // the largest K for which all entries with key >= K weigh at least the goal
  uint64_t above;  // weight of the keys > K
  uint64_t at;     // weight of the keys = K
};

// key(p) < 2^bits, weight(p) >= 0; all together weigh at least `goal` >= 1 and fit in a Sum: uint32_t to count (its
// atomics are one instruction), uint64_t for masses. The histogram whose turn
// it is must be clear, and is left clear; a count dirties the lower half only, so a sum may follow it.
template <class Sum, int T, class Key, class Weight>
__device__ Selection select(Block<T>& b, int bits, uint64_t goal, Key key, Weight weight) {
  constexpr int kBinsPerThread = kBins / T;
  Control& c = *(Control*)simt::shared_memory();
  Selection s = {0, 0, 0};
  for (int low = bits; low > 0;) {
    const int width = low < kDigit ? low : kDigit;
    Sum* bins = (Sum*)((uint64_t*)b.area + b.histogram_turn * kBins);
    Sum* following = (Sum*)((uint64_t*)b.area + (b.histogram_turn ^ 1) * kBins);
    for (int p = simt::thread(); p < b.positions; p += T) {
      const uint32_t k = key(p);
      if ((uint32_t)((uint64_t)k >> low) != s.key) continue;
      const Sum w = weight(p);
      if (w) simt::atomic_add(&bins[k >> (low - width) & ((1u << width) - 1u)], w);
    }
    low -= width;
    simt::cluster_barrier(b.cluster);
    // Thread 0 has the highest bins. The other histogram was last read before this barrier: clear it for the next pass.
    const int first = kBins - 1 - simt::thread() * kBinsPerThread;
    uint64_t bin[kBinsPerThread] = {}, sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < b.cluster; ++rank) {
      const Sum* theirs = simt::of_rank(bins + first, rank, b.cluster);
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) bin[i] += theirs[-i];
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      sum += bin[i];
      following[first - i] = 0;
    }
    uint64_t through = sum;  // of this warp's lanes up to this one
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const uint64_t before = simt::shuffle_up(through, by);
      through += simt::lane() >= by ? before : 0;
    }
    if (simt::lane() == 31) c.warp_mass[simt::warp()] = through;
    simt::block_barrier();
    uint64_t above = s.above + through - sum;
    for (int w = 0; w < simt::warp(); ++w) above += c.warp_mass[w];
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < goal && above + bin[i] >= goal) {
        c.digit = (uint32_t)(first - i);
        c.above = above;
        c.at = bin[i];
      }
      above += bin[i];
    }
    simt::block_barrier();
    s.key = s.key << width | c.digit;
    s.above = c.above;
    s.at = c.at;
    b.histogram_turn ^= 1;
  }
  return s;
}

// An entry stays if its key is above `key`, or equal to it and its code at most `last_tie`.
struct Threshold {
  uint32_t key, last_tie;
};

template <int T>
__device__ Threshold find_threshold(Block<T>& b, const Statistics& row) {
  const FilterArguments& a = *b.filter;
  Threshold t = {kKeyOfMinusInf + 1, kNone};
  const uint32_t* keys = b.keys;
  if (a.top_k > 0 && a.top_k < (int64_t)row.finite)
    t.key = select<uint32_t>(b, 32, (uint64_t)a.top_k, [&](int p) { return keys[p]; }, [](int) { return 1u; }).key;
  if (!(a.top_p < 1.)) return t;

  const uint32_t least = t.key;
  const float most = value_of_key(row.most);
  const auto mass = [&](int p) {
    return keys[p] < least ? (uint64_t)0 : fixed_mass(expf(value_of_key(keys[p]) - most));
  };
  uint64_t sum = 0;
  for (int p = simt::thread(); p < b.positions; p += T) sum += mass(p);
  const uint64_t goal = mass_goal(a.top_p, sum_over_warps(b, warp_sum(sum)));
  const Selection s = select<uint64_t>(b, 32, goal, [&](int p) { return keys[p]; }, mass);
  t.key = s.key;
  // All ties weigh the same; the i-th of them stays while the mass before it is below the goal.
  const uint64_t each = fixed_mass(expf(value_of_key(s.key) - most));
  const uint64_t needed = (goal - s.above + each - 1) / each;
  if (needed * each < s.at) {
    int bits = 1;
    while (((a.V - 1) >> bits) != 0) ++bits;
    const uint32_t last = (1u << bits) - 1u;
    const uint32_t tied = s.key;
    const auto reversed = [&](int p) { return last - (code_of(b, p) & last); };
    const auto is_tied = [&](int p) { return (uint32_t)(keys[p] == tied); };
    t.last_tie = last - select<uint32_t>(b, bits, needed, reversed, is_tied).key;
  }
  return t;
}

template <int T>
DDFAST_MATH bool is_kept(const Block<T>& b, const Threshold& t, int position) {
  const uint32_t key = b.keys[position];
  return key > t.key || (key == t.key && code_of(b, position) <= t.last_tie);
}

// Lists the positions kept, in order; returns how many there are in this block, and in the cluster.
template <int T>
__device__ int list_kept(Block<T>& b, const Threshold& t, int* in_cluster) {
  const int segment = (b.positions + T - 1) / T * 32;  // positions per warp
  const int begin = simt::warp() * segment;
  const auto stays = [&](int p) { return p < b.positions && is_kept(b, t, p); };
  int count = 0;
  for (int p = begin; p < begin + segment; p += 32) count += simt::count_bits(simt::ballot(stays(p + simt::lane())));
  if (simt::lane() == 0) post(b, 0, (uint32_t)count);
  const uint32_t* records = collect(b);
  int at = 0, mine = 0, all = 0;
  for (int r = 0; r < b.cluster * b.kWarps; ++r) {
    const int n = (int)records[r * b.words];
    all += n;
    if (r / b.kWarps != b.rank) continue;
    mine += n;
    at += r % b.kWarps < simt::warp() ? n : 0;
  }
  for (int p = begin; p < begin + segment; p += 32) {
    const int position = p + simt::lane();
    const bool here = stays(position);
    const uint32_t who = simt::ballot(here);
    if (here) b.kept[at + simt::count_bits(who & ((1u << simt::lane()) - 1u))] = (uint32_t)position;
    at += simt::count_bits(who);
  }
  simt::block_barrier();
  *in_cluster = all;
  return mine;
}

}  // namespace
}  // namespace ddfast
