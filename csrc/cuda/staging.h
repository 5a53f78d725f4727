// The N x N scores of the arcs of a step on their way through shared memory, and reductions over a block.
//
// Scores lie row after row, (N, N), and are gone through in tiles of columns (one, where a block has a thread a
// column), a tile in chunks of rows, 10 KB at most each. There is a ring of four: while one is computed, the next two
// are being copied, across the steps, since no score depends on a message. A chunk comes in pieces of 16 bytes
// wherever these lie whole in it, whatever N and the alignment: it is put into its slot as far from a multiple of 16 as
// it is in global memory, and only its ends are copied number by number. One barrier a chunk, behind which it has
// arrived for all threads. Before it, the slot of the chunk before the last one is filled again, which all have read
// since the barrier before: by the threads that would wait there while others have something to do.
#pragma once
#include "device.h"

namespace hmm {

// Adjacent threads, at most, that put together what the groups of a column have, and how many groups each takes.
constexpr int kSharers = 4, kShare = 3;
constexpr int kStages = 4, kChunk = 10240;  // bytes at most: all of a step of 50 states in float32
constexpr int kMostThreads = 512,
              kTile = 256;  // threads of a block that has whole rows; columns and threads of one that has tiles
// Threads at most of a block that walks forward over whole rows: in float64 512 spill.
template <class Real> constexpr int kForwardThreads = sizeof(Real) == 4 ? kMostThreads : 384;
// Pieces of 16 bytes that a thread copies at once, and blocks that registers must leave room for: on sm_75, 45 KB of
// shared memory let a multiprocessor have one.
#ifdef HMM_ON_CPU
constexpr int kPieces = 5;  // the longer way
#else
constexpr int kPieces = kFromAmpere ? 1 : 5;
#endif
template <class Real> constexpr int kBlocks = kFromAmpere && sizeof(Real) == 4 ? 2 : 1;

// Sizes in numbers, not bytes.
struct Tiling {
  int states, threads;
  int groups;               // threads that share a column: those of a tile are groups x width
  int width, tiles;         // columns
  int rows, chunks,
      pitch;  // rows of a chunk; chunks of a tile; from one row of a slot to the next, 0 where rows are whole
  int slot;
  int sharers_log2;  // of adjacent threads that put groups together
};
// The first of a block's threads that have nothing to finish, where `busy` have, and copy scores meanwhile: whole
// warps; 0, so that all do, where these are few.
__device__ __forceinline__ int first_copier(int busy) {
  busy = (busy + kWarp - 1) / kWarp * kWarp;
  return busy + 4 * kWarp > int(blockDim.x) ? 0 : busy;
}

// Arcs of a column, and rows, that a thread takes at once. Blocks have as many threads as leave it no more, if they may
// have so many: with others, what each warp does in a step beside its arcs would take longer than these.
template <class Real> constexpr int kArcsAtOnce = sizeof(Real) == 4 ? 10 : 4;
template <class Real> constexpr int kRowsAtOnce = sizeof(Real) == 4 ? 7 : 2;
template <class Real> int threads_of_columns(int64_t N, int most) {
  return int(N * min(most / N, (N - 1) / kArcsAtOnce<Real> + 1));
}
template <class Real> int threads_of_rows(int64_t N, int most) {
  int64_t lanes = 1;  // along a row
  while (lanes < N && lanes < kWarp) lanes *= 2;
  return int(max(int64_t(kWarp), min(int64_t(most), lanes * ((N - 1) / kRowsAtOnce<Real> + 1))));
}

// Whole rows where N is at most most_width, else tiles of `width` columns; whole warps of `threads`. `fixed`: bytes of
// shared memory that the kernel needs beside the ring.
template <class Real> Tiling tiling_of(int64_t states, int threads, int most_width, int width, size_t fixed) {
  constexpr int V = 16 / int(sizeof(Real));
  const int N = int(states);
  const bool tiled = N > most_width;
  Tiling o = {};
  o.states = N;
  o.width = tiled ? width : N;
  o.tiles = (N + o.width - 1) / o.width;
  o.groups = tiled ? 1 : max(1, min(min(N, kSharers * kShare), threads / N));
  o.threads = (threads + kWarp - 1) / kWarp * kWarp;
  o.pitch = tiled ? (o.width + 2 * V - 2) / V * V : 0;
  const int left = (48 * 1024 - int(fixed)) / kStages / int(sizeof(Real)) - V;
  int most = max(1, min(N, min(kChunk / int(sizeof(Real)), left) / (tiled ? o.pitch : N)));
  if (most < N && most > o.groups) most -= most % o.groups;
  o.chunks = (N + most - 1) / most;
  o.rows = (N + o.chunks - 1) / o.chunks;
  if (most < N && most >= o.groups) o.rows = (o.rows + o.groups - 1) / o.groups * o.groups;
  o.chunks = (N + o.rows - 1) / o.rows;
  o.sharers_log2 = o.groups <= kShare ? 0 : o.groups <= 2 * kShare ? 1 : 2;
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
    tile = chunk = filled = 0, used = -1;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 2; stage++) fill(0);
  }

  // The next chunk is here behind this. Reached by all threads: a barrier. Those from `copiers` on copy; the others,
  // where there are any, have come later.
  __device__ __forceinline__ void arrive(int copiers = 0) {
    fill(copiers);
    if (!HMM_DEFECT(3)) copy_wait<kStages - 2>();
    __syncthreads();
    used = used + 1 == kStages ? 0 : used + 1;
  }

  // The one that is here, of a step whose arcs are at `scores`: which one of its tile. It is not carried from step to
  // step: the compiler would lose sight of its pointer being one to shared memory.
  __device__ __forceinline__ Chunk<Real, Tiled> here(const Real *scores, int its_tile, int its_chunk) const {
    Chunk<Real, Tiled> found = at(scores, its_tile, its_chunk);
    found.slot = slots + used * apart;
    return found;
  }

  __device__ __forceinline__ void stop() { copy_wait<0>(); }
  __device__ __forceinline__ int tiles() const { return Tiled ? o.tiles : 1; }

 private:
  __device__ static __forceinline__ int phase_of(const Real *x) { return int(uintptr_t(x) / sizeof(Real) % V); }

  __device__ __forceinline__ Chunk<Real, Tiled> at(const Real *scores, int its_tile, int its_chunk) const {
    Chunk<Real, Tiled> c;
    c.slot = nullptr, c.states = o.states, c.pitch = o.pitch;
    c.row = its_chunk * o.rows, c.rows = min(o.rows, o.states - c.row);
    c.column = Tiled ? its_tile * o.width : 0, c.columns = Tiled ? min(o.width, o.states - c.column) : o.states;
    c.phase = phase_of(scores + int64_t(c.row) * o.states + c.column);
    return c;
  }

  // By the block's threads from `first` on.
  __device__ __forceinline__ void fill(int first) {
    if (left > 0) {
      copy(slots + filled * apart, at(arcs, tile, chunk), first);
      if (++chunk == o.chunks) chunk = 0, tile++;
      if (tile == tiles()) tile = 0, arcs += stride, left--;
    }
    copy_commit();
    filled = filled + 1 == kStages ? 0 : filled + 1;
  }

  __device__ __forceinline__ void copy(Real *slot, const Chunk<Real, Tiled> &c, int first) const {
    const Real *from = arcs + int64_t(c.row) * o.states + c.column;
    const int length = Tiled ? c.columns : c.rows * o.states, runs = Tiled ? c.rows : 1;
    const int pieces = (length + 2 * V - 2) / V;  // of a run, wherever it begins
    const int stride = int(blockDim.x) - (HMM_DEFECT(62) ? 0 : first), mine = int(threadIdx.x) - first;
#pragma unroll 1
    for (int all = mine; mine >= 0 && all < runs * pieces; all += kPieces * stride) {
      Piece whole[kPieces];
      // Piece u to `to`, where it lies whole in its run; else, of numbers low..high-1 of the run's pieces, one by one.
      const auto piece = [&](int u, auto &&visit) {
        const int k = all + u * stride;
        if (k >= runs * pieces) return;
        const int run = Tiled ? k / pieces : 0, at = (k - run * pieces) * V;
        const Real *const begin = from + int64_t(run) * o.states;
        const int phase = phase_of(begin), low = max(at, phase), high = min(at + V, phase + length);
        visit(slot + run * o.pitch, [=](int x) { return begin + (x - phase); }, at, low, high);
      };
#pragma unroll
      for (int u = 0; u < kPieces; u++)
        piece(u, [&](Real *, const auto &source, int at, int low, int high) {
          if (high - low == V) whole[u].take(source(at));
        });
#pragma unroll
      for (int u = 0; u < kPieces; u++)
        piece(u, [&](Real *to, const auto &source, int at, int low, int high) {
          if (high - low == V) whole[u].put(to + at);
          else
#pragma unroll 1
            for (int x = low; x < high; x++) copy_async<int(sizeof(Real))>(to + x, source(x));
        });
    }
  }
};

// The larger, NaN where one is NaN.
template <class Real> __device__ __forceinline__ Real larger_or_nan(Real a, Real b) { return b > a || b != b ? b : a; }

// The largest over a warp, NaN where one is NaN.
template <class Real> __device__ __forceinline__ Real warp_larger_or_nan(Real x) {
  if constexpr (kComparesIntegers<Real>) return from_ordered(__reduce_max_sync(kAllLanes, ordered(x, INT32_MAX)));
  else {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = larger_or_nan(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
  }
}

// The reductions' second half: of n numbers in shared memory, one a warp, the same for every lane. For whole warps.
constexpr int kMostWarps = kMostThreads / kWarp;
template <class Real> __device__ __forceinline__ Real largest_of(const Real *x, int n) {
  const int lane = int(threadIdx.x) & (kMostWarps - 1);
  Real found = lane < n ? x[lane] : negative_infinity<Real>();
  if constexpr (kComparesIntegers<Real>) return warp_larger_or_nan(found);
  else {
#pragma unroll
    for (int lanes = kMostWarps / 2; lanes > 0; lanes /= 2)
      found = larger_or_nan(found, __shfl_xor_sync(kAllLanes, found, lanes));
    return found;
  }
}
template <class Real> __device__ __forceinline__ Real sum_of(const Real *x, int n) {
  const int lane = int(threadIdx.x) & (kMostWarps - 1);
  Real found = lane < n ? x[lane] : Real(0);
#pragma unroll
  for (int lanes = kMostWarps / 2; lanes > 0; lanes /= 2) found += __shfl_xor_sync(kAllLanes, found, lanes);
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

  // The emission of a column, if there is one, for a frame that comes later: nothing waits for it yet. `at`: t states.
  __device__ __forceinline__ Real next_emission(int64_t t, int64_t at, int column) const {
    const bool any = emission && t < length && column < states;
    return any ? emission[at + column] : negative_infinity<Real>();
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

// What a thread holds of a frame's scores besides those of arcs: of its columns, the first one and on in steps of a
// block. Emissions, and at the end final scores; the last column's are kept, which are all where there is no second.
template <class Real> struct Frame {
  const Real *emission, *final;  // null for none
  Real e, f, top_e, top_f;       // the largest of these columns, then of all

  // `at`: t states. Of the thread's columns the first is `column`. `ahead`: its emission, where it is the only one
  // (`alone`): what next_emission gave a frame ago.
  __device__ __forceinline__ Frame(const Sequence<Real> &q, int64_t t, int64_t at, int column, bool alone, Real ahead)
      : emission(q.emission ? q.emission + at : nullptr), final(t == q.length - 1 ? q.final : nullptr) {
    e = f = top_e = top_f = negative_infinity<Real>();
    if (alone && !final) {
      top_e = e = ahead;
      return;
    }
#pragma unroll 1
    for (int j = column; j < q.states; j += blockDim.x) {
      if (emission) top_e = fmax(top_e, e = emission[j]);
      if (final) top_f = fmax(top_f, f = final[j]);
    }
  }
  // Before a barrier, with a maximum of the caller's over a warp or without, and behind it. `scratch` has two numbers a
  // warp.
  __device__ __forceinline__ void share(Real *scratch, Real &other) {
    warp_max_of_both(top_e, other);
    share_warps(scratch);
  }
  __device__ __forceinline__ void share(Real *scratch) {
    top_e = warp_max(top_e);
    share_warps(scratch);
  }
  __device__ __forceinline__ void share_warps(Real *scratch) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
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
