// What every kernel needs from the host: threads and scratch memory. Compiled once, for the baseline instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ddfast {

// Calls body(context, begin, end) over disjoint pieces of [0, count), at most `grain` long, on up to `threads` threads
// (the caller is one of them). Pieces are handed out dynamically, so a kernel's result must not depend on the split.
// Safe after fork(); concurrent calls are safe (while one call holds the workers, others run on their own thread alone).
// An exception of a body is rethrown in the caller once every thread has left the job.
void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

// From now on threads are those of the OpenMP runtime whose `GOMP_parallel` is given (null: our own again). A process
// that uses such a runtime already must not have a second set of threads: its own spin for a while after every job, and
// ours would wait for their cores. A forked child goes back to our own, as it has none of the runtime's.
void use_openmp(void* gomp_parallel);

// Memory of the calling thread, 64-byte aligned, kept and grown between calls. One buffer per slot: a new request for
// a slot invalidates its previous contents. Throws std::bad_alloc.
enum Slot { kShared, kSharedExtra, kRow, kScores, kWeights, kAccumulators, kSupport, kNumSlots };
void* scratch(Slot slot, size_t bytes);

}  // namespace ddfast
