// Executes CUDA kernels on the CPU, one fiber a CUDA thread: the same source that nvcc compiles is built by g++ with
// -DHMM_ON_CPU, for its numbers and under ThreadSanitizer (races between the threads of a block, and between blocks) or
// AddressSanitizer (bounds of global memory and of every carved array). What kernels see is here; on_cpu.cpp has the
// fibers and where they meet, apart so that it is optimised where the kernels are not.
//
//   - Barriers order memory; shuffles and ballots deliberately do not, as on the hardware.
//   - Threads that meet at different barriers or warp operations, or leave while others wait, abort with both lines.
//   - Shared memory begins as NaN, with red zones between the carved arrays; carving more than the launch gave aborts.
//   - copy_async copies as late as the waits allow; a copy that is never waited for aborts.
//   - HMM_SCHEDULE=n (n > 0) resumes threads in a random order, n being the seed, and does every other copy at once as
//     well, where others may still read; 0 or unset, by index.
//   - on_cpu::shared_memory_limit and multiprocessors are those of the device to be imitated.
//   - HMM_DEFECT=k has the kernels make the k-th mistake, HMM_DEFECT(k) in their sources.
//   - HMM_LAUNCHES names a file to which every launch adds its kernel's place in this program, and its shared memory.
//
// Not imitated: the rounding of CUDA's own expf and logf, fences and order between blocks, clusters, tensor cores. x86-64.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "hmm_speech.h"

// CUDA's words. __shared__ is left out on purpose: all shared memory is carved.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
template <class T> inline T __ldg(const T *p) { return *p; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
using std::max;
using std::min;

namespace on_cpu {

extern int shared_memory_limit;  // of a block: what sm_75 has, the least of all
extern int multiprocessors;
extern const int defect;

// The thread that runs.
struct Thread {
  uint3 index, block;
  unsigned lane;
};
extern Thread *current;
extern dim3 grid, block;

void launch(void *kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body);
void sync_threads(int line);
void sync_warp(int line);
uint64_t exchange(int line, unsigned mask, uint64_t bits, unsigned from);  // what lane `from` has given
unsigned ballot(int line, unsigned mask, bool vote);
unsigned char *shared_memory();
void *carve(unsigned char *&at, size_t bytes);
void copy_async(void *to, const void *from, int bytes);
void copy_commit();
void copy_wait(int newest);

template <class T> T shuffle(int line, unsigned mask, T x, unsigned from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  bits = exchange(line, mask, bits, from);
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest of all lanes, which are 32.
inline int reduce_max(int line, unsigned mask, int x) {
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) x = max(x, shuffle(line, mask, x, current->lane ^ lanes));
  return x;
}

}  // namespace on_cpu

#define HMM_SHARED_MEMORY(name) unsigned char *name = on_cpu::shared_memory()
#define threadIdx (on_cpu::current->index)
#define blockIdx (on_cpu::current->block)
#define blockDim (on_cpu::block)
#define gridDim (on_cpu::grid)
#define HMM_DEFECT(k) (on_cpu::defect == (k))
#define __syncthreads() on_cpu::sync_threads(__LINE__)
#define __syncwarp() on_cpu::sync_warp(__LINE__)
#define __shfl_xor_sync(mask, x, lanes) on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane ^ (lanes))
#define __shfl_sync(mask, x, lane) on_cpu::shuffle(__LINE__, mask, x, unsigned(lane))
#define __shfl_up_sync(mask, x, lanes) \
  on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane < unsigned(lanes) ? on_cpu::current->lane : on_cpu::current->lane - (lanes))
#define __shfl_down_sync(mask, x, lanes) \
  on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane + (lanes) > 31 ? on_cpu::current->lane : on_cpu::current->lane + (lanes))
#define __reduce_max_sync(mask, x) on_cpu::reduce_max(__LINE__, mask, x)
#define __ballot_sync(mask, vote) on_cpu::ballot(__LINE__, mask, bool(vote))
#define __any_sync(mask, vote) (on_cpu::ballot(__LINE__, mask, bool(vote)) != 0)
#define __all_sync(mask, vote) (on_cpu::ballot(__LINE__, mask, bool(vote)) == (mask))

namespace hmm {

template <class T> T *carve(unsigned char *&at, int n) {
  return static_cast<T *>(on_cpu::carve(at, size_t(n) * sizeof(T)));
}

template <int Bytes> void copy_async(void *to, const void *from) { on_cpu::copy_async(to, from, Bytes); }
inline void copy_commit() { on_cpu::copy_commit(); }
template <int K> void copy_wait() { on_cpu::copy_wait(K); }

inline int shared_memory_limit() { return on_cpu::shared_memory_limit; }
inline int multiprocessors() { return on_cpu::multiprocessors; }

inline int create_stream(void **stream) {
  *stream = nullptr;
  return HMM_OK;
}

inline int fill_zeros(void *data, size_t bytes, void *) {
  if (bytes) memset(data, 0, bytes);
  return HMM_OK;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void *, const Arguments &...arguments) {
  const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
  on_cpu::launch(reinterpret_cast<void *>(kernel), grid, dim3(threads), shared, [&] { std::apply(kernel, held); });
  return HMM_OK;
}

}  // namespace hmm
