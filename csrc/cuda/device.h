// The vocabulary of the kernels in this folder: what nvcc and tests/cpp/cuda/on_cpu.h (HMM_ON_CPU), which executes the
// same sources without a GPU, spell differently. Kernels use nothing of CUDA beside it but thread and block indices,
// __syncthreads, the _sync intrinsics and the mathematical functions.
//
// Rules that keep a kernel testable: shared memory is carved array by array, so that each has its own bounds; barriers
// and _sync intrinsics are reached by all threads of their mask, without early returns; what passes through shared
// memory within a warp needs __syncwarp; no float atomics, so that every run gives the same bits.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "hmm_speech.h"

#ifdef HMM_ON_CPU
#include "on_cpu.h"
#else
#include <cuda_runtime.h>

#define HMM_DEFECT(k) false  // a test executes the kernels with one defect or another, which must be noticed

// unsigned char *name: where the block's dynamic shared memory begins. One a kernel, first of all.
#define HMM_SHARED_MEMORY(name)                  \
  extern __shared__ float4 hmm_shared_memory[]; \
  unsigned char *name = reinterpret_cast<unsigned char *>(hmm_shared_memory)

namespace hmm {

// n numbers of shared memory, 16-byte aligned; moves `at` behind them.
template <class T> __device__ __forceinline__ T *carve(unsigned char *&at, int n) {
  T *found = reinterpret_cast<T *>(at);
  at += (n * int(sizeof(T)) + 15) / 16 * 16;
  return found;
}

// Bytes (4, 8 or 16, both sides aligned to them) from global to shared memory. They have arrived for this thread after
// copy_wait<K>, all but its K newest commits, and for the others after a barrier behind that. Before sm_80: at once.
template <int Bytes> __device__ __forceinline__ void copy_async(void *shared, const void *global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes) : "memory");
#else
  if constexpr (Bytes == 16) *static_cast<float4 *>(shared) = *static_cast<const float4 *>(global);
  else if constexpr (Bytes == 8) *static_cast<float2 *>(shared) = *static_cast<const float2 *>(global);
  else *static_cast<float *>(shared) = *static_cast<const float *>(global);
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int K> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(K) : "memory");
#endif
}

// Shared memory that a block of the current device may have, in bytes; less than 0 for a CUDA error code.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error ? -int(error) : bytes;
}

// Multiprocessors of the current device; less than 0 for a CUDA error code.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error ? -int(error) : count;
}

inline int fill_zeros(void *data, size_t bytes, void *stream) {
  const cudaError_t error = bytes ? cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)) : cudaSuccess;
  return error ? HMM_CUDA_ERROR + int(error) : HMM_OK;
}

// A stream of the current device that no other waits for.
inline int create_stream(void **stream) {
  cudaStream_t made = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  *stream = made;
  return error ? HMM_CUDA_ERROR + int(error) : HMM_OK;
}

// Starts a kernel on a stream; returns HMM_OK or HMM_CUDA_ERROR + the CUDA error code.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void *stream,
           const Arguments &...arguments) {
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (!error) {
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();
  }
  return error ? HMM_CUDA_ERROR + int(error) : HMM_OK;
}

}  // namespace hmm
#endif

namespace hmm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Real> __host__ __device__ constexpr Real negative_infinity() { return -Real(HUGE_VALF); }

// Bytes that carve<T>(n) takes.
template <class T> __host__ __device__ constexpr size_t carved(int64_t n) {
  return size_t(n * int64_t(sizeof(T)) + 15) / 16 * 16;
}

// A Piece is 16 bytes on their way from global to shared memory. Before sm_80 they wait in registers between take and
// put, so that several come at once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kFromAmpere = false;
struct Piece {
  float4 held;
  __device__ __forceinline__ void take(const void *global) { held = *static_cast<const float4 *>(global); }
  __device__ __forceinline__ void put(void *shared) const { *static_cast<float4 *>(shared) = held; }
};
#else
constexpr bool kFromAmpere = true;
struct Piece {
  const void *from;
  __device__ __forceinline__ void take(const void *global) { from = global; }
  __device__ __forceinline__ void put(void *shared) const { copy_async<16>(shared, from); }
};
#endif

template <class Real> __device__ __forceinline__ Real warp_sum(Real x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The sum over a block of kThreads, for all threads, in order; `part` holds a number a warp. Two barriers.
template <int kThreads, class Number> __device__ __forceinline__ Number block_sum(Number x, Number *part) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  if (HMM_DEFECT(14)) x = __shfl_sync(kAllLanes, x, 0);  // which is no fence
  else if (!HMM_DEFECT(16)) __syncthreads();
  x = 0;
  for (int q = 0; q < kThreads / kWarp; q++) x += part[q];
  return x;
}

// From sm_80 on the lanes of a warp find their largest integer in one instruction; numbers take five shuffles.
template <class Real> constexpr bool kComparesIntegers = kFromAmpere && sizeof(Real) == 4;
// Numbers as integers in the same order, +0 above -0, and NaN where the caller wants it.
__device__ __forceinline__ int ordered(float x, int nan) {
  const int bits = __float_as_int(x);
  return x != x ? nan : bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float from_ordered(int x) { return __int_as_float(x < 0 ? x ^ 0x7fffffff : x); }

// NaN is lost where the other number is not NaN, as with fmax.
template <class Real> __device__ __forceinline__ Real warp_max(Real x) {
  if constexpr (kComparesIntegers<Real>) return from_ordered(__reduce_max_sync(kAllLanes, ordered(x, INT32_MIN)));
  else {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
  }
}
// Of two numbers, one of which does not wait for the other.
template <class Real> __device__ __forceinline__ void warp_max_of_both(Real &x, Real &y) {
  if constexpr (kComparesIntegers<Real>) x = warp_max(x), y = warp_max(y);
  else
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const Real other_x = __shfl_xor_sync(kAllLanes, x, lanes), other_y = __shfl_xor_sync(kAllLanes, y, lanes);
      x = fmax(x, other_x), y = fmax(y, other_y);
    }
}

}  // namespace hmm
