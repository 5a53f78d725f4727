// The N x N scores of the arcs of a step on their way through shared memory, and reductions over a block.
//
// Scores lie row after row, (N, N), and are gone through in tiles of columns (one, where a block has a thread a
// column), a tile in chunks of rows, 10 KB at most each. A ring of four chunks is in flight: while one is computed, the
// next three are being copied, across the steps, since no score depends on a message. A chunk comes in pieces of 16
// bytes wherever these lie whole in it, whatever N and the alignment: it is put into its slot as far from a multiple of
// 16 as it is in global memory, and only its ends are copied number by number. One barrier a chunk: behind it a chunk
// has arrived for all threads, and the slot of the chunk before it, which all have read, is filled again.
#pragma once
#include "device.h"

namespace hmm {

constexpr int kStages = 4, kChunk = 10240;  // bytes at most: all of a step of 50 states in float32
constexpr int kMostThreads = 512,
              kTile = 256;  // threads of a block that has whole rows; columns and threads of one that has tiles
template <class Real>
constexpr int kBlocks = sizeof(Real) == 4 ? 2 : 1;  // of as many threads: what registers must leave room for

// Sizes in numbers, not bytes.
struct Tiling {
  int states, threads;
  int groups;               // threads that share a column: those of a tile are groups x width
  int width, tiles;         // columns
  int rows, chunks,
      pitch;  // rows of a chunk; chunks of a tile; from one row of a slot to the next, 0 where rows are whole
  int slot;
};

// Whole rows where N is at most most_width, and as many threads as repay themselves; else tiles of `width` columns and
// all of most_threads. `fixed`: bytes of shared memory that the kernel needs beside the ring.
template <class Real> Tiling tiling_of(int64_t states, int most_threads, int most_width, int width, size_t fixed) {
  constexpr int V = 16 / int(sizeof(Real));
  const int N = int(states);
  const bool tiled = N > most_width;
  Tiling o = {};
  o.states = N;
  o.width = tiled ? width : N;
  o.tiles = (N + o.width - 1) / o.width;
  const int wanted = min(most_threads, N <= 8 ? 32 : N <= 16 ? 64 : N <= 32 ? 128 : 512);
  o.groups = tiled ? 1 : max(1, min(N, wanted / N));
  o.threads = tiled ? most_threads : (o.groups * N + kWarp - 1) / kWarp * kWarp;
  o.pitch = tiled ? (o.width + 2 * V - 2) / V * V : 0;
  const int left = (48 * 1024 - int(fixed)) / kStages / int(sizeof(Real)) - V;
  int most = max(1, min(N, min(kChunk / int(sizeof(Real)), left) / (tiled ? o.pitch : N)));
  if (most > o.groups) most -= most % o.groups;
  o.chunks = (N + most - 1) / most;
  o.rows = (N + o.chunks - 1) / o.chunks;
  if (most >= o.groups) o.rows = (o.rows + o.groups - 1) / o.groups * o.groups;
  o.chunks = (N + o.rows - 1) / o.rows;
  o.slot = tiled ? o.rows * o.pitch : o.rows * N + V - 1;
  return o;
}

// One chunk in shared memory.
template <class Real, bool Tiled> struct Chunk {
  static constexpr int V = 16 / int(sizeof(Real));
  const Real *slot;
  int phase, states, pitch;
  int row, rows, column, columns;  // the first, and how many

  // Scores of the chunk's row r, from the chunk's first column on.
  __device__ __forceinline__ const Real *operator[](int r) const {
    return slot + (Tiled ? r * pitch + ((phase + r * states) & (V - 1)) : phase + r * states);
  }
};

template <class Real, bool Tiled> struct Ring {
  static constexpr int V = 16 / int(sizeof(Real));
  const Tiling &o;
  Real *slots;
  int apart;           // from slot to slot
  const Real *arcs;    // of the step that is copied next
  int64_t stride, left;  // to the step after it; steps to copy
  int tile, chunk, filled, used;

  static size_t bytes(const Tiling &o) { return kStages * carved<Real>(o.slot); }

  __device__ __forceinline__ Ring(const Tiling &tiling, unsigned char *&memory) : o(tiling) {
    slots = carve<Real>(memory, o.slot);
    apart = int(carve<Real>(memory, o.slot) - slots);
    for (int stage = 2; stage < kStages; stage++) carve<Real>(memory, o.slot);
  }

  // Begins with the arcs of the first of `steps` steps. No thread reads the slots any more.
  __device__ __forceinline__ void start(const Real *first, int64_t to_next, int64_t steps) {
    arcs = first, stride = to_next, left = steps;
    tile = chunk = filled = used = 0;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; stage++) fill();
  }

  // The next chunk, of a step whose arcs are at `scores`: this one of its tile. Reached by all threads: a barrier.
  __device__ __forceinline__ Chunk<Real, Tiled> arrive(const Real *scores, int its_tile, int its_chunk) {
#if HMM_MUTATION != 3
    copy_wait<kStages - 2>();
#endif
    __syncthreads();
    fill();
    Chunk<Real, Tiled> found = at(scores, its_tile, its_chunk);
    found.slot = slots + used * apart;
    used = used + 1 == kStages ? 0 : used + 1;
    return found;
  }

  __device__ __forceinline__ void stop() { copy_wait<0>(); }

 private:
  __device__ static __forceinline__ int phase_of(const Real *x) { return int(uintptr_t(x) / sizeof(Real) % V); }

  __device__ __forceinline__ Chunk<Real, Tiled> at(const Real *scores, int its_tile, int its_chunk) const {
    Chunk<Real, Tiled> c;
    c.slot = nullptr, c.states = o.states, c.pitch = o.pitch;
    c.row = its_chunk * o.rows, c.rows = min(o.rows, o.states - c.row);
    c.column = its_tile * o.width, c.columns = min(o.width, o.states - c.column);
    c.phase = phase_of(scores + int64_t(c.row) * o.states + c.column);
    return c;
  }

  __device__ __forceinline__ void fill() {
    if (left > 0) {
      copy(slots + filled * apart, at(arcs, tile, chunk));
      if (++chunk == o.chunks) chunk = 0, tile++;
      if (tile == o.tiles) tile = 0, arcs += stride, left--;
    }
    copy_commit();
    filled = filled + 1 == kStages ? 0 : filled + 1;
  }

  __device__ __forceinline__ void copy(Real *slot, const Chunk<Real, Tiled> &c) const {
    const Real *from = arcs + int64_t(c.row) * o.states + c.column;
    const int length = Tiled ? c.columns : c.rows * o.states, runs = Tiled ? c.rows : 1;
    const int pieces = (length + 2 * V - 2) / V;  // of a run, wherever it begins
#pragma unroll 1
    for (int k = threadIdx.x; k < runs * pieces; k += blockDim.x) {
      const int run = Tiled ? k / pieces : 0, piece = (k - run * pieces) * V;
      const Real *begin = from + int64_t(run) * o.states;
      const int phase = phase_of(begin), low = max(piece, phase), high = min(piece + V, phase + length);
      Real *to = slot + run * o.pitch;
      if (high - low == V) copy_async<16>(to + piece, begin + (piece - phase));
      else
#pragma unroll 1
        for (int x = low; x < high; x++) copy_async<int(sizeof(Real))>(to + x, begin + (x - phase));
    }
  }
};

// The larger, NaN where one is NaN.
template <class Real> __device__ __forceinline__ Real larger_or_nan(Real a, Real b) { return b > a || b != b ? b : a; }

// The largest over a warp, NaN where one is NaN.
template <class Real> __device__ __forceinline__ Real warp_larger_or_nan(Real x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = larger_or_nan(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// The reductions' second half: of n numbers in shared memory, one a warp, the same for every lane. For whole warps.
template <class Real> __device__ __forceinline__ Real largest_of(const Real *x, int n) {
  int among = 1;
  while (among < n) among *= 2;
  const int lane = int(threadIdx.x) & (among - 1);
  Real found = lane < n ? x[lane] : negative_infinity<Real>();
#pragma unroll 1
  for (int lanes = among / 2; lanes > 0; lanes /= 2)
    found = larger_or_nan(found, __shfl_xor_sync(kAllLanes, found, lanes));
  return found;
}
template <class Real> __device__ __forceinline__ Real sum_of(const Real *x, int n) {
  int among = 1;
  while (among < n) among *= 2;
  const int lane = int(threadIdx.x) & (among - 1);
  Real found = lane < n ? x[lane] : Real(0);
#pragma unroll 1
  for (int lanes = among / 2; lanes > 0; lanes /= 2) found += __shfl_xor_sync(kAllLanes, found, lanes);
  return found;
}

// A maximum to take differences from: 0 where all is forbidden.
template <class Real> __device__ __forceinline__ Real or_zero(Real x) {
  return x == negative_infinity<Real>() ? Real(0) : x;
}

template <class Real> __device__ __forceinline__ void set(Real *x, int64_t n, Real value) {
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) x[k] = value;
}

// One sequence of a problem.
template <class Real> struct Sequence {
  const Real *initial, *transition, *emission, *final;  // emission and final may be null
  const Real *entry = nullptr;  // of a chunk: log messages of the frame before frame 0, in place of initial scores
  int64_t length, stride;
  int states;

  __device__ __forceinline__ Sequence(const hmm_problem &p, int64_t b)
      : initial(static_cast<const Real *>(p.initial) + b * p.initial_batch_stride),
        transition(static_cast<const Real *>(p.transition) + b * p.transition_batch_stride),
        emission(p.emission ? static_cast<const Real *>(p.emission) + b * p.time * p.states : nullptr),
        final(p.final ? static_cast<const Real *>(p.final) + b * p.final_batch_stride : nullptr),
        length(p.lengths[b]), stride(p.transition_time_stride), states(int(p.states)) {}

  // The emission of the thread's first column, for a frame that comes later: nothing waits for it yet.
  __device__ __forceinline__ Real next_emission(int64_t t) const {
    const bool any = emission && t < length && int(threadIdx.x) < states;
    return any ? emission[t * states + threadIdx.x] : negative_infinity<Real>();
  }
  // Some of its frames as a sequence of their own: those before them are known by `before`, those behind by `behind`
  // (null for none: then they are its first and last).
  __device__ __forceinline__ Sequence part(int64_t from, int64_t frames, const Real *before, const Real *behind) const {
    Sequence q = *this;
    q.transition += from * stride, q.length = frames, q.entry = before;
    if (emission) q.emission += from * states;
    if (behind) q.final = behind;
    return q;
  }
  // Scores of the arcs from frame t-1 to frame t.
  __device__ __forceinline__ const Real *arcs(int64_t t) const { return transition + (t - 1) * stride; }
};

// What a thread holds of a frame's scores besides those of arcs: of its columns, threadIdx.x and on in steps of a
// block. Emissions, and at the end final scores; the last column's are kept, which are all where there is no second.
template <class Real> struct Frame {
  const Real *emission, *final;  // null for none
  Real e, f, top_e, top_f;       // the largest of these columns, then of all

  // `ahead`: the emission of the thread's column, where that is its only one (`alone`): what next_emission gave a frame
  // ago.
  __device__ __forceinline__ Frame(const Sequence<Real> &q, int64_t t, bool alone, Real ahead)
      : emission(q.emission ? q.emission + t * q.states : nullptr), final(t == q.length - 1 ? q.final : nullptr) {
    e = f = top_e = top_f = negative_infinity<Real>();
    if (alone && !final) {
      top_e = e = ahead;
      return;
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < q.states; j += blockDim.x) {
      if (emission) top_e = fmax(top_e, e = emission[j]);
      if (final) top_f = fmax(top_f, f = final[j]);
    }
  }
  // Before a barrier, and behind it. `scratch` has two numbers a warp.
  __device__ __forceinline__ void share(Real *scratch) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    top_e = warp_max(top_e);
    if (final) top_f = warp_max(top_f);
    if (threadIdx.x % kWarp == 0) scratch[warp] = top_e, scratch[warps + warp] = top_f;
  }
  __device__ __forceinline__ void gather(const Real *scratch) {
    const int warps = blockDim.x / kWarp;
    top_e = or_zero(largest_of(scratch, warps));
    top_f = final ? or_zero(largest_of(scratch + warps, warps)) : Real(0);
  }
  // x + (its emission - their maximum) + the same for final scores.
  template <bool Tiled> __device__ __forceinline__ Real added(Real x, int j) const {
    if (emission) x += (Tiled ? emission[j] : e) - top_e;
    if (final) x += (Tiled ? final[j] : f) - top_f;
    return x;
  }
};

}  // namespace hmm
