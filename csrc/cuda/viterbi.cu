// Viterbi algorithm (Rabiner 1989, section III.B), for any transition.
//
//   delta_t(j) = max_i [delta_{t-1}(i) + phi_t(i, j)] + (e_t(j) - max e_t) - M_t,     max_j delta_t(j) = 0
//   from_t(j)  = the smallest i of that maximum
//   score      = sum_t (max e_t + M_t)                                                (in float64)
//
// A block goes through the frames of one sequence, with several threads a column for N up to 256; scores pass through
// shared memory (staging.h), back-pointers go to global memory as int16. The walk back is one thread's, through shared
// memory that the block fills, up to N = 512, where a step costs less than a trip to global memory; above, from global
// memory. Cost a step, N^2 arcs: 2 additions, 2 comparisons an arc, 4 (8 in float64) bytes read, and 2 N bytes of
// pointers written and read. Barriers a step: 1 and one a chunk of 10 KB: 2 for N up to 50 in float32; a
// few a chunk of pointers. Above N = 512, where a column is one thread's, messages are in global memory and read from
// the first cache, a number for all threads at once. Limits: N at most HMM_CUDA_MOST_STATES, shared memory within 48
// KB; T none. Compiled and executed on the CPU, not timed.
#include "kernels.h"
#include "staging.h"

namespace hmm {
namespace {

// What a block keeps in shared memory beside the ring; messages of many states are in `delta`, (2, N) in global memory.
template <class Real, bool Tiled> struct ViterbiMemory {
  Real *messages,
      *next;  // delta_t before M_t is taken out, and the next frame's, of which best_t is known; one array where
              // columns are shared, since they pass through those of partial maxima
  Real *partial_best;
  int *partial_from;
  Real *tops_initial, *tops_delta, *tops_frame;
  int *last_state;

  __device__ __forceinline__ ViterbiMemory(unsigned char *&memory, Real *delta, int N, int threads) {
    messages = Tiled ? delta : carve<Real>(memory, N), next = Tiled ? delta + N : messages;
    partial_best = Tiled ? nullptr : carve<Real>(memory, threads),
    partial_from = Tiled ? nullptr : carve<int>(memory, threads);
    tops_initial = carve<Real>(memory, threads / kWarp), tops_delta = carve<Real>(memory, threads / kWarp);
    tops_frame = carve<Real>(memory, 2 * (threads / kWarp));
    last_state = carve<int>(memory, 1);
  }
  static size_t bytes(int64_t N, int threads) {
    const int warps = threads / kWarp;
    return (Tiled ? 0 : carved<Real>(N) + carved<Real>(threads) + carved<int>(threads)) + 2 * carved<Real>(warps) +
           carved<Real>(2 * warps) + carved<int>(1);
  }
};

// The best arc into a column from rows `group`, group + groups, ... of a chunk; messages are `middle` above what they
// should be. A NaN makes the best NaN for good.
template <class Real, bool Tiled>
__device__ __forceinline__ void best_row(const Chunk<Real, Tiled> &c, const Real *messages, Real middle, int group,
                                         int groups, int column, Real &best, int &from) {
#pragma unroll 4
  for (int r = group; r < c.rows; r += groups) {
    const Real x = c[r][column] + (messages[c.row + r] - middle);
    if (x > best || x != x) best = x, from = c.row + r;
  }
}

// The path backwards, by one thread, from state `last` of frame L-1. Where Staged, pointers of several frames at once
// pass through `buffers`, two of `bytes` bytes, `apart` bytes from each other.
template <bool Staged>
__device__ __forceinline__ void walk_back(const int16_t *pointers, int64_t length, int N, int last,
                                          unsigned char *buffers, int apart, int bytes, int64_t *states) {
  int at = last;
  if (threadIdx.x == 0) states[length - 1] = at;
  if (!Staged) {
    if (threadIdx.x == 0)
      for (int64_t t = length - 1; t > 0; t--) states[t - 1] = at = pointers[t * N + at];
    return;
  }
  const int frames = bytes / int(sizeof(int16_t)) / N;
  int buffer = 0;
  // Frames first..end-1 are in the buffer, those before them on their way into the other one.
  auto load = [&](int64_t end, int into) {
    int16_t *const to = reinterpret_cast<int16_t *>(buffers + into * apart);
    const int64_t first = end > frames ? end - frames : 0;
    for (int k = threadIdx.x; k < int(end - first) * N; k += blockDim.x) to[k] = pointers[first * N + k];
  };
  load(length, 0);
  for (int64_t end = length; end > 0; end -= frames) {
    __syncthreads();
    load(end > frames ? end - frames : 0, 1 - buffer);
    const int64_t first = end > frames ? end - frames : 0;
    const int16_t *const held = reinterpret_cast<const int16_t *>(buffers + buffer * apart);
    if (threadIdx.x == 0)
      for (int64_t t = end - 1; t >= first && t > 0; t--) states[t - 1] = at = held[int(t - first) * N + at];
    buffer = 1 - buffer;
  }
}

// The arcs into a frame, of which the first chunk is here: the best of each column, and where it is from.
template <class Real, bool Tiled>
__device__ __forceinline__ void sweep(Ring<Real, Tiled> &ring, const Real *arcs, Real middle,
                                      const ViterbiMemory<Real, Tiled> &held, int16_t *pointers) {
  const Tiling &o = ring.o;
  const int thread = threadIdx.x, group = Tiled ? 0 : thread / o.states, column = Tiled ? thread : thread % o.states;
#pragma unroll 1
  for (int tile = 0; tile < ring.tiles(); tile++) {
    Real best = negative_infinity<Real>();
    int from = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) ring.arrive();
      const Chunk<Real, Tiled> chunk = ring.here(arcs, tile, n);
      if (group < o.groups && column < chunk.columns)
        best_row(chunk, held.messages, middle, group, o.groups, column, best, from);
    }
    if (!Tiled) held.partial_best[thread] = best, held.partial_from[thread] = from;
    else if (tile * o.width + column < o.states)
      held.next[tile * o.width + column] = best, pointers[tile * o.width + column] = int16_t(from);
  }
}

// The groups' best of column j together.
template <class Real>
__device__ __forceinline__ Real combine(const Real *partial_best, const int *partial_from, int groups, int N, int j,
                                        int &from) {
  Real best = partial_best[j];
  from = partial_from[j];
#pragma unroll 4
  for (int g = 1; g < groups; g++) {
    const Real x = partial_best[g * N + j];
    const int i = partial_from[g * N + j];
    if (x > best || x != x || (x == best && i < from)) best = x, from = i;
  }
  return best;
}

// The score and the path, when all frames are gone through; `middle`: the last frame's largest message.
template <class Real, bool Tiled>
__device__ __forceinline__ void end_path(const Ring<Real, Tiled> &ring, const ViterbiMemory<Real, Tiled> &held,
                                         Real middle, double offset, int64_t frames, int64_t time,
                                         const int16_t *pointers, Real &score, int64_t *states) {
  const bool feasible = middle - middle == 0;
  const int64_t length = feasible ? frames : 0;
  if (threadIdx.x == 0) {
    score = feasible ? Real(offset) : middle == negative_infinity<Real>() ? middle : middle - middle;
    int found = 0;
    if (length > 0)
      while (held.messages[found] != middle) found++;
    *held.last_state = found;
  }
  __syncthreads();
  set(states + length, time - length, int64_t(-1));
  if (length > 0)
    walk_back<!Tiled>(pointers, length, ring.o.states, *held.last_state, reinterpret_cast<unsigned char *>(ring.slots),
                      ring.apart * int(sizeof(Real)), ring.o.slot * int(sizeof(Real)), states);
}

template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTile : kMostThreads, kBlocks<Real>)
    viterbi_kernel(hmm_problem p, Tiling o, Real *score, Real *delta, int16_t *pointers, int64_t *states) {
  HMM_SHARED_MEMORY(memory);
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x, warp = thread / kWarp, warps = threads / kWarp;
  Ring<Real, Tiled> ring(o, memory);
  const int64_t b = blockIdx.x;
  ViterbiMemory<Real, Tiled> held(memory, delta + 2 * b * N, N, threads);
  const Sequence<Real> q(p, b);
  pointers += b * p.time * N, states += b * p.time;

  double offset = 0;  // of thread 0
  Real middle = 0;    // M of the frame before
  ring.start(q.arcs(1), q.stride, q.length - 1);
  int64_t t = 0;
  Real ahead = q.next_emission(0, 0, thread);
  for (bool goes_on = q.length > 0; goes_on; t++) {
    Frame<Real> frame(q, t, t * N, thread, !Tiled, ahead);
    ahead = Tiled ? Real(0) : q.next_emission(t + 1, (t + 1) * N, thread);
    Real top = negative_infinity<Real>(), largest = top;
    if (t > 0) sweep(ring, q.arcs(t), middle, held, pointers + t * N);
    else {
      for (int j = thread; j < N; j += threads) top = fmax(top, q.initial[j]);
      top = warp_max(top);
      if (thread % kWarp == 0) held.tops_initial[warp] = top;
    }
    frame.share(held.tops_frame);
    __syncthreads();
    frame.gather(held.tops_frame);
    top = t == 0 ? or_zero(largest_of(held.tops_initial, warps)) : Real(0);
#pragma unroll 1
    for (int j = thread; j < N; j += threads) {
      Real best;
      if (t == 0) best = q.initial[j] - top;
      else if (Tiled) best = held.next[j];
      else {
        int from;
        best = combine(held.partial_best, held.partial_from, o.groups, N, j, from);
        pointers[t * N + j] = int16_t(from);
      }
      held.next[j] = best = frame.template added<Tiled>(best, j);
      largest = larger_or_nan(largest, best);
    }
    largest = warp_larger_or_nan(largest);
    if (thread % kWarp == 0) held.tops_delta[warp] = largest;
    const bool last = t + 1 == q.length;
    if (last) __syncthreads();
    else ring.arrive(first_copier(N));
    if (Tiled) {
      Real *const old = held.messages;
      held.messages = held.next, held.next = old;
    }
    middle = largest_of(held.tops_delta, warps);
    goes_on = middle - middle == 0 && !last;
    if (thread == 0) offset += double(top) + double(frame.top_e) + double(frame.top_f) + double(middle);
  }
  ring.stop();
  end_path(ring, held, middle, offset, q.length, p.time, pointers, score[b], states);
}

}  // namespace

template <class Real>
int viterbi(const hmm_problem &p, Real *score, Real *delta, int16_t *pointers, int64_t *states, void *stream) {
  if (p.batch == 0) return HMM_OK;
  const bool tiled = p.states > kMostThreads;
  const int threads = tiled ? kTile : threads_of_columns<Real>(p.states, kMostThreads);
  const auto fixed = tiled ? ViterbiMemory<Real, true>::bytes : ViterbiMemory<Real, false>::bytes;
  const Tiling o = tiling_of<Real>(p.states, threads, kMostThreads, kTile, fixed(p.states, kMostThreads));
  const size_t bytes = Ring<Real, true>::bytes(o) + fixed(p.states, o.threads);
  return launch(tiled ? viterbi_kernel<Real, true> : viterbi_kernel<Real, false>, dim3(unsigned(p.batch)), o.threads,
                bytes, stream, p, o, score, delta, pointers, states);
}

template int viterbi<float>(const hmm_problem &, float *, float *, int16_t *, int64_t *, void *);
template int viterbi<double>(const hmm_problem &, double *, double *, int16_t *, int64_t *, void *);

}  // namespace hmm
