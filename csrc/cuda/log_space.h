// One walk of a forward pass in log space over transitions that vary over time, from either end: log_space.cu has the
// recursion and the kernels.
#pragma once
#include "kernels.h"
#include "staging.h"
#include "walks.h"

namespace hmm {
namespace {

// One more batch of arcs into (from the end: out of) a state: (top, sum) = their log-sum, sum * exp(top), with those of
// `count` that are this thread's: `share`, share + shares, ... Messages are `middle` above what they should be.
template <class Real, class Scores>
__device__ __forceinline__ void log_sum_arcs(const Scores &scores, const Real *messages, Real middle, int share,
                                             int shares, int count, Real &top, Real &sum) {
  constexpr int kBatch = kArcsAtOnce<Real>;
#pragma unroll 1
  for (int first = share; first < count; first += kBatch * shares) {
    Real x[kBatch], a[kBatch], larger = top;
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = first + k * shares, known = min(r, count - 1);  // read without a branch
      x[k] = scores(known), a[k] = messages[known] - middle;
      if (r >= count) x[k] = negative_infinity<Real>();
      larger = fmax(larger, x[k] + a[k]);
    }
    const Real from = or_zero(larger);
    sum *= exp(top - from);
#pragma unroll
    for (int k = 0; k < kBatch; k++) sum += exp((x[k] - from) + a[k]);
    top = larger;
  }
}

// What a block keeps in shared memory beside the ring.
template <class Real, bool Large> struct ForwardMemory {
  Real *messages;                   // norm_t + emissions, before M_t is taken out
  Real *partial_top, *partial_sum;  // of each thread, or row
  Real *tops_c, *tops_alpha, *tops_frame;
  double *totals, *taken;  // of each warp; what has been taken out

  __device__ __forceinline__ ForwardMemory(unsigned char *&memory, int N, int threads) {
    messages = carve<Real>(memory, N);
    partial_top = Large ? nullptr : carve<Real>(memory, threads),
    partial_sum = Large ? nullptr : carve<Real>(memory, threads);
    tops_c = carve<Real>(memory, threads / kWarp), tops_alpha = carve<Real>(memory, threads / kWarp);
    tops_frame = carve<Real>(memory, 2 * (threads / kWarp));
    totals = carve<double>(memory, threads / kWarp), taken = carve<double>(memory, 1);
  }
  static size_t bytes(int64_t N, int threads) {
    const int warps = threads / kWarp;
    return carved<Real>(N) + (Large ? 0 : 2 * carved<Real>(threads)) + 2 * carved<Real>(warps) +
           carved<Real>(2 * warps) + carved<double>(warps) + carved<double>(1);
  }
};

// The arcs into a frame, of which the first chunk is here, by columns: each thread's maximum and sum to `tops` and
// `sums`, where there are tiles each column's. Returns the largest maximum of the thread's.
template <class Real, bool Tiled>
__device__ __forceinline__ Real sweep_columns(Ring<Real, Tiled> &ring, const Real *arcs,
                                              const Real *messages, Real middle, int group, int column, Real *tops,
                                              Real *sums) {
  const Tiling &o = ring.o;
  Real top_c = negative_infinity<Real>();
#pragma unroll 1
  for (int tile = 0; tile < ring.tiles(); tile++) {
    Real top = negative_infinity<Real>(), sum = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) ring.arrive();
      const Chunk<Real, Tiled> chunk = ring.here(arcs, tile, n);
      if (group >= o.groups || column >= chunk.columns) continue;
      const auto scores = [&](int r) { return chunk[r][column + HMM_DEFECT(2)]; };
      log_sum_arcs(scores, messages + chunk.row, middle, group, o.groups, chunk.rows, top, sum);
    }
    top_c = fmax(top_c, top);
    if (!Tiled) tops[threadIdx.x] = top, sums[threadIdx.x] = sum;
    else if (tile * o.width + column < o.states)
      tops[tile * o.width + column] = top, sums[tile * o.width + column] = sum;
  }
  return top_c;
}

// Lanes that share a row: as many as leave no row of a chunk for a second round.
__device__ __forceinline__ int lanes_of_rows(const Tiling &o) {
  int lanes = kWarp;
  while (lanes > 1 && lanes * o.rows > int(blockDim.x)) lanes /= 2;
  return lanes;
}

// The same by rows, of which `lanes` lanes have one together: each row's to `tops` and `sums`, where a tile goes on
// from what the one before it left.
template <class Real, bool Tiled>
__device__ __forceinline__ Real sweep_rows(Ring<Real, Tiled> &ring, const Real *arcs,
                                           const Real *messages, Real middle, Real *tops, Real *sums, int lanes) {
  const Tiling &o = ring.o;
  const int rows_at_once = blockDim.x / lanes, lane = int(threadIdx.x) & (lanes - 1);
  Real top_c = negative_infinity<Real>();
#pragma unroll 1
  for (int tile = 0; tile < ring.tiles(); tile++)
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) ring.arrive();
      const Chunk<Real, Tiled> chunk = ring.here(arcs, tile, n);
#pragma unroll 1
      for (int first = 0; first < chunk.rows; first += rows_at_once) {
        const int r = first + threadIdx.x / lanes, row = chunk.row + r;
        Real top = negative_infinity<Real>(), sum = 0;
        if (Tiled && tile > 0 && lane == 0 && r < chunk.rows) top = tops[row], sum = sums[row];
        if (r < chunk.rows) {
          const Real *const of_row = chunk[r];
          const auto scores = [&](int j) { return of_row[j]; };
          log_sum_arcs(scores, messages + chunk.column, middle, lane, lanes, chunk.columns, top, sum);
        }
        Real c = top;
#pragma unroll 1
        for (int k = lanes / 2; k > 0; k /= 2) c = fmax(c, __shfl_xor_sync(kAllLanes, c, k));
        sum *= exp(top - or_zero(c));
#pragma unroll 1
        for (int k = lanes / 2; k > HMM_DEFECT(9); k /= 2) sum += __shfl_xor_sync(kAllLanes, sum, k);
        top_c = fmax(top_c, c);
        if (lane == 0 && r < chunk.rows) tops[row] = c, sums[row] = sum;
      }
    }
  return top_c;
}

// The groups' sums of state j together: c_t(j) and the logarithm of the sum, 0 where that is of nothing. Of `sharers`
// lanes this one takes group `first`, first + sharers, ..., at most kShare; all of a warp are here if there are more.
template <class Real>
__device__ __forceinline__ Real combine(const Real *tops, const Real *sums, int groups, int N, int j, int first,
                                        int sharers, Real &log_sum) {
  Real top[kShare], part[kShare], c = negative_infinity<Real>(), sum = 0;
#pragma unroll
  for (int k = 0; k < kShare; k++) {
    const int g = first + k * sharers, known = min(g, groups - 1) * N + j;
    top[k] = tops[known], part[k] = sums[known];
    if (g >= groups) top[k] = negative_infinity<Real>(), part[k] = 0;
    c = fmax(c, top[k]);
  }
#pragma unroll
  for (int k = kSharers / 2; k > 0; k /= 2)
    if (k < sharers) c = fmax(c, __shfl_xor_sync(kAllLanes, c, k));
#pragma unroll
  for (int k = 0; k < kShare; k++) sum += part[k] * exp(top[k] - or_zero(c));
#pragma unroll
  for (int k = kSharers / 2; k > 0; k /= 2)
    if (k < sharers) sum += __shfl_xor_sync(kAllLanes, sum, k);
  log_sum = sum == 0 ? Real(0) : log(sum);
  return c;
}

// log Z of a whole sequence, for thread 0: from the last frame's messages, its M and what has been taken out before.
template <class Real, bool Large>
__device__ __forceinline__ double finish(const ForwardMemory<Real, Large> &held, int N, int64_t length, Real middle) {
  const int thread = threadIdx.x, warps = blockDim.x / kWarp;
  const bool feasible = middle - middle == 0;
  double total = 0;
  if (feasible && length > 0)
#pragma unroll 1
    for (int j = thread; j < N; j += blockDim.x) total += exp(double(held.messages[j] - middle));
  total = warp_sum(total);
  if (thread % kWarp == 0) held.totals[thread / kWarp] = total;
  __syncthreads();
  if (thread != 0) return 0;  // no barrier follows
#pragma unroll 1
  for (int w = 1; w < warps; w++) total += held.totals[w];
  if (length == 0) return 0;
  if (feasible) return *held.taken + double(middle) + log(total);
  return middle == negative_infinity<Real>() ? double(middle) : double(middle - middle);
}

template <class Real>
__device__ __forceinline__ void clear(int64_t from, int64_t frames, int64_t N, Real *alpha, Real *norm, Real *centre) {
  set(alpha + from * N, frames * N, Real(0));
  set(norm + from * N, frames * N, Real(0));
  set(centre + from, frames, Real(0));
}

// One walk of a sequence from one end; `alpha`, `norm` and `centre` are the sequence's. Returns, for thread 0, log Z
// where the walk goes through all of it, else what has been taken out: -inf where no path is left. Where q.entry is
// known (from the front only), arcs lead into frame 0 as into the others. Early: the first `warm_up` frames are another
// chunk's; the last message of these comes to `arrived`, of 2 N numbers, and what is taken out is that of the others.
template <bool FromEnd, class Real, bool Large, bool Tiled, bool Early = false>
__device__ __forceinline__ double forward_walk(const Tiling &o, unsigned char *memory, const Sequence<Real> &q,
                                               bool both, Real *alpha, Real *norm, Real *centre, int64_t warm_up = 0,
                                               Real *arrived = nullptr) {
  constexpr int kStep = FromEnd ? -1 : 1;
  constexpr bool kAhead = !Large && !Tiled;  // where a step is short, and a column one thread's
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x, warps = threads / kWarp;
  const int groups = FromEnd ? 1 : o.groups, lanes = FromEnd ? lanes_of_rows(o) : 1;
  const int sharers_log2 = kAhead && !FromEnd ? o.sharers_log2 : 0, sharers = 1 << sharers_log2;
  const int group = Tiled || FromEnd ? 0 : thread / o.states;
  const int share = thread & (sharers - 1), column = thread >> sharers_log2;  // the (first) one that is this thread's
  Ring<Real, Tiled> ring(o, memory);
  const ForwardMemory<Real, Large> held(memory, N, threads);
  const Walk walk = walk_from_ends(q.length, both, FromEnd);
  const int64_t end = walk.first + kStep * walk.frames;  // behind the last frame

  Real middle = 0;  // M of the frame before
  if (thread == 0) *held.taken = 0;
  int64_t t = walk.first;
  const bool enters = !FromEnd && q.entry;
  ring.start(q.arcs(FromEnd ? t : enters ? 0 : 1), kStep * q.stride, walk.frames - (enters ? 0 : 1));
  if (enters) {
#pragma unroll 1
    for (int j = thread; j < N; j += threads) held.messages[j] = q.entry[j];
    ring.arrive();
  }
  int64_t at = t * N;  // where frame t is
  Real ahead = q.next_emission(t, at, column);
  for (bool goes_on = walk.frames > 0; goes_on; t += kStep, at += kStep * N) {
    Frame<Real> frame(q, t, at, column, kAhead, ahead);
    const bool early = Early && t < warm_up - HMM_DEFECT(56);
    Real *const norm_t = early ? arrived + N : norm + at, *const alpha_t = early ? arrived : alpha + at;
    Real *const tops = Large ? norm_t : held.partial_top, *const sums = Large ? alpha_t : held.partial_sum;
    Real top_c = FromEnd ? Real(0) : negative_infinity<Real>();
    const bool begins = t == walk.first && !enters;
    if (begins) {
      if (!FromEnd)
#pragma unroll 1
        for (int j = column; j < N; j += threads) top_c = fmax(top_c, q.initial[j]);
    } else if (FromEnd) top_c = sweep_rows(ring, q.arcs(t + 1), held.messages, middle, tops, sums, lanes);
    else top_c = sweep_columns(ring, q.arcs(t), held.messages, middle, group, thread - group * N, tops, sums);
    ahead = kAhead ? q.next_emission(t + kStep, at + kStep * N, column) : Real(0);
    frame.share(held.tops_frame, top_c);
    if (thread % kWarp == 0) held.tops_c[thread / kWarp] = top_c;
    if (!HMM_DEFECT(1)) __syncthreads();
    const bool last = t + kStep == end;
    const Real C = or_zero(largest_of(held.tops_c, warps));
    frame.gather(held.tops_frame);
    if (thread == threads - 1) {  // which has nothing else to do, if any has
      if (!early) centre[t] = C;
      if (!early || HMM_DEFECT(57)) *held.taken += double(C) + double(frame.top_e) + double(frame.top_f);
      if (!Early || t > warm_up) *held.taken += double(middle);
    }
    Real largest = negative_infinity<Real>();
    const int first_of_warp = (thread & -kWarp) >> sharers_log2;
#pragma unroll 1
    for (int n = 0; first_of_warp + n < N; n += threads) {  // a warp's lanes all or none, where these share columns
      if (!kAhead && column + n >= N) break;
      const int j = min(column + n, N - 1);
      Real c, log_sum = 0;
      if (begins) c = FromEnd ? Real(0) : q.initial[j];
      else c = combine(tops, sums, groups, N, j, share, sharers, log_sum);
      const Real normal = (c - C) + log_sum, message = frame.template added<Large>(normal, j);
      if (share || column + n >= N) continue;
      norm_t[j] = normal, held.messages[j] = message;
      largest = larger_or_nan(largest, message);
    }
    largest = warp_larger_or_nan(largest);
    if (thread % kWarp == 0) held.tops_alpha[thread / kWarp] = largest;
    if (last) __syncthreads();
    else ring.arrive(first_copier(N << sharers_log2));
    middle = largest_of(held.tops_alpha, warps);
    const bool feasible = middle - middle == 0;
    goes_on = feasible && !last;
#pragma unroll 1
    for (int j = thread; j < N; j += threads) {
      alpha_t[j] = feasible ? held.messages[j] - middle : held.messages[j];
      if (kAhead) break;
    }
  }
  ring.stop();
  // Frames that no path reaches.
  const int64_t from = FromEnd ? end + 1 : Early ? max(t, warm_up) : t, left = FromEnd ? t - end : end - from;
  clear(from, left, N, alpha, norm, centre);
  return walk.frames == q.length && !Early ? finish(held, N, q.length, middle)
                                             : thread == 0 ? *held.taken + double(middle) : 0;
}

// What a block of walks from the front needs.
struct ForwardBlock {
  bool large;
  Tiling tiling;
  size_t bytes;
};
template <class Real> ForwardBlock forward_block(int64_t states) {
  constexpr int kMost = kForwardThreads<Real>;
  const bool large = states > kMost;
  const auto fixed = large ? ForwardMemory<Real, true>::bytes : ForwardMemory<Real, false>::bytes;
  const int threads = large ? kTile : threads_of_columns<Real>(states, kMost);
  const Tiling o = tiling_of<Real>(states, threads, kMost, kTile, fixed(states, kMost));
  return {large, o, Ring<Real, true>::bytes(o) + fixed(states, o.threads)};
}

}  // namespace
}  // namespace hmm
