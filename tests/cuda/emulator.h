// Runs CUDA kernels on the CPU: every thread of a cluster is a fiber, which runs until it must wait for others at a
// barrier or a warp collective. The names in ddfast::simt are those of kernels/simt.h.
//
// What it makes visible: results; reads of memory that nobody wrote (shared memory starts as NaN); barriers that not
// all threads reach, or where they meet different ones (an error, never a hang); writes past the end of shared memory;
// and, because who goes first after a barrier is drawn from `seed`, results that depend on the order of threads.
// What it cannot show: speed, memory-model effects finer than barriers, and what only the hardware checks.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

constexpr size_t kStack = 64 << 10, kGuard = 1024, kPayload = 10;
constexpr unsigned char kPoison = 0xff;  // NaN as float, far out of range as an index

struct Group {  // threads that wait for one another
  int size = 0, kind = 0;
  std::vector<int> waiting;
};

struct Exchange {  // what the lanes of a warp show each other; two rounds can be in flight
  uint32_t value[2][32][kPayload];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  int thread, rank, round;
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<int> ready;  // the next to run is at the back
  std::vector<Group> warps, blocks;
  std::vector<Exchange> exchanges;
  Group cluster;
  std::vector<std::vector<unsigned char>> shared;
  std::function<void()> body;
  unsigned char* stacks = nullptr;
  size_t stack_count = 0;
  jmp_buf scheduler;
  int current = 0, live = 0, threads = 0;
  int64_t first_block = 0;
  std::string error;
  uint64_t seed = 0;               // 0: in order
  int shared_limit = 227 << 10;    // of the emulated device
  int multiprocessors = 132;
  bool clusters = true;
};
inline State state;

inline Fiber& me() { return state.fibers[state.current]; }

inline void fail(const std::string& message) {
  if (state.error.empty()) state.error = message;
  _longjmp(state.scheduler, 1);
}

inline void make_ready(std::vector<int>& fibers) {
  if (state.seed)
    for (size_t i = fibers.size(); i > 1; --i) {
      state.seed = state.seed * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(fibers[i - 1], fibers[(state.seed >> 33) % i]);
    }
  state.ready.insert(state.ready.end(), fibers.rbegin(), fibers.rend());
  fibers.clear();
}

inline void wait(Group& group, int kind) {
  if (group.waiting.empty()) group.kind = kind;
  if (group.kind != kind) fail("threads meet at different barriers or collectives");
  group.waiting.push_back(state.current);
  if ((int)group.waiting.size() == group.size) make_ready(group.waiting);
  if (!_setjmp(me().resume)) _longjmp(state.scheduler, 1);
}

inline void entry() {
  state.body();
  --state.live;
  _longjmp(state.scheduler, 1);
}

inline Group& my_warp() { return state.warps[(me().rank * state.threads + me().thread) / 32]; }

// Shows `count` words to the warp; returns those of all lanes, valid until this lane's next exchange.
inline const uint32_t (*exchange(int kind, const void* words, int count))[kPayload] {
  Fiber& fiber = me();
  Exchange& buffer = state.exchanges[(fiber.rank * state.threads + fiber.thread) / 32];
  const int round = fiber.round++ & 1;
  std::memcpy(buffer.value[round][fiber.thread & 31], words, (size_t)count * 4);
  wait(my_warp(), kind);
  return buffer.value[round];
}

inline void run_cluster(int cluster, int threads, size_t shared_bytes) {
  State& s = state;
  const int total = cluster * threads;
  s.threads = threads;
  s.fibers.resize(total);
  s.shared.assign(cluster, std::vector<unsigned char>(shared_bytes + kGuard, kPoison));
  s.warps.assign(total / 32, Group{32, 0, {}});
  s.blocks.assign(cluster, Group{threads, 0, {}});
  s.cluster = Group{total, 0, {}};
  s.exchanges.resize(total / 32);
  s.ready.clear();
  s.live = total;
  if (s.stack_count < (size_t)total) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    s.stacks = (unsigned char*)mmap(nullptr, total * kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    s.stack_count = total;
  }
  std::vector<int> all;
  for (int i = 0; i < total; ++i) {
    Fiber& fiber = s.fibers[i];
    fiber.started = false;
    fiber.thread = i % threads;
    fiber.rank = i / threads;
    fiber.round = 0;
    all.push_back(i);
  }
  make_ready(all);
  _setjmp(s.scheduler);
  while (s.error.empty() && !s.ready.empty()) {
    s.current = s.ready.back();
    s.ready.pop_back();
    Fiber& fiber = me();
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = s.stacks + (size_t)s.current * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    setcontext(&fiber.start);
  }
  if (s.error.empty() && s.live) s.error = "some threads wait at a barrier that others never reach";
  for (const auto& memory : s.shared)
    for (size_t i = shared_bytes; i < memory.size(); ++i)
      if (s.error.empty() && memory[i] != kPoison) s.error = "write past the end of shared memory";
}

inline float truncate_to_tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

enum Kind { kBlock = 1, kWarp, kCluster, kShuffle, kReduce, kBallot, kMma };

}  // namespace emulator

namespace ddfast {
namespace simt {

inline int thread() { return emulator::me().thread; }
inline int lane() { return thread() & 31; }
inline int warp() { return thread() >> 5; }
inline int block() { return (int)emulator::state.first_block + emulator::me().rank; }
inline unsigned char* shared_memory() { return emulator::state.shared[emulator::me().rank].data(); }

inline void block_barrier() { emulator::wait(emulator::state.blocks[emulator::me().rank], emulator::kBlock); }
inline void warp_barrier() { emulator::wait(emulator::my_warp(), emulator::kWarp); }
inline void cluster_barrier(int) { emulator::wait(emulator::state.cluster, emulator::kCluster); }
inline int cluster_rank(int) { return emulator::me().rank; }
template <class T>
T* of_rank(T* mine, int rank, int) {
  return (T*)(emulator::state.shared[rank].data() + ((unsigned char*)mine - shared_memory()));
}

template <class T>
T value_of_lane(T value, int from) {
  T out;
  std::memcpy(&out, emulator::exchange(emulator::kShuffle, &value, sizeof(T) / 4)[from], sizeof(T));
  return out;
}
inline float shuffle(float value, int from) { return value_of_lane(value, from); }
template <int kLanes>
float shuffle_within(float value, int from) {
  return value_of_lane(value, (lane() & ~(kLanes - 1)) + from);
}
inline float shuffle_xor(float value, int mask) { return value_of_lane(value, lane() ^ mask); }
inline uint32_t shuffle_xor(uint32_t value, int mask) { return value_of_lane(value, lane() ^ mask); }
inline uint64_t shuffle_up(uint64_t value, int by) { return value_of_lane(value, lane() < by ? lane() : lane() - by); }

template <class Combine>
uint32_t reduce(uint32_t value, Combine combine) {
  const auto* all = emulator::exchange(emulator::kReduce, &value, 1);
  uint32_t out = all[0][0];
  for (int i = 1; i < 32; ++i) out = combine(out, all[i][0]);
  return out;
}
inline uint32_t reduce_max(uint32_t value) {
  return reduce(value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline uint32_t reduce_min(uint32_t value) {
  return reduce(value, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
inline uint32_t reduce_add(uint32_t value) {
  return reduce(value, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t ballot(bool predicate) {
  const uint32_t value = predicate;
  const auto* all = emulator::exchange(emulator::kBallot, &value, 1);
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) out |= all[i][0] << i;
  return out;
}

inline int count_bits(uint32_t value) { return __builtin_popcount(value); }
inline int lowest_bit(uint32_t value) { return __builtin_ffs((int)value) - 1; }
inline void atomic_add(uint32_t* at, uint32_t value) { *at += value; }
inline void atomic_add(uint64_t* at, uint64_t value) { *at += value; }
inline uint32_t count_up(uint32_t* at) { return (*at)++; }
inline void atomic_min(uint64_t* at, uint64_t value) { *at = std::min(*at, value); }

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_bits(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t pack_bf16(float first, float second) { return to_bf16(first) | to_bf16(second) << 16; }

// out = c + a b, where `a_at(row, k, words of the lane that has it)` and b_at are elements. The products are exact;
// their sum with c is rounded towards zero, as far from the exact value as hardware is seen to go.
template <class A, class B>
void product(float (&out)[4], const uint32_t* a, int a_words, const uint32_t* b, int b_words, const float (&c)[4],
             int depth, A a_at, B b_at) {
  uint32_t words[emulator::kPayload] = {};
  std::memcpy(words, a, 4 * (size_t)a_words);
  std::memcpy(words + 4, b, 4 * (size_t)b_words);
  std::memcpy(words + 6, c, 16);
  const auto* all = emulator::exchange(emulator::kMma, words, 10);
  const int g = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i / 2) * 8, column = 2 * q + i % 2;
    double sum = simt::bits_float(words[6 + i]);
    for (int k = 0; k < depth; ++k) sum += (double)a_at(all, row, k) * b_at(all, k, column);
    float rounded = (float)sum;
    if (std::fabs((double)rounded) > std::fabs(sum)) rounded = std::nextafterf(rounded, 0.f);
    out[i] = rounded;
  }
}
inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  product(acc, a, 4, b, 2, acc, 8,
          [](auto all, int row, int k) {
            return emulator::truncate_to_tf32(all[(row % 8) * 4 + k % 4][(k / 4) * 2 + row / 8]);
          },
          [](auto all, int k, int column) { return emulator::truncate_to_tf32(all[column * 4 + k % 4][4 + k / 4]); });
}
template <int K>
void mma_bf16(float (&out)[4], const uint32_t* a, const uint32_t* b, const float (&c)[4]) {
  const auto half = [](uint32_t word, int k) { return bits_float(k % 2 ? word & 0xffff0000u : word << 16); };
  product(out, a, K / 4, b, K / 8, c, K,
          [&](auto all, int row, int k) { return half(all[(row % 8) * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k); },
          [&](auto all, int k, int column) { return half(all[column * 4 + k % 8 / 2][4 + k / 8], k); });
}
inline void mma_bf16_k8(float (&out)[4], const uint32_t* a, const uint32_t* b, const float (&c)[4]) {
  mma_bf16<8>(out, a, b, c);
}
inline void mma_bf16_k16(float (&out)[4], const uint32_t* a, const uint32_t* b, const float (&c)[4]) {
  mma_bf16<16>(out, a, b, c);
}
inline float half_bits_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent ? std::ldexp((float)(1024 + fraction), exponent - 25) : std::ldexp((float)fraction, -24);
  return bits & 0x8000 ? -value : value;
}

struct Device {
  int shared_bytes, shared_per_multiprocessor, multiprocessors;
  bool clusters;
};
inline cudaError_t device(Device* out) {
  *out = {emulator::state.shared_limit, emulator::state.shared_limit + 1024, emulator::state.multiprocessors,
          emulator::state.clusters};
  return cudaSuccess;
}

inline cudaError_t clear(void* at, size_t bytes, cudaStream_t) {
  std::memset(at, 0, bytes);
  return cudaSuccess;
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, int cluster,
                   cudaStream_t, const Arguments& arguments) {
  emulator::State& s = emulator::state;
  s.error.clear();
  const bool possible = threads % 32 == 0 && threads <= 1024 && blocks % cluster == 0 && blocks < (1ll << 31) &&
                        (cluster == 1 || (s.clusters && cluster <= 8)) && (int)shared_bytes <= s.shared_limit;
  if (!possible) {
    s.error = "a launch that the device would refuse";
    return cudaErrorInvalidValue;
  }
  s.body = [&] { kernel(arguments); };
  for (s.first_block = 0; s.first_block < blocks && s.error.empty(); s.first_block += cluster)
    emulator::run_cluster(cluster, threads, shared_bytes);
  return s.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt
}  // namespace ddfast
