// Sequences cut into chunks of p.chunk_frames frames each, of which the last one may be shorter: the frames of a chunk,
// and what transfer.cu leaves for the walks of log_space.cu and log_space_back.cu, in the forward pass's workspace.
#pragma once
#include "kernels.h"
#include "staging.h"
#include "walks.h"

namespace hmm {

constexpr int64_t kChunkStates = 64;  // what a transfer matrix may have: its tiles are 16 x 16 threads' then

// Whether a pass cuts sequences into chunks; and into how many at most.
template <class Real> bool by_chunks(const hmm_problem &p) {
  return sizeof(Real) == 4 && p.time_varying && p.states <= kChunkStates && p.chunk_frames > 0 && p.warm_up == 0 &&
         p.time > p.chunk_frames && (p.time - 1) / p.chunk_frames < 65535;
}

struct Span {
  int64_t first, frames;  // frames: 0 or less where a sequence has no such chunk
  bool last;
};
__device__ __forceinline__ Span span_of(const hmm_problem &p, int64_t length, int64_t chunk) {
  const int64_t first = chunk * p.chunk_frames, left = length - first;
  return {first, left < p.chunk_frames ? left : p.chunk_frames, left <= p.chunk_frames};
}

// What is wrong with a chunk's matrix, for either certificate of transfer.cu.
enum { kDoesNotMix = 1, kMayHaveLost = 2 };

// P chunks a sequence.
struct Chunks {
  double *rows, *taken;    // (B, P, N), (B, P): log M(i, j) is along(i, j) + rows(i) + taken
  float *along, *against;  // (B, P, N, N), and its transpose
  float *entry, *exit;     // (B, P, N): log messages of the frame before a chunk; those into its last one from behind
  int32_t *flags, *done;   // (B, P); (B,): 1 for a sequence that is done in chunks

  static size_t bytes(const hmm_problem &p) {
    const size_t N = size_t(p.states), all = size_t(p.batch * chunks_of(p));
    return all * (sizeof(double) * (N + 1) + sizeof(float) * 2 * (N * N + N) + sizeof(int32_t)) +
           sizeof(int32_t) * size_t(p.batch);
  }
  Chunks(const hmm_problem &p, void *room) {
    const int64_t N = p.states, all = p.batch * chunks_of(p);
    rows = static_cast<double *>(room), taken = rows + all * N;
    along = reinterpret_cast<float *>(taken + all), against = along + all * N * N;
    entry = against + all * N * N, exit = entry + all * N;
    flags = reinterpret_cast<int32_t *>(exit + all * N), done = flags + all;
  }
};

// Scores of states lane and lane + 32, for whole warps.
struct Pair {
  float low, high;
  static __device__ __forceinline__ Pair of(const float *x, int N, float without) {
    const int lane = threadIdx.x % kWarp;
    const float none = negative_infinity<float>();
    return {lane >= N ? none : x ? x[lane] : without, lane + kWarp >= N ? none : x ? x[lane + kWarp] : without};
  }
  // Takes out the larger of all, and returns it: 0 where all are forbidden.
  __device__ __forceinline__ float centre() {
    const float top = or_zero(warp_max(fmax(low, high)));
    low -= top, high -= top;
    return top;
  }
  __device__ __forceinline__ void add(Pair x) { low += x.low, high += x.high; }
  __device__ __forceinline__ void put(float *to, int N) const {
    const int lane = threadIdx.x % kWarp;
    if (lane < N) to[lane] = low;
    if (lane + kWarp < N) to[lane + kWarp] = high;
  }
};

// The matrices of all chunks (transfer.cu); what is known from them at the chunks' ends (bridge.cu), and log_partition
// and method (HMM_CHUNKS) of the sequences that are done in chunks. Those that cannot be are left alone.
int transfer(const hmm_problem &p, const Chunks &chunks, void *stream);
int bridge(const hmm_problem &p, const Chunks &chunks, float *log_partition, int32_t *method, void *stream);

}  // namespace hmm
