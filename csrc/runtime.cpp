#include "runtime.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace ddfast {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` does nothing on most processors, so that all spins would last no time
#endif
}

// Long enough to bridge the gap between two ops of one step, short enough not to steal a core from other threads.
constexpr int kSpins = 2000;

// One job, whose pieces threads take from each other until none is left.
struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;

  void take_pieces() {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= count) return;
        body(context, begin, begin + grain < count ? begin + grain : count);
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) {
      job.take_pieces();
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
      job_ = &job;
      free_seats_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.take_pieces();
    std::unique_lock<std::mutex> lock(mutex_);
    free_seats_ = 0;  // late workers stay out: the job ends with this call
    if (seated_ != 0) {
      lock.unlock();
      for (int i = 0; i < kSpins && seated_.load(std::memory_order_acquire) != 0; ++i) pause();
      lock.lock();
      left_.wait(lock, [this] { return seated_ == 0; });
    }
  }

 private:
  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (free_seats_ == 0) continue;
        --free_seats_;
        ++seated_;
        job = job_;
      }
      job->take_pieces();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--seated_ == 0) left_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job is running
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> seated_{0};
  int free_seats_ = 0, workers_ = 0;
  Job* job_ = nullptr;  // of the call that is running: no worker is seated when it returns
};

// Never destroyed: parked workers must not outlive their mutex at interpreter exit. A forked child has none of the
// workers and perhaps a locked mutex, so it starts again with a pool of its own.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
    (void)registered;
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

// GOMP_parallel: runs the function once in every thread of a team, the caller's included.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<Team> g_team{nullptr};

struct Buffers {
  void* data[kNumSlots] = {};
  size_t size[kNumSlots] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  if (threads <= 1 || pieces <= 1) {
    body(context, 0, count);
    return;
  }
  Job job{body, context, count, grain, {}, {}, {}};
  // A team of always the same size, though some of it may find no piece: for a smaller one the runtime ends threads,
  // which PyTorch's next job has to start again.
  if (Team team = g_team.load(std::memory_order_acquire))
    team([](void* shared) { static_cast<Job*>(shared)->take_pieces(); }, &job, static_cast<unsigned>(threads), 0);
  else
    pool().run(job, threads < pieces ? threads : static_cast<int>(pieces));
  if (job.error) std::rethrow_exception(job.error);
}

void use_openmp(void* gomp_parallel) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_team.store(nullptr); });
  (void)registered;
  g_team.store(reinterpret_cast<Team>(gomp_parallel), std::memory_order_release);
}

void* scratch(Slot slot, size_t bytes) {
  thread_local Buffers buffers;
  if (buffers.size[slot] < bytes) {
    std::free(buffers.data[slot]);
    buffers.data[slot] = nullptr;
    buffers.size[slot] = 0;
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffers.data[slot] = std::aligned_alloc(64, rounded);
    if (buffers.data[slot] == nullptr) throw std::bad_alloc();
    buffers.size[slot] = rounded;
  }
  return buffers.data[slot];
}

}  // namespace ddfast
