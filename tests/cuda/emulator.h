// Runs CUDA kernels on the CPU: every thread of a few clusters is a fiber, which runs until it must wait for others at a
// barrier or a warp collective. The names in ddfast::simt are those of kernels/simt.h.
//
// What it makes visible: results; reads of memory that nobody wrote (shared memory starts as NaN); barriers that not
// all threads reach, or where they meet different ones (an error, never a hang); and, because which block starts, who
// goes first after a barrier and whose turn it is among the clusters are drawn from `seed`, results that depend on the
// order of threads, blocks or clusters. Errors, too: an access beyond shared memory or beyond a tensor of a launcher
// that has `Tensors` below (each lies at the edge of a page that nobody may touch), a write to an input, an access to
// the shared memory of a block that has not started or has returned; and what UBSan finds, such as a vector load from
// an address that is not aligned, as far as the compiler was asked to look (conftest.py).
// What it cannot show: speed, memory-model effects finer than barriers, and what only the hardware checks.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

namespace emulator {

constexpr size_t kStack = 64 << 10, kAlignment = 16, kPayload = 10;
constexpr int kResident = 3, kResidentThreads = 2048;  // clusters that run at the same time, two at least
constexpr unsigned char kPoison = 0xff;  // NaN as float, far out of range as an index

// Memory between two pages that nobody may touch: it ends at the second one or, if `front`, begins at the first. Its
// alignment is that of `like`, which may leave a few poisoned bytes in between.
class Fenced {
 public:
  Fenced(const char* name, size_t bytes, bool front, uintptr_t like = 0) : name(name), bytes(bytes) {
    page_ = (size_t)sysconf(_SC_PAGESIZE);
    const size_t offset = like % kAlignment;
    room_ = (bytes + 2 * kAlignment + page_ - 1) / page_ * page_;
    void* map = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) std::abort();
    inside_ = (unsigned char*)map + page_;
    protect(PROT_READ | PROT_WRITE);
    std::memset(inside_, kPoison, room_);
    begin = inside_ + (front ? offset : (room_ - bytes - offset) / kAlignment * kAlignment + offset);
  }
  ~Fenced() { munmap(inside_ - page_, room_ + 2 * page_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  void protect(int how) { mprotect(inside_, room_, how); }

  // Whether somebody wrote beside it, where it does not reach to the page.
  bool is_damaged() const {
    const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
    return !std::all_of(inside_, begin, is_poison) || !std::all_of(begin + bytes, inside_ + room_, is_poison);
  }

  // What an access to `address` did wrong; empty: it is not near.
  std::string describe(const unsigned char* address) const {
    if (address < inside_ - page_ || address >= inside_ + room_ + page_) return "";
    if (address >= begin + bytes) return std::to_string(address - begin - bytes) + " bytes past the end of " + name;
    if (address < begin) return std::to_string(begin - address) + " bytes before " + name;
    return std::string("access to ") + name + closed;
  }

  const char *name, *closed = "";  // closed: why it may not be accessed
  size_t bytes;
  unsigned char* begin;

 private:
  size_t page_, room_;
  unsigned char* inside_;
};

struct Group {  // threads that wait for one another
  int size = 0, kind = 0;
  std::vector<int> waiting;
};

struct Exchange {  // what the lanes of a warp show each other; two rounds can be in flight
  uint32_t value[2][32][kPayload];
};

struct Cluster;

struct Fiber {
  jmp_buf resume;
  bool started;  // and waits: within a kernel, or for the next one
  int thread, rank, round;
  Cluster* cluster;
};

struct Cluster {  // that is resident
  int64_t first_block;
  Fiber* fibers;
  std::vector<int> ready;  // the next to run is at the back
  std::vector<Group> warps, blocks;
  Group all;
  std::vector<Exchange> exchanges;
  std::list<Fenced> memory;  // shared, of every block
  std::vector<Fenced*> shared;
  std::vector<int> live;  // threads of every block that have not returned
  int all_live;
  std::vector<bool> begun;
};

struct State {
  std::vector<Fiber> fibers;
  unsigned char* stacks = nullptr;
  std::list<Cluster> clusters;
  std::vector<Cluster*> resident;  // those that have not returned
  std::vector<int64_t> order;      // in which the grid's clusters start
  size_t next = 0;                 // of them
  std::list<Fenced> tensors;
  std::function<void()> body;
  jmp_buf scheduler;
  Fiber* me = nullptr;  // null: outside of a kernel
  int threads = 0;
  std::string error;
  uint64_t seed = 0;             // 0: in order, one cluster after the other
  bool front = false;            // where tensors are fenced
  int shared_limit = 227 << 10;  // of the emulated device
  int multiprocessors = 132;
  bool has_clusters = true;
};
inline State state;

inline Fiber& me() { return *state.me; }

[[noreturn]] inline void fail(const std::string& message) {
  if (!state.me) {
    std::fprintf(stderr, "outside of a kernel: %s\n", message.c_str());
    std::abort();
  }
  if (state.error.empty())
    state.error = "block " + std::to_string(me().cluster->first_block + me().rank) + ", thread " +
                  std::to_string(me().thread) + ": " + message;
  _longjmp(state.scheduler, 1);
}

inline size_t draw(size_t below) {
  state.seed = state.seed * 6364136223846793005ull + 1442695040888963407ull;
  return (size_t)(state.seed >> 33) % below;
}

template <class T>
void shuffle(std::vector<T>& all) {
  if (state.seed)
    for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[draw(i)]);
}

inline void make_ready(Cluster& cluster, std::vector<int>& fibers) {
  shuffle(fibers);
  cluster.ready.insert(cluster.ready.end(), fibers.rbegin(), fibers.rend());
  fibers.clear();
}

inline void wait(Group& group, int kind) {
  if (group.waiting.empty()) group.kind = kind;
  if (group.kind != kind) fail("threads meet at different barriers or collectives");
  Cluster& cluster = *me().cluster;
  group.waiting.push_back((int)(state.me - cluster.fibers));
  if ((int)group.waiting.size() == group.size) make_ready(cluster, group.waiting);
  if (!_setjmp(me().resume)) _longjmp(state.scheduler, 1);
}

inline int number_in_cluster() { return me().rank * state.threads + me().thread; }
inline Group& my_warp() { return me().cluster->warps[number_in_cluster() / 32]; }
inline Fenced& my_shared() { return *me().cluster->shared[me().rank]; }

// Shows `count` words to the warp; returns those of all lanes, valid until this lane's next exchange.
inline const uint32_t (*exchange(int kind, const void* words, int count))[kPayload] {
  Fiber& fiber = me();
  Exchange& buffer = fiber.cluster->exchanges[number_in_cluster() / 32];
  const int round = fiber.round++ & 1;
  std::memcpy(buffer.value[round][fiber.thread & 31], words, (size_t)count * 4);
  wait(my_warp(), kind);
  return buffer.value[round];
}

// A fiber's stack serves one thread after the other.
inline void entry() {
  for (;;) {
    state.body();
    --me().cluster->all_live;
    if (--me().cluster->live[me().rank] == 0 && me().cluster->shared.size() > 1) {
      my_shared().closed = " of a block that has returned";
      my_shared().protect(PROT_NONE);
    }
    if (!_setjmp(me().resume)) _longjmp(state.scheduler, 1);
  }
}

// Makes the grid's next cluster resident in the place of one that has returned.
inline void start(Cluster& cluster) {
  const int blocks = (int)cluster.shared.size(), total = blocks * state.threads;
  cluster.first_block = state.order[state.next++] * blocks;
  cluster.warps.assign(total / 32, Group{32, 0, {}});
  cluster.blocks.assign(blocks, Group{state.threads, 0, {}});
  cluster.all = Group{total, 0, {}};
  cluster.live.assign(blocks, state.threads);
  cluster.all_live = total;
  cluster.begun.assign(blocks, false);
  for (Fenced* shared : cluster.shared) {
    std::memset(shared->begin, kPoison, shared->bytes);
    shared->closed = " of a block that has not started";
    if (blocks > 1) shared->protect(PROT_NONE);
  }
  std::vector<int> all(total);
  for (int i = 0; i < total; ++i) {
    Fiber& fiber = cluster.fibers[i];
    fiber.thread = i % state.threads;
    fiber.rank = i / state.threads;
    fiber.round = 0;
    fiber.cluster = &cluster;
    all[i] = i;
  }
  make_ready(cluster, all);
}

// After the last of its threads; false: there is no other cluster to start.
inline bool finish(Cluster& cluster) {
  for (Fenced* shared : cluster.shared) {
    shared->protect(PROT_READ | PROT_WRITE);
    if (state.error.empty() && shared->is_damaged()) state.error = "write past the end of shared memory";
  }
  if (state.next == state.order.size()) return false;
  start(cluster);
  return true;
}

// Null: nobody's, as all have returned or wait. Mostly it stays with one cluster, whose memory the CPU's caches hold.
inline Cluster* whose_turn() {
  auto& resident = state.resident;
  Cluster* last = state.me ? me().cluster : nullptr;
  if (last && last->all_live == 0 && !finish(*last)) {
    resident.erase(std::find(resident.begin(), resident.end(), last));
    last = nullptr;
  }
  if (last && state.seed && !last->ready.empty() && draw(8)) return last;
  const size_t count = resident.size(), first = count && state.seed ? draw(count) : 0;
  for (size_t i = 0; i < count; ++i)
    if (!resident[(first + i) % count]->ready.empty()) return resident[(first + i) % count];
  if (count && state.error.empty()) state.error = "some threads wait at a barrier that others never reach";
  return nullptr;
}

inline void run(int64_t blocks, int threads, size_t shared_bytes, int cluster_size) {
  State& s = state;
  const int total = cluster_size * threads;
  const int64_t most = s.seed ? std::max(2, std::min(kResident, kResidentThreads / total)) : 1;
  const size_t resident = (size_t)std::min(blocks / cluster_size, most);
  if (s.fibers.size() < resident * total) {
    if (s.stacks) munmap(s.stacks, s.fibers.size() * kStack);
    s.fibers.assign(resident * total, Fiber{});
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    s.stacks = (unsigned char*)mmap(nullptr, s.fibers.size() * kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (s.stacks == MAP_FAILED) std::abort();
  }
  s.threads = threads;
  s.order.resize(blocks / cluster_size);
  std::iota(s.order.begin(), s.order.end(), (int64_t)0);
  shuffle(s.order);
  s.next = 0;
  for (size_t i = 0; i < resident; ++i) {
    Cluster& cluster = s.clusters.emplace_back();
    cluster.fibers = s.fibers.data() + i * total;
    cluster.exchanges.resize(total / 32);
    for (int rank = 0; rank < cluster_size; ++rank)
      cluster.shared.push_back(&cluster.memory.emplace_back("shared memory", shared_bytes, false));
    start(cluster);
    s.resident.push_back(&cluster);
  }
  _setjmp(s.scheduler);
  while (Cluster* cluster = s.error.empty() ? whose_turn() : nullptr) {
    Fiber& fiber = cluster->fibers[cluster->ready.back()];
    cluster->ready.pop_back();
    if (!cluster->begun[fiber.rank]) {
      cluster->begun[fiber.rank] = true;
      if (cluster_size > 1) cluster->shared[fiber.rank]->protect(PROT_READ | PROT_WRITE);
    }
    s.me = &fiber;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = s.stacks + (size_t)(&fiber - s.fibers.data()) * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    setcontext(&context);
  }
  s.me = nullptr;
  s.resident.clear();
  s.clusters.clear();
  if (!s.error.empty())
    for (Fiber& fiber : s.fibers) fiber.started = false;  // they are in the middle of the kernel
}

// ---- accesses that fail -------------------------------------------------------------------------------------------

constexpr int kSignals[] = {SIGSEGV, SIGBUS};

// Turns a kernel's access to memory that it must not touch into an error of the launch, while it lives.
class FaultGuard {
 public:
  FaultGuard() {
    static unsigned char memory[64 << 10];  // a fiber's stack may be what is at fault
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultGuard() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  static void on_fault(int, siginfo_t* info, void*) {
    const auto* address = (const unsigned char*)info->si_addr;
    std::string words;
    for (const Fenced& tensor : state.tensors) words += tensor.describe(address);
    for (const Cluster& cluster : state.clusters)
      for (const Fenced* shared : cluster.shared) words += shared->describe(address);
    fail(words.empty() ? "access to memory that is nobody's" : words);
  }

  stack_t stack_;
  struct sigaction before_[2];
};

// A launch's own copies of its tensors, fenced. A launcher's wrapper in emulated.cpp names them all, with the number of
// elements that the kernels may touch, and gives the launch's status to `close`.
class Tensors {
 public:
  template <class T>
  void input(const T*& pointer, int64_t count, const char* name) {
    pointer = (const T*)add((void*)pointer, count * size_of<T>(), name, false);
  }
  template <class T>
  void output(T*& pointer, int64_t count, const char* name) {
    pointer = (T*)add((void*)pointer, count * size_of<T>(), name, true);
  }

  cudaError_t close(cudaError_t status) {
    for (auto& [memory, original, is_output] : all_) {
      if (is_output) std::memcpy(original, memory->begin, memory->bytes);
      if (memory->is_damaged() && status == cudaSuccess) {
        state.error = std::string("write beside ") + memory->name;
        status = cudaErrorLaunchFailure;
      }
    }
    state.tensors.clear();
    return status;
  }

 private:
  struct Entry {
    Fenced* memory;
    void* original;
    bool is_output;
  };

  template <class T>
  static constexpr int64_t size_of() {
    return sizeof(std::conditional_t<std::is_void_v<T>, char, T>);
  }

  void* add(void* original, int64_t bytes, const char* name, bool is_output) {
    if (!original || bytes <= 0) return original;
    Fenced& memory = state.tensors.emplace_back(name, (size_t)bytes, state.front, (uintptr_t)original);
    std::memcpy(memory.begin, original, (size_t)bytes);
    memory.closed = ", which is an input";
    if (!is_output) memory.protect(PROT_READ);
    all_.push_back({&memory, original, is_output});
    return memory.begin;
  }

  std::vector<Entry> all_;
};

// ---- UBSan's findings: its library's functions, which would end the process ---------------------------------------

struct SourceLine {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] inline void report(const SourceLine* at, const char* what) {
  fail(std::string(what) + " at " + at->file + ":" + std::to_string(at->line));
}

#define DDFAST_UBSAN(check, words)                                                                              \
  extern "C" __attribute__((used, noreturn)) inline void __ubsan_handle_##check##_abort(const SourceLine* at, ...) { \
    report(at, words);                                                                                          \
  }
DDFAST_UBSAN(type_mismatch_v1, "an address that is not aligned, or null,")
DDFAST_UBSAN(out_of_bounds, "an index out of bounds")
DDFAST_UBSAN(shift_out_of_bounds, "a shift by too much")
DDFAST_UBSAN(add_overflow, "a sum that overflows")
DDFAST_UBSAN(sub_overflow, "a difference that overflows")
DDFAST_UBSAN(mul_overflow, "a product that overflows")
DDFAST_UBSAN(negate_overflow, "a negation that overflows")
DDFAST_UBSAN(divrem_overflow, "a division by zero")
DDFAST_UBSAN(pointer_overflow, "an address that overflows")
DDFAST_UBSAN(load_invalid_value, "a bool or enum that is none")

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
inline int block() { return (int)emulator::me().cluster->first_block + emulator::me().rank; }
inline unsigned char* shared_memory() { return emulator::my_shared().begin; }

inline void block_barrier() { emulator::wait(emulator::me().cluster->blocks[emulator::me().rank], emulator::kBlock); }
inline void warp_barrier() { emulator::wait(emulator::my_warp(), emulator::kWarp); }
inline void cluster_barrier(int) { emulator::wait(emulator::me().cluster->all, emulator::kCluster); }
inline int cluster_rank(int) { return emulator::me().rank; }
template <class T>
T* of_rank(T* mine, int rank, int) {
  const auto& shared = emulator::me().cluster->shared;
  if (rank < 0 || rank >= (int)shared.size()) emulator::fail("a rank that the cluster does not have");
  return (T*)(shared[rank]->begin + ((unsigned char*)mine - shared_memory()));
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
inline uint32_t shuffle_up(uint32_t value, int by) { return value_of_lane(value, lane() < by ? lane() : lane() - by); }
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
inline uint32_t fetch_add(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
inline uint32_t count_up(uint32_t* at) { return fetch_add(at, 1); }
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
inline void forget(int&) {}
inline uint32_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_bits(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t pack_bf16(float first, float second) { return to_bf16(first) | to_bf16(second) << 16; }

// out = c + a b, where `a_at(row, k, words of the lane that has it)` and b_at are elements. The products are exact;
// sums are cut, as far from the exact value as hardware is seen to go.
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
    // As hardware is measured to add: a few products at a time, all addends aligned to the largest and cut.
    constexpr int kTogether = 4, kBits = 25;
    float sum = simt::bits_float(words[6 + i]);
    for (int first = 0; first < depth; first += kTogether) {
      double terms[kTogether + 1] = {sum};
      for (int k = 0; k < kTogether && first + k < depth; ++k)
        terms[k + 1] = (double)a_at(all, row, first + k) * b_at(all, first + k, column);
      double largest = 0., exact = 0., cut = 0.;
      for (double term : terms) exact += term, largest = std::fmax(largest, std::fabs(term));
      int exponent;
      std::frexp(largest, &exponent);
      const double unit = std::ldexp(1., exponent - kBits);
      for (double term : terms) cut += std::trunc(term / unit) * unit;
      if (!std::isfinite(exact) || largest == 0.) cut = exact;
      sum = (float)cut;
      if (std::fabs((double)sum) > std::fabs(cut)) sum = std::nextafterf(sum, 0.f);
    }
    out[i] = sum;
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
          emulator::state.has_clusters};
  return cudaSuccess;
}

inline cudaError_t clear(void* at, size_t bytes, cudaStream_t) {
  std::memset(at, 0, bytes);
  return cudaSuccess;
}

template <class Arguments>
cudaError_t load(void (*)(Arguments)) {
  return cudaSuccess;
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, int cluster,
                   cudaStream_t, const Arguments& arguments) {
  emulator::State& s = emulator::state;
  s.error.clear();
  const bool possible = threads % 32 == 0 && threads <= 1024 && blocks % cluster == 0 && blocks < (1ll << 31) &&
                        (cluster == 1 || (s.has_clusters && cluster <= 8)) && (int)shared_bytes <= s.shared_limit;
  if (!possible) {
    s.error = "a launch that the device would refuse";
    return cudaErrorInvalidValue;
  }
  s.body = [&] { kernel(arguments); };
  const emulator::FaultGuard guard;
  emulator::run(blocks, threads, shared_bytes, cluster);
  return s.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt
}  // namespace ddfast
