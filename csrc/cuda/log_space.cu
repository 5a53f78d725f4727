// Forward pass in log space, for transitions that vary over time; log_space_back.cu has the backward pass.
//
//   c_t(j)     = max_i [alpha_{t-1}(i) + phi_t(i, j)]
//   norm_t(j)  = c_t(j) - C_t + log sum_i exp(alpha_{t-1}(i) + phi_t(i, j) - c_t(j)),        C_t = max_j c_t(j)
//   alpha_t(j) = norm_t(j) + (e_t(j) - max e_t) - M_t,                                      max_j alpha_t(j) = 0
//   log Z      = log sum_j exp(alpha_{L-1}(j) + f(j)) + sum_t (C_t + max e_t + M_t)         (the sum in float64)
//
// (csrc/cpu/log_space.h: every difference is between numbers of like size, messages are centred at every step.)
//
// From both ends, with m = (L + 1) / 2, one block walks frames 0 to m-1, another one L-1 to m, against the arcs:
//
//   norm_t(i)  = log sum_j exp(phi_{t+1}(i, j) + alpha_{t+1}(j)) - C_t, and alpha_t of it as above; norm_{L-1} = 0, and
//                final scores are among frame L-1's
//   log Z      = J + log S + sum_t (C_t + max e_t + M_t),   J = max_ij [alpha_{m-1}(i) + phi_m(i, j) + alpha_m(j)],
//   S          = sum_ij exp(alpha_{m-1}(i) + phi_m(i, j) + alpha_m(j) - J)                  (join_kernel)
//
// Scores pass through shared memory (staging.h). From the front, N / 32 warps or more hold a column a thread, several
// threads a column for N up to 256; from the end, up to 32 lanes go along a row, as many as a chunk's rows leave. A
// thread takes eight arcs at once (four in float64), their maximum before their exponentials, of which there is one an
// arc and one more for these. M_t is subtracted where alpha is read, which saves a barrier. Cost a step, N^2 arcs: an
// exponential, 2 maxima, 5 additions an arc, 4 (8 in float64) bytes read, and 16 N bytes; rows of more than 128 are cut
// into tiles, where a sum goes on from tile to tile. Barriers a step: 1 and one a chunk of 10 KB: 2 for N up to 50
// in float32, 8 for 128. The join reads N^2 arcs twice, one block a sequence.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING, T none. Shared memory within 48 KB. Compiled and executed on the CPU,
// not timed.
#include "kernels.h"
#include "staging.h"
#include "walks.h"

namespace hmm {
namespace {

constexpr int kRowTile = 128;  // columns: narrower tiles, since a row's columns are shared by lanes
constexpr int kJoinThreads = 256;
// Threads at most of a block of halves_kernel: in float64, where rows are whole, 512 spill.
template <class Real, bool Large, bool RowTiles>
constexpr int kHalfThreads = Large ? kTile : RowTiles || sizeof(Real) == 4 ? kMostThreads : 384;

// One more batch of arcs into (from the end: out of) a state: (top, sum) = their log-sum, sum * exp(top), with those of
// `count` that are this thread's: `share`, share + shares, ... Messages are `middle` above what they should be.
template <class Real, class Scores>
__device__ __forceinline__ void log_sum_arcs(const Scores &scores, const Real *messages, Real middle, int share,
                                             int shares, int count, Real &top, Real &sum) {
  constexpr int kBatch = sizeof(Real) == 4 ? 8 : 4;
#pragma unroll 1
  for (int first = share; first < count; first += kBatch * shares) {
    Real x[kBatch], a[kBatch], larger = top;
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = first + k * shares;
      x[k] = negative_infinity<Real>(), a[k] = 0;
      if (r < count) x[k] = scores(r), a[k] = messages[r] - middle;
      larger = fmax(larger, x[k] + a[k]);
    }
    const Real from = or_zero(larger);
    sum *= exp(top - from);
#pragma unroll
    for (int k = 0; k < kBatch; k++)
      if (first + k * shares < count) sum += exp((x[k] - from) + a[k]);
    top = larger;
  }
}

// What a block keeps in shared memory beside the ring.
template <class Real, bool Large> struct ForwardMemory {
  Real *messages;                   // norm_t + emissions, before M_t is taken out
  Real *partial_top, *partial_sum;  // of each thread, or row
  Real *tops_c, *tops_alpha, *tops_frame;
  double *totals, *taken;  // of each warp; what has been taken out, thread 0's

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
__device__ __forceinline__ Real sweep_columns(Ring<Real, Tiled> &ring, Chunk<Real, Tiled> chunk, const Real *arcs,
                                              const Real *messages, Real middle, Real *tops, Real *sums) {
  const Tiling &o = ring.o;
  const int thread = threadIdx.x, group = Tiled ? 0 : thread / o.states, column = Tiled ? thread : thread % o.states;
  Real top_c = negative_infinity<Real>();
#pragma unroll 1
  for (int tile = 0; tile < o.tiles; tile++) {
    Real top = negative_infinity<Real>(), sum = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) chunk = ring.arrive(arcs, tile, n);
      if (group >= o.groups || column >= chunk.columns) continue;
      const auto scores = [&](int r) { return chunk[r][column + (HMM_MUTATION == 2)]; };
      log_sum_arcs(scores, messages + chunk.row, middle, group, o.groups, chunk.rows, top, sum);
    }
    top_c = fmax(top_c, top);
    if (!Tiled) tops[thread] = top, sums[thread] = sum;
    else if (column < chunk.columns) tops[chunk.column + column] = top, sums[chunk.column + column] = sum;
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
__device__ __forceinline__ Real sweep_rows(Ring<Real, Tiled> &ring, Chunk<Real, Tiled> chunk, const Real *arcs,
                                           const Real *messages, Real middle, Real *tops, Real *sums, int lanes) {
  const Tiling &o = ring.o;
  const int rows_at_once = blockDim.x / lanes, lane = int(threadIdx.x) & (lanes - 1);
  Real top_c = negative_infinity<Real>();
#pragma unroll 1
  for (int tile = 0; tile < o.tiles; tile++)
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) chunk = ring.arrive(arcs, tile, n);
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
        for (int k = lanes / 2; k > (HMM_MUTATION == 9); k /= 2) sum += __shfl_xor_sync(kAllLanes, sum, k);
        top_c = fmax(top_c, c);
        if (lane == 0 && r < chunk.rows) tops[row] = c, sums[row] = sum;
      }
    }
  return top_c;
}

// The groups' sums of state j together: c_t(j) and the logarithm of the sum, 0 where that is of nothing.
template <class Real>
__device__ __forceinline__ Real combine(const Real *tops, const Real *sums, int groups, int N, int j, Real &log_sum) {
  Real c = negative_infinity<Real>(), sum = 0;
#pragma unroll(sizeof(Real) == 4 ? 4 : 2)
  for (int g = 0; g < groups; g++) c = fmax(c, tops[g * N + j]);
#pragma unroll(sizeof(Real) == 4 ? 4 : 2)
  for (int g = 0; g < groups; g++) sum += sums[g * N + j] * exp(tops[g * N + j] - or_zero(c));
  log_sum = sum == 0 ? Real(0) : log(sum);
  return c;
}

// log Z of a whole sequence, for thread 0: from the last frame's messages, its M and what has been taken out.
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
  if (feasible) return *held.taken + log(total);
  return middle == negative_infinity<Real>() ? double(middle) : double(middle - middle);
}

template <class Real>
__device__ __forceinline__ void clear(int64_t from, int64_t frames, int64_t N, Real *alpha, Real *norm, Real *centre) {
  set(alpha + from * N, frames * N, Real(0));
  set(norm + from * N, frames * N, Real(0));
  set(centre + from, frames, Real(0));
}

// One walk of a sequence from one end; `alpha`, `norm` and `centre` are the sequence's. Returns, for thread 0, log Z
// where the walk goes through all of it, else what has been taken out: -inf where no path is left.
template <bool FromEnd, class Real, bool Large, bool Tiled>
__device__ __forceinline__ double forward_walk(const Tiling &o, unsigned char *memory, const Sequence<Real> &q,
                                               bool both, Real *alpha, Real *norm, Real *centre) {
  constexpr int kStep = FromEnd ? -1 : 1;
  constexpr bool kAhead = !Large && !Tiled;  // where a step is short, and a column one thread's
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x, warps = threads / kWarp;
  const int groups = FromEnd ? 1 : o.groups, lanes = FromEnd ? lanes_of_rows(o) : 1;
  Ring<Real, Tiled> ring(o, memory);
  const ForwardMemory<Real, Large> held(memory, N, threads);
  const Walk walk = walk_from_ends(q.length, both, FromEnd);
  const int64_t end = walk.first + kStep * walk.frames;  // behind the last frame

  Real middle = 0;  // M of the frame before
  if (thread == 0) *held.taken = 0;
  int64_t t = walk.first;
  ring.start(q.arcs(FromEnd ? t : 1), kStep * q.stride, walk.frames - 1);
  Chunk<Real, Tiled> chunk = {};
  Real ahead = q.next_emission(t);
  for (bool goes_on = walk.frames > 0; goes_on; t += kStep) {
    Frame<Real> frame(q, t, kAhead, ahead);
    ahead = kAhead ? q.next_emission(t + kStep) : Real(0);
    Real *const norm_t = norm + t * N, *const alpha_t = alpha + t * N;
    Real *const tops = Large ? norm_t : held.partial_top, *const sums = Large ? alpha_t : held.partial_sum;
    Real top_c = FromEnd ? Real(0) : negative_infinity<Real>();
    if (t == walk.first) {
      if (!FromEnd)
#pragma unroll 1
        for (int j = thread; j < N; j += threads) top_c = fmax(top_c, q.initial[j]);
    } else if (FromEnd) top_c = sweep_rows(ring, chunk, q.arcs(t + 1), held.messages, middle, tops, sums, lanes);
    else top_c = sweep_columns(ring, chunk, q.arcs(t), held.messages, middle, tops, sums);
    top_c = warp_max(top_c);
    if (thread % kWarp == 0) held.tops_c[thread / kWarp] = top_c;
    frame.share(held.tops_frame);
#if HMM_MUTATION != 1
    __syncthreads();
#endif
    const Real C = or_zero(largest_of(held.tops_c, warps));
    frame.gather(held.tops_frame);
    Real largest = negative_infinity<Real>();
#pragma unroll 1
    for (int j = thread; j < N; j += threads) {
      Real c, log_sum = 0;
      if (t == walk.first) c = FromEnd ? Real(0) : q.initial[j];
      else c = combine(tops, sums, groups, N, j, log_sum);
      const Real normal = (c - C) + log_sum, message = frame.template added<Large>(normal, j);
      norm_t[j] = normal, held.messages[j] = message;
      largest = larger_or_nan(largest, message);
    }
    largest = warp_larger_or_nan(largest);
    if (thread % kWarp == 0) held.tops_alpha[thread / kWarp] = largest;
    const bool last = t + kStep == end;
    if (last) __syncthreads();
    else chunk = ring.arrive(q.arcs(FromEnd ? t : t + 1), 0, 0);
    middle = largest_of(held.tops_alpha, warps);
    const bool feasible = middle - middle == 0;
    goes_on = feasible && !last;
#pragma unroll 1
    for (int j = thread; j < N; j += threads) alpha_t[j] = feasible ? held.messages[j] - middle : held.messages[j];
    if (thread != 0) continue;
    centre[t] = C;
    *held.taken += double(C) + double(frame.top_e) + double(frame.top_f) + double(middle);
  }
  ring.stop();
  // Frames that no path reaches.
  const int64_t from = FromEnd ? end + 1 : t, left = FromEnd ? t - end : end - t;
  clear(from, left, N, alpha, norm, centre);
  return walk.frames == q.length ? finish(held, N, q.length, middle) : thread == 0 ? *held.taken : 0;
}

// Whole sequences from the front, a block each.
template <class Real, bool Large>
__global__ void __launch_bounds__(Large ? kTile : kMostThreads, kBlocks<Real>)
    forward_kernel(hmm_problem p, Tiling o, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                   int32_t *method) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states;
  const Sequence<Real> q(p, b);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  const double z = forward_walk<false, Real, Large, Large>(o, memory, q, false, alpha, norm, centre);
  clear(q.length, T - q.length, N, alpha, norm, centre);
  if (threadIdx.x == 0) log_partition[b] = Real(z), method[b] = HMM_LOG_SPACE;
}

// Two blocks a sequence, each of which has half of the frames. RowTiles: rows in tiles.
template <class Real, bool Large, bool RowTiles>
__global__ void __launch_bounds__(kHalfThreads<Real, Large, RowTiles>, 1)
    halves_kernel(hmm_problem p, Tiling of_columns, Tiling of_rows, Real *log_partition, Real *alpha, Real *norm,
                  Real *centre, int32_t *method, double *taken) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states;
  const Sequence<Real> q(p, b);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  if (blockIdx.y == 1) {  // the whole block
    if (q.length < 2) return;
    const double out = forward_walk<true, Real, Large, RowTiles>(of_rows, memory, q, true, alpha, norm, centre);
    if (threadIdx.x == 0) taken[2 * b + 1] = out;
    return;
  }
  const double out = forward_walk<false, Real, Large, Large>(of_columns, memory, q, true, alpha, norm, centre);
  clear(q.length, T - q.length, N, alpha, norm, centre);
  if (threadIdx.x != 0) return;
  method[b] = HMM_BOTH_ENDS;
  if (q.length < 2) log_partition[b] = Real(out);
  else taken[2 * b] = out;
}

// log Z where the halves meet; J and log S in place of the centres of frames 0 and L-1, which nothing needs. A warp a
// row.
template <class Real>
__global__ void __launch_bounds__(kJoinThreads, 1)
    join_kernel(hmm_problem p, Real *log_partition, const Real *alpha, Real *centre, const double *taken) {
  HMM_SHARED_MEMORY(memory);
  constexpr int kWarps = kJoinThreads / kWarp;
  Real *const tops = carve<Real>(memory, kWarps);
  double *const sums = carve<double>(memory, kWarps);
  const int64_t b = blockIdx.x;
  const int N = int(p.states), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Sequence<Real> q(p, b);
  const int64_t m = meeting(q.length, true);
  if (m == q.length) return;  // the whole block
  const Real *const before = alpha + (b * p.time + m - 1) * N, *const behind = before + (HMM_MUTATION == 8 ? 0 : N);
  const Real *const arcs = q.arcs(m);
  Real top = negative_infinity<Real>();
  for (int i = warp; i < N; i += kWarps)
#pragma unroll 4
    for (int j = lane; j < N; j += kWarp) top = fmax(top, arcs[int64_t(i) * N + j] + (before[i] + behind[j]));
  top = warp_max(top);
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  const Real J = or_zero(largest_of(tops, kWarps));
  double total = 0;
  for (int i = warp; i < N; i += kWarps) {
    Real sum = 0;
#pragma unroll 4
    for (int j = lane; j < N; j += kWarp) sum += exp((arcs[int64_t(i) * N + j] - J) + (before[i] + behind[j]));
    total += double(sum);
  }
  total = warp_sum(total);
  if (lane == 0) sums[warp] = total;
#if HMM_MUTATION != 10
  __syncthreads();
#endif
  if (threadIdx.x != 0) return;  // no barrier follows
  for (int w = 1; w < kWarps; w++) total += sums[w];
  centre += b * p.time;
  centre[0] = J, centre[q.length - 1] = Real(log(total));
  log_partition[b] = Real(taken[2 * b] + taken[2 * b + 1] + double(J) + log(total));
}

}  // namespace

size_t log_space_workspace(const hmm_problem &p) { return 2 * sizeof(double) * size_t(p.batch); }

template <class Real, bool Large, bool RowTiles>
static int halves_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                          int32_t *method, double *taken, void *stream) {
  constexpr int kMost = kHalfThreads<Real, Large, RowTiles>, kWarps = kJoinThreads / kWarp;
  const auto fixed = ForwardMemory<Real, Large>::bytes;
  const Tiling columns = tiling_of<Real>(p.states, kMost, kMostThreads, kTile, fixed(p.states, kMost));
  const int threads = columns.threads;
  const Tiling rows =
      RowTiles ? tiling_of<Real>(p.states, threads, kRowTile, kRowTile, fixed(p.states, kMost)) : columns;
  const size_t bytes = max(Ring<Real, Large>::bytes(columns), Ring<Real, RowTiles>::bytes(rows));
  const dim3 walks(unsigned(p.batch), 2);
  const int status =
      launch(halves_kernel<Real, Large, RowTiles>, walks, threads, bytes + fixed(p.states, threads), stream, p, columns,
             rows, log_partition, alpha, norm, centre, method, taken);
  return status ? status
                : launch(join_kernel<Real>, dim3(unsigned(p.batch)), kJoinThreads,
                         carved<Real>(kWarps) + carved<double>(kWarps), stream, p, log_partition, alpha, centre, taken);
}

template <class Real>
int log_space_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                      void *workspace, void *stream) {
  if (p.batch == 0) return HMM_OK;
  const bool large = p.states > kMostThreads;
  if (p.sharing == HMM_BY_ENDS) {
    const auto halves = large                 ? halves_forward<Real, true, true>
                        : p.states > kRowTile ? halves_forward<Real, false, true>
                                              : halves_forward<Real, false, false>;
    return halves(p, log_partition, alpha, norm, centre, method, static_cast<double *>(workspace), stream);
  }
  const int most = large ? kTile : kMostThreads;
  const auto fixed = large ? ForwardMemory<Real, true>::bytes : ForwardMemory<Real, false>::bytes;
  const Tiling o = tiling_of<Real>(p.states, most, kMostThreads, kTile, fixed(p.states, most));
  const size_t bytes = Ring<Real, true>::bytes(o) + fixed(p.states, o.threads);
  return launch(large ? forward_kernel<Real, true> : forward_kernel<Real, false>, dim3(unsigned(p.batch)), o.threads,
                bytes, stream, p, o, log_partition, alpha, norm, centre, method);
}

#define HMM_OF(Real)                                                                                               \
  template int log_space_forward<Real>(const hmm_problem &, Real *, Real *, Real *, Real *, int32_t *, void *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
