// Every operation by which the threads of a kernel meet: barriers, warp collectives, tensor-core products, a cluster's
// shared memory, and the launch. The kernels use nothing else of CUDA, so that tests/cuda/emulator.h, which implements
// the same names, runs the same .cu files on a CPU, thread by thread.
//
// Kernels take all dynamic shared memory and one argument struct; warps are full and converged at every collective.
#pragma once

#include <cstdint>

#include "cuda_api.h"

namespace ddfast {
namespace simt {

// How many blocks a cluster may have; 0, where a launch chooses, is none.
inline bool is_cluster_size(int cluster) { return cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8; }

}  // namespace simt
}  // namespace ddfast

#ifndef DDFAST_EMULATE

#include "device.h"

namespace ddfast {
namespace simt {

__device__ __forceinline__ int thread() { return (int)threadIdx.x; }
__device__ __forceinline__ int lane() { return (int)threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return (int)threadIdx.x >> 5; }
__device__ __forceinline__ int block() { return (int)blockIdx.x; }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kAll, value, mask); }
__device__ __forceinline__ float shuffle(float value, int from) { return __shfl_sync(kAll, value, from); }
// From a lane of this one's group of kLanes, a power of two.
template <int kLanes>
__device__ __forceinline__ float shuffle_within(float value, int from) {
  return __shfl_sync(kAll, value, from, kLanes);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(kAll, value, mask); }
__device__ __forceinline__ uint32_t shuffle_up(uint32_t value, int by) {  // the lanes below `by` keep their own
  return __shfl_up_sync(kAll, value, by);
}
__device__ __forceinline__ uint64_t shuffle_up(uint64_t value, int by) {
  return (uint64_t)__shfl_up_sync(kAll, (unsigned long long)value, by);
}
__device__ __forceinline__ uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(kAll, value); }
__device__ __forceinline__ uint32_t reduce_min(uint32_t value) { return __reduce_min_sync(kAll, value); }
__device__ __forceinline__ uint32_t reduce_add(uint32_t value) { return __reduce_add_sync(kAll, value); }
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(kAll, predicate); }

__device__ __forceinline__ int count_bits(uint32_t value) { return __popc(value); }
__device__ __forceinline__ int lowest_bit(uint32_t value) { return __ffs((int)value) - 1; }

__device__ __forceinline__ void atomic_add(uint32_t* at, uint32_t value) { atomicAdd(at, value); }
// What was there before.
__device__ __forceinline__ uint32_t fetch_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
__device__ __forceinline__ uint32_t count_up(uint32_t* at) { return fetch_add(at, 1u); }
__device__ __forceinline__ void atomic_min(uint64_t* at, uint64_t value) {
  atomicMin((unsigned long long*)at, (unsigned long long)value);
}

// Two floats rounded to the nearest bf16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// out = c + a b for a 16 x K tile a, a K x 8 tile b and 16 x 8 tiles c and out, a and b in bf16. With lane = 4 g + q and
// words of two neighbours along K: a = (g, 2 q), (g + 8, 2 q), for K = 16 then (g, 2 q + 8), (g + 8, 2 q + 8);
// b = (2 q, g), then (2 q + 8, g); c and out as acc below.
__device__ __forceinline__ void mma_bf16_k8(float (&out)[4], const uint32_t* a, const uint32_t* b,
                                            const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void mma_bf16_k16(float (&out)[4], const uint32_t* a, const uint32_t* b,
                                             const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// acc += a b for a 16 x 8 tile a, an 8 x 8 tile b and a 16 x 8 tile acc; of a and b the upper 19 bits count (tf32).
// With lane = 4 g + q: a = (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b = (q, g), (q + 4, g);
// acc = (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).
__device__ __forceinline__ void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// exp(x) for x <= 0 to about 2^-21 relative, in two instructions.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
// 2^x to about 2^-22 relative, in one.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }

// The value stays, but for all that the compiler knows it is a new one: what follows from it is computed after this,
// instead of before a loop that then keeps it in registers.
__device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }

// Clusters exist from compute capability 9.0 on; elsewhere a launch has clusters of one block.
__device__ __forceinline__ int cluster_rank(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster == 1) return 0;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
#else
  (void)cluster;
  return 0;
#endif
}
// Also orders every access to shared memory, the other blocks' included, before it against those after it. A cluster of
// one block takes the block's own, cheaper barrier.
__device__ __forceinline__ void cluster_barrier(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster == 1) {
    __syncthreads();
    return;
  }
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  (void)cluster;
  __syncthreads();
#endif
}
// The address of another block's copy of an object in this block's shared memory.
template <class T>
__device__ __forceinline__ T* of_rank(T* mine, int rank, int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster == 1) return mine;
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"((uint64_t)mine), "r"(rank));
  return (T*)address;
#else
  (void)rank;
  (void)cluster;
  return mine;
#endif
}

inline cudaError_t clear(void* at, size_t bytes, cudaStream_t stream) { return cudaMemsetAsync(at, 0, bytes, stream); }

// An error where there is no code of the kernel for the current device. Code for older ones that the driver translates
// knows no clusters, in which a device that has them would launch it: every block would take itself for the first.
template <class Arguments>
cudaError_t load(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, (const void*)kernel);
  Device found;
  if (!status) status = device(&found);
  if (!status && found.clusters && attributes.ptxVersion < 90) status = cudaErrorNoKernelImageForDevice;
  return status;
}

// Asynchronous, capturable into a graph; `blocks` is a multiple of `cluster`.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, int cluster,
                   cudaStream_t stream, const Arguments& arguments) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return launch((const void*)kernel, blocks, threads, shared_bytes, cluster, stream, pointers);
}

}  // namespace simt
}  // namespace ddfast

#endif
