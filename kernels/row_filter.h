// One row of logits in the hands of a cluster of blocks, and which of its codes guidance, temperature, top-k and top-p
// leave: what filter_logits.cu, draw_codes.cu and flow_sample.cu share.
//
//   1. Every block reads its share of the logits (granules of 32 codes, dealt to the blocks in turn), four at a time,
//      and keeps them as order-preserving integers.
//   2. Thresholds without sorting: radix selection, 11 bits a pass, on a histogram of counts (top-k) or of fixed-point
//      probability mass (top-p: integer sums do not depend on their order), by value, or by index (ties at top-p's edge,
//      and the code that draw_codes draws).
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

constexpr int kWide = 256;  // threads of a block, at most, but for draw_codes
constexpr int kMaxWarps = kWide / 32;
constexpr int kGranule = 32;
constexpr int kFour = 4;  // codes that a thread takes at a time
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
  uint64_t warp_mass[32];
  uint64_t above, at;  // of the digit found by take_digit
  uint32_t digit;
};

struct alignas(16) FourKeys {
  uint32_t key[kFour];
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

// Sums over the lanes of a warp; that of 64 bits in three parts, none of which overflows.
__device__ __forceinline__ uint32_t warp_sum(uint32_t value) { return simt::reduce_add(value); }

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
  constexpr int kPart = 24;
  constexpr uint32_t kMask = (1u << kPart) - 1u;
  const uint32_t low = simt::reduce_add((uint32_t)value & kMask);
  const uint32_t middle = simt::reduce_add((uint32_t)(value >> kPart) & kMask);
  const uint32_t high = simt::reduce_add((uint32_t)(value >> 2 * kPart));
  return low + ((uint64_t)middle << kPart) + ((uint64_t)high << 2 * kPart);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int stride = 16; stride; stride /= 2) value += simt::shuffle_xor(value, stride);
  return value;
}

// ---- the filter ---------------------------------------------------------------------------------------------------

struct Statistics {
  uint32_t most;  // key of the largest value
  bool bad;       // NaN, +inf or nothing finite
};

// Whether four codes of every row are 16 bytes (8, of two-byte types) that one load brings.
__device__ __forceinline__ bool rows_are_of_fours(const FilterArguments& a) {
  const uint64_t size = a.dtype == 0 ? 4 : 2;
  const uint64_t places = (uint64_t)(a.V | a.stride | a.uncond_stride) * size | (uint64_t)a.logits | (uint64_t)a.uncond;
  return places % (kFour * size) == 0;
}

// Guides and tempers logits with the same settings; their keys, and the largest and the least of all so far.
template <int N>
__device__ __forceinline__ void find_keys(const FilterArguments& a, float scale, float (&logit)[N],
                                          const float (&uncond)[N], uint32_t* keys, uint32_t& most, uint32_t& least) {
  if (a.uncond)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(logit[i] == kNegInf && uncond[i] == kNegInf)) logit[i] = uncond[i] + scale * (logit[i] - uncond[i]);
  if (a.temperature != 1.f)
#pragma unroll
    for (int i = 0; i < N; ++i) logit[i] /= a.temperature;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    keys[i] = key_of(logit[i]);
    most = keys[i] > most ? keys[i] : most;
    least = keys[i] < least ? keys[i] : least;
  }
}

// Keys of the guided, tempered row, and clear histograms; its exchange makes both visible to all threads.
template <int T>
__device__ Statistics load_row(Block<T>& b) {
  constexpr int kAtATime = 4;  // fours of a thread whose loads are under way together
  const FilterArguments& a = *b.filter;
  b.histogram_turn = 0;
  for (int i = simt::thread(); i < 2 * kBins; i += T) ((uint64_t*)b.area)[i] = 0;
  const int64_t at = b.row * a.stride, uncond_at = b.row * a.uncond_stride;
  const float scale = a.uncond ? a.cfg_scale[b.row] : 1.f;
  uint32_t most = 0, least = kNone;
  if (rows_are_of_fours(a)) {
    for (int first = kFour * simt::thread(); first < b.positions; first += kAtATime * kFour * T) {
      FourLogits logits[kAtATime] = {}, uncond[kAtATime] = {};
      uint32_t code[kAtATime];
#pragma unroll
      for (int n = 0; n < kAtATime; ++n) {
        const int p = first + n * kFour * T;
        code[n] = p < b.positions ? code_of(b, p) : kNone;
        if (code[n] >= (uint32_t)a.V) continue;
        logits[n] = load_logits(a.logits, a.dtype, at + code[n]);
        if (a.uncond) uncond[n] = load_logits(a.uncond, a.dtype, uncond_at + code[n]);
      }
#pragma unroll
      for (int n = 0; n < kAtATime; ++n) {
        const int p = first + n * kFour * T;
        FourKeys keys = {};
        if (code[n] < (uint32_t)a.V) {
          float logit[kFour], base[kFour] = {};
          unpack_logits(logits[n], a.dtype, logit);
          if (a.uncond) unpack_logits(uncond[n], a.dtype, base);
          find_keys(a, scale, logit, base, keys.key, most, least);
        }
        if (p < b.positions) *(FourKeys*)(b.keys + p) = keys;
      }
    }
  } else {
#pragma unroll 1
    for (int p = simt::thread(); p < b.positions; p += T) {
      const uint32_t j = code_of(b, p);
      uint32_t key = 0;
      if (j < (uint32_t)a.V) {
        float logit[] = {load_logit(a.logits, a.dtype, at + j)};
        const float base[] = {a.uncond ? load_logit(a.uncond, a.dtype, uncond_at + j) : 0.f};
        find_keys(a, scale, logit, base, &key, most, least);
      }
      b.keys[p] = key;
    }
  }
  most = simt::reduce_max(most);
  least = simt::reduce_min(least);
  if (simt::lane() == 0) {
    post(b, 0, most);
    post(b, 1, least);
  }
  const uint32_t* records = collect(b);
  most = 0;
  least = kNone;
  for (int r = simt::lane(); r < b.cluster * b.kWarps; r += 32) {
    const uint32_t* record = records + r * b.words;
    most = record[0] > most ? record[0] : most;
    least = record[1] < least ? record[1] : least;
  }
  most = simt::reduce_max(most);
  least = simt::reduce_min(least);
  // NaNs are beyond the infinities, on the side of their sign bit.
  return {most, most <= kKeyOfMinusInf || most >= key_of(INFINITY) || least < kKeyOfMinusInf};
}

// A digit of the keys among which a selection looks, and those above it, which are settled.
struct Digit {
  uint32_t found, settled;  // where `settled` has bits, keys that are looked at have those of `found`
  uint32_t mask;
  int low;  // its place
};

DDFAST_MATH bool is_among(const Digit& digit, uint32_t key) { return ((key ^ digit.found) & digit.settled) == 0; }
DDFAST_MATH uint32_t bin_of(const Digit& digit, uint32_t key) { return key >> digit.low & digit.mask; }

// Where a selection stands: all keys weigh at least the goal, those above the digits found less, with those that begin
// with these digits at least the goal.
struct Selection {
  uint32_t key;    // the digits found, in their places
  uint64_t goal;   // 0: not known before the first digit's histogram
  uint64_t above;  // weight of the keys above
  uint64_t at;     // weight of the keys that begin with these digits
};

template <class Sum, int T>
__device__ __forceinline__ Sum* histogram(const Block<T>& b) {
  return (Sum*)((uint64_t*)b.area + b.histogram_turn * kBins);
}

// A histogram's bin is the sum of 64 bits, by two additions of 32: one of 64 in shared memory is a loop of comparing and
// swapping. Halfway between them a bin means nothing; after a barrier it is exact.
__device__ __forceinline__ void add_to_bin(uint64_t* bin, uint64_t weight) {
  uint32_t* words = (uint32_t*)bin;  // the lower one first
  const uint32_t low = (uint32_t)weight;
  const uint32_t carry = simt::fetch_add(words, low) + low < low;
  const uint32_t high = (uint32_t)(weight >> 32) + carry;
  if (high) simt::atomic_add(words + 1, high);
}

// Finds a selection's next digit in the histogram whose turn it is, of all blocks, and leaves that of the next one clear.
template <class Sum, int T, class Goal>
__device__ __forceinline__ void take_digit(Block<T>& b, Selection& s, int low, const Goal& goal) {
  constexpr int kBinsPerThread = kBins / T;
  Control& c = *(Control*)simt::shared_memory();
  const Sum* bins = histogram<Sum>(b);
  b.histogram_turn ^= 1;
  Sum* following = histogram<Sum>(b);
  simt::cluster_barrier(b.cluster);
  // Thread 0 has the highest bins. The other histogram was last read before this barrier: clear it for the next pass.
  const int first = kBins - 1 - simt::thread() * kBinsPerThread;
  Sum bin[kBinsPerThread] = {}, sum = 0;
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
  const Sum mine = warp_sum(sum);
  if (simt::lane() == 0) c.warp_mass[simt::warp()] = mine;
  simt::block_barrier();
  const Sum of_warp = simt::lane() < b.kWarps ? (Sum)c.warp_mass[simt::lane()] : 0;
  if (!s.goal) s.goal = goal((uint64_t)warp_sum(of_warp));
  uint64_t above = s.above + warp_sum(simt::lane() < simt::warp() ? of_warp : 0);
  if (above < s.goal && above + mine >= s.goal) {  // one warp
    Sum through = sum;  // of its lanes up to this one
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const Sum before = simt::shuffle_up(through, by);
      through += simt::lane() >= by ? before : 0;
    }
    above += through - sum;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < s.goal && above + bin[i] >= s.goal) {
        c.digit = (uint32_t)(first - i);
        c.above = above;
        c.at = bin[i];
      }
      above += bin[i];
    }
  }
  simt::block_barrier();
  s.key |= c.digit << low;
  s.above = c.above;
  s.at = c.at;
}

// The largest key of so many bits with which all larger ones and itself weigh at least goal(weight of all), which is
// at least 1. fill(digit, bins) adds the weights of the keys among which the digit is sought. A Sum is uint32_t to count
// (its additions are one instruction), uint64_t for masses. Counts leave only a histogram's lower half clear, so that
// none may follow masses.
template <class Sum, int T, class Goal, class Fill>
__device__ Selection select(Block<T>& b, int bits, const Goal& goal, const Fill& fill) {
  Selection s = {0, 0, 0, 0};
  for (int low = bits; low > 0;) {
    const uint32_t settled = low < 32 ? ~0u << low : 0u;
    low = low > kDigit ? low - kDigit : 0;
    fill(Digit{s.key, settled, ~settled >> low, low}, histogram<Sum>(b));
    take_digit<Sum>(b, s, low, goal);
  }
  return s;
}

// Calls `visit` with the keys and codes that are wanted of positions begin .. end - 1, whole granules. Where these are
// few, most lanes have none in what a warp reads, so each lane first notes its own of 32: a warp then takes as many turns
// as its busiest lane has. (`wanted` without branches: it is asked of every code.)
template <int T, class Wanted, class Visit>
__device__ __forceinline__ void visit_wanted(const Block<T>& b, int begin, int end, const Wanted& wanted,
                                             const Visit& visit) {
  constexpr int kFours = 32 / kFour;
  for (int first = begin + kFour * simt::thread(); first < end; first += kFours * kFour * T) {
    uint32_t noted = 0;
#pragma unroll
    for (int n = 0; n < kFours; ++n) {
      const int p = first + n * kFour * T;
      if (p >= end) break;
      const FourKeys keys = *(const FourKeys*)(b.keys + p);
      const uint32_t code = code_of(b, p);
#pragma unroll
      for (int i = 0; i < kFour; ++i) noted |= wanted(keys.key[i], code + i) ? 1u << (n * kFour + i) : 0;
    }
    for (; noted; noted &= noted - 1) {
      const int bit = simt::lowest_bit(noted), p = first + bit / kFour * kFour * T + bit % kFour;
      visit(b.keys[p], code_of(b, p));
    }
  }
}

// The lowest wanted code with which all lower ones and itself weigh at least goal(weight of all). Codes count down from
// the last, to be keys.
template <int T, class Goal, class Wanted, class Weight>
__device__ uint32_t select_code(Block<T>& b, const Goal& goal, const Wanted& wanted, const Weight& weight) {
  int bits = 1;
  while (((b.filter->V - 1) >> bits) != 0) ++bits;
  const uint32_t last = (1u << bits) - 1u;
  const auto fill = [&](const Digit& digit, uint64_t* bins) {
    // Only the granules that have such codes. One of every block: a power of two of codes, which share a place in all.
    const int shift = simt::lowest_bit((uint32_t)(kGranule * b.cluster));
    const int begin = (int)((last - (digit.found | ~digit.settled)) >> shift) * kGranule;
    const int end = ((int)((last - digit.found) >> shift) + 1) * kGranule;
    visit_wanted(b, begin, end < b.positions ? end : b.positions,
                 [&](uint32_t key, uint32_t code) { return is_among(digit, last - code) & wanted(key, code); },
                 [&](uint32_t key, uint32_t code) { add_to_bin(&bins[bin_of(digit, last - code)], weight(key)); });
  };
  return last - select<uint64_t>(b, bits, goal, fill).key;
}

// An entry stays if its key is above `key`, or equal to it and its code at most `last_tie`.
struct Threshold {
  uint32_t key, last_tie;
};

DDFAST_MATH bool is_kept(const Threshold& t, uint32_t key, uint32_t code) {
  return (key > t.key) | ((key == t.key) & (code <= t.last_tie));
}

template <int T>
__device__ Threshold find_threshold(Block<T>& b, const Statistics& row) {
  const FilterArguments& a = *b.filter;
  Threshold t = {kKeyOfMinusInf + 1, kNone};
  if (a.top_k == 1) {
    t.key = row.most;
  } else if (a.top_k > 0 && a.top_k < a.V) {
    const auto goal = [&](uint64_t) { return (uint64_t)a.top_k; };
    const uint32_t kth = select<uint32_t>(b, 32, goal, [&](const Digit& digit, uint32_t* bins) {
      for (int p = kFour * simt::thread(); p < b.positions; p += kFour * T) {
        const FourKeys keys = *(const FourKeys*)(b.keys + p);
#pragma unroll
        for (int i = 0; i < kFour; ++i)
          if (is_among(digit, keys.key[i])) simt::atomic_add(&bins[bin_of(digit, keys.key[i])], 1);
      }
    }).key;
    t.key = kth > t.key ? kth : t.key;
  }
  if (!(a.top_p < 1.)) return t;

  const uint32_t least = t.key;
  const float most = value_of_key(row.most);
  const auto mass = [&](uint32_t key) { return fixed_mass(expf(value_of_key(key) - most)); };
  const auto goal = [&](uint64_t total) { return mass_goal(a.top_p, total); };
  const Selection s = select<uint64_t>(b, 32, goal, [&](const Digit& digit, uint64_t* bins) {
    visit_wanted(b, 0, b.positions, [&](uint32_t key, uint32_t) { return (key >= least) & is_among(digit, key); },
                 [&](uint32_t key, uint32_t) { add_to_bin(&bins[bin_of(digit, key)], mass(key)); });
  });
  t.key = s.key;
  // All ties weigh the same; the i-th of them stays while the mass before it is below the goal.
  const uint64_t each = mass(s.key), needed = (s.goal - s.above + each - 1) / each;
  if (needed * each < s.at)
    t.last_tie = select_code(b, [&](uint64_t) { return needed; }, [&](uint32_t key, uint32_t) { return key == t.key; },
                             [](uint32_t) { return (uint64_t)1; });
  return t;
}

template <int T>
DDFAST_MATH bool is_kept(const Block<T>& b, const Threshold& t, int position) {
  return is_kept(t, b.keys[position], code_of(b, position));
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
