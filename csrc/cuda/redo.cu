// Forward-backward in log space with messages in float64, for transitions that do not vary over time: what the scaled
// sweeps cannot certify, and transitions of each sequence's own with more states than scaled.cu takes.
//
//   x_t(j)     = log sum_i exp(alpha_{t-1}(i) + phi(i, j)) + e_t(j),     D_t = max_j x_t(j) as a Real
//   alpha_t(j) = x_t(j) - D_t;           log Z = log sum_j exp(alpha_{L-1}(j)) + sum_t D_t
//   p(i | j)   = exp(alpha_{t-1}(i) + phi(i, j) - n_t(j)),               n_t(j) = alpha_t(j) + D_t - e_t(j)
//   gamma_{t-1}(i) = sum_j p(i | j) gamma_t(j) / what these sum to;      counts(i, j) = grad sum_t p(i | j) gamma_t(j)
//
// e_t counts the initial scores of frame 0 and the final ones of frame L-1 in. A path that wins in the end may lie
// thousands of nats below the best at t, where float32 has a spacing of 5e-4. So messages, and the differences that
// exponentials are taken of, are float64; the exponentials, of differences at most a few, and sums of up to N of them
// are Reals, exact to 2^-22. alpha_t(j) is stored as two Reals, alpha the nearest one and norm the rest: 48 bits for
// float32. D_t is a Real and exact.
//
// Forward and backward: one block a sequence, one that is not lost ends at once; the arcs come from the caches.
// Forward, N up to 512: threads / N threads a column, up to eight arcs at once; backward, a warp a row, four rows at
// once. Counts: every arc is one thread's, over a range of frames, as in counts.cu.
//
//   launches   1 forward, 2 backward
//   a frame    N^2 arcs, an exponential and 2 additions in float64 each, forward, backward and in the counts;
//              N logarithms in float64; 4 N^2 bytes of arcs from the caches and 24 N bytes forward, 32 N backward
//              (float)
//   a step     3 barriers
//   limits     N of at most HMM_CUDA_MOST_STATES: beyond kRows, messages pass through shared memory by tiles. T none.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "kernels.h"
#include "redo.h"

namespace hmm {
namespace {

constexpr int kRows = 1024;  // of messages that shared memory holds
constexpr int kRedoThreads = 512, kBackThreads = 256;

// ---- forward

// The groups' sums of column j together: x_t(j) without its local scores.
template <class Real>
__device__ __forceinline__ double combine_groups(const double *tops, const Real *sums, int groups, int N, int j) {
  double top = negative_infinity<double>();
  Real sum = 0;
#pragma unroll 1
  for (int g = 0; g < groups; g++) top = fmax(top, tops[g * N + j]);
#pragma unroll 1
  for (int g = 0; g < groups; g++) sum += sums[g * N + j] * exp(Real(tops[g * N + j] - or_zero(top)));
  return top + log(double(sum));
}

// What a block keeps in shared memory.
template <class Real> struct RedoMemory {
  double *messages, *tops, *partial_top;  // alpha_{t-1}, of a tile where N > kRows; a number a warp; one a thread
  Real *partial_sum;
  __device__ __forceinline__ RedoMemory(unsigned char *&memory, int N, int threads)
      : messages(carve<double>(memory, min(N, kRows))), tops(carve<double>(memory, threads / kWarp)),
        partial_top(carve<double>(memory, threads)), partial_sum(carve<Real>(memory, threads)) {}
  static size_t bytes(int64_t N, int threads) {
    return carved<double>(min(N, int64_t(kRows))) + carved<double>(threads / kWarp) + carved<double>(threads) +
           carved<Real>(threads);
  }
};

// x_t without local scores, of column `column` (N or more for none), for the first of the threads that share it. alpha,
// norm: of the frame before. Reached by all threads: barriers.
template <class Real>
__device__ __forceinline__ double column_sum(const RedoMemory<Real> &held, const Sequence<Real> &q, const Real *alpha,
                                             const Real *norm, int column, int group, int groups) {
  const int N = q.states;
  LogSum<Real> sum;
#pragma unroll 1
  for (int first = 0; first < N; first += kRows) {
    const int rows = min(kRows, N - first);
    if (N > kRows) {
      __syncthreads();  // the tile before is read
      for (int r = threadIdx.x; r < rows; r += blockDim.x) held.messages[r] = joined(alpha[first + r], norm[first + r]);
      __syncthreads();
    }
    if (column < N) sum.add(q.transition + int64_t(first) * N + column, N, held.messages, rows, group, groups);
  }
  if (groups == 1) return sum.top + log(double(sum.sum));
  held.partial_top[threadIdx.x] = sum.top, held.partial_sum[threadIdx.x] = sum.sum;
  if (!HMM_DEFECT(4)) __syncthreads();
  return threadIdx.x < unsigned(N) ? combine_groups(held.partial_top, held.partial_sum, groups, N, int(threadIdx.x))
                                   : 0;
}

// Of a frame, from the one before: x_t, then alpha_t = x_t - D_t. Returns max x_t; of the last frame, mass is what
// exp(alpha_t) of this thread's columns sums to.
template <class Real>
__device__ __forceinline__ double redo_step(const RedoMemory<Real> &held, const Sequence<Real> &q, int64_t t,
                                            int groups, Real *alpha, Real *norm, bool last, double &mass) {
  const int N = q.states, thread = threadIdx.x, threads = blockDim.x, shared_by = groups > 1 ? N : threads;
  const Local<Real> local(q, t);
  double largest = negative_infinity<double>(), x = 0;
#pragma unroll 1
  for (int first = 0; first < N; first += threads) {
    const int group = groups > 1 ? thread / shared_by : 0, column = groups > 1 ? thread % shared_by : first + thread;
    x = 0;
    if (t > 0) x = column_sum(held, q, alpha - N, norm - N, group < groups ? column : N, group, groups);
    if (group > 0 || column >= N) continue;
    x += local(column);
    if (N > threads) split(x, alpha[column], norm[column]);
    largest = larger_or_nan(largest, x);
  }
  largest = block_larger_or_nan(largest, held.tops);
  const double centre = is_finite(largest) ? double(Real(largest)) : 0;
#pragma unroll 1
  for (int j = thread; j < N; j += threads) {
    const double message = (N > threads ? joined(alpha[j], norm[j]) : x) - centre;
    split(message, alpha[j], norm[j]);
    if (N <= kRows) held.messages[j] = message;
    if (last) mass += exp(message);
  }
  __syncthreads();
  return largest;
}

template <class Real>
__global__ void __launch_bounds__(kRedoThreads, 1)
    redo_forward_kernel(hmm_problem p, int groups, bool all, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                        int32_t *method) {
  const int64_t b = blockIdx.x;
  if (!all && method[b] != HMM_REDONE) return;  // the whole block
  HMM_SHARED_MEMORY(memory);
  const int N = p.states, thread = threadIdx.x;
  const RedoMemory<Real> held(memory, N, blockDim.x);
  const Sequence<Real> q(p, b);
  alpha += b * p.time * N, norm += b * p.time * N, centre += b * p.time;

  double offset = 0, largest = 0, mass = 0;
  int64_t t = 0;
  for (; t < q.length && is_finite(largest); t++) {
    largest = redo_step(held, q, t, groups, alpha + t * N, norm + t * N, t == q.length - 1, mass);
    offset += double(Real(largest));
    if (thread == 0) centre[t] = Real(largest);
  }
  set(alpha + t * N, (p.time - t) * N, Real(0));
  set(norm + t * N, (p.time - t) * N, Real(0));
  set(centre + t, p.time - t, Real(0));
  mass = warp_sum(mass);
  if (thread % kWarp == 0) held.tops[thread / kWarp] = mass;
  __syncthreads();
  mass = sum_of(held.tops, blockDim.x / kWarp);
  if (thread != 0) return;  // no barrier follows
  method[b] = HMM_REDONE;
  const double infeasible = largest == negative_infinity<double>() ? largest : largest - largest;
  log_partition[b] = q.length == 0 ? Real(0) : Real(is_finite(largest) ? offset + log(mass) : infeasible);
}

// ---- backward

// gamma_{t-1} of rows, not yet normalised, from a tile of columns of t: `first` and on. A warp a row. Returns what the
// rows of which this lane is the first one sum to, behind the last tile.
template <class Real>
__device__ __forceinline__ Real redo_rows(const Sequence<Real> &q, const double *entries, const Real *gamma, int first,
                                          int columns, const Real *alpha, const Real *norm, Real *before) {
  constexpr int kBatch = 4;
  const int N = q.states, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Real all = 0;
#pragma unroll 1
  for (int row = warp; row < N; row += kBatch * warps) {
    double a[kBatch];
    Real sum[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int i = row + k * warps;
      a[k] = i < N ? joined(alpha[i], norm[i]) : negative_infinity<double>(), sum[k] = 0;
    }
#pragma unroll 1
    for (int j = lane; j < columns; j += kWarp) {
      const double n = entries[j];
      const Real weight = gamma[j];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int i = row + k * warps;
        if (i < N) sum[k] += exp(Real((double(q.transition[int64_t(i) * N + first + j]) + a[k]) - n)) * weight;
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int i = row + k * warps;
      sum[k] = warp_sum(sum[k]);
      if (i >= N || lane != 0) continue;
      if (first > 0) sum[k] += before[i];
      before[i] = sum[k];
      if (first + columns == N) all += sum[k];
    }
  }
  return all;
}

// gamma of all frames, from the last one on; alpha, norm, centre, state: of the sequence.
template <class Real>
__device__ __forceinline__ void redo_walk(const Sequence<Real> &q, unsigned char *memory, const Real *alpha,
                                          const Real *norm, const Real *centre, Real *state) {
  const int N = q.states, thread = threadIdx.x, threads = blockDim.x;
  double *entries = carve<double>(memory, min(N, kRows));
  Real *gamma = carve<Real>(memory, min(N, kRows)), *sums = carve<Real>(memory, threads / kWarp);
  int64_t t = q.length - 1;
  Real sum = 0;
#pragma unroll 1
  for (int j = thread; j < N; j += threads)
    sum += state[t * N + j] = exp(Real(joined(alpha[t * N + j], norm[t * N + j])));
  for (;; t--) {
    const Local<Real> local(q, t);
    const Real *alpha_t = alpha + t * N, *norm_t = norm + t * N;
    Real *state_t = state + t * N;
    const auto hold = [&](int j, int at) {
      gamma[at] = state_t[j];
      entries[at] = entry(local, alpha_t[j], norm_t[j], centre[t], state_t[j], j);
    };
    sum = warp_sum(sum);
    if (thread % kWarp == 0) sums[thread / kWarp] = sum;
    __syncthreads();
    // The mass of gamma is exact: normalising it here keeps rounding errors from adding up over time.
    const Real scale = 1 / sum_of(sums, threads / kWarp);
#pragma unroll 1
    for (int j = thread; j < N; j += threads) {
      state_t[j] *= scale;
      if (N <= kRows) hold(j, j);
    }
    if (t == 0) return;
    if (!HMM_DEFECT(5)) __syncthreads();
    sum = 0;
#pragma unroll 1
    for (int first = 0; first < N; first += kRows) {
      const int columns = min(kRows, N - first);
      if (N > kRows) {
        __syncthreads();  // the tile before is read
        for (int j = thread; j < columns; j += threads) hold(first + j, j);
        __syncthreads();
      }
      sum += redo_rows(q, entries, gamma, first, columns, alpha_t - N, norm_t - N, state_t - N);
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kBackThreads, 1)
    redo_backward_kernel(hmm_problem p, const Real *grad, const Real *log_partition, const Real *alpha,
                         const Real *norm, const Real *centre, const int32_t *method, Real *state) {
  const int64_t b = blockIdx.x, N = p.states;
  if (method[b] != HMM_REDONE) return;  // the whole block
  HMM_SHARED_MEMORY(memory);
  const Sequence<Real> q(p, b);
  const Real z = log_partition[b], g = grad[b];
  state += b * p.time * N;
  const bool infeasible = z == negative_infinity<Real>(), invalid = z - z != 0 && !infeasible;
  if (invalid || infeasible || g == 0) set(state, q.length * N, invalid ? z - z : Real(0));
  else if (q.length > 0) {
    redo_walk(q, memory, alpha + b * p.time * N, norm + b * p.time * N, centre + b * p.time, state);
    __syncthreads();
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < q.length * N; k += blockDim.x) state[k] *= g;
  }
  set(state + q.length * N, (p.time - q.length) * N, Real(0));
}

// ---- counts

constexpr int kArcs = 32, kFrames = 32,
              kArcsEach = 4;  // a block's tile is kArcs^2, kArcsEach a thread; frames at a time

// As counts_kernel (counts.cu), to whose blocks this adds: of sequences that were done again, from their posteriors
// (times grad).
template <class Real>
__global__ void __launch_bounds__(256, 2)
    redo_counts_kernel(hmm_problem p, int64_t frames, const Real *alpha, const Real *norm, const Real *centre,
                       const int32_t *method, const Real *state, Real *edge) {
  HMM_SHARED_MEMORY(at);
  double *left = carve<double>(at, kFrames * kArcs), *right = carve<double>(at, kFrames * kArcs);
  Real *weight = carve<Real>(at, kFrames * kArcs);
  const int N = p.states, tiles = (N + kArcs - 1) / kArcs, i0 = blockIdx.x / tiles * kArcs,
            j0 = blockIdx.x % tiles * kArcs;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, j = j0 + lane;  // arcs from i0 + warp + 8 m to j
  const int64_t T = p.time, begin = blockIdx.y * frames, end = min(begin + frames, p.batch * T);
  double arcs[kArcsEach], total[kArcsEach];
#pragma unroll
  for (int m = 0; m < kArcsEach; m++) {
    const int i = i0 + warp + m * (kArcs / kArcsEach);
    arcs[m] = i < N && j < N ? double(Sequence<Real>(p, begin / T).transition[int64_t(i) * N + j])
                             : negative_infinity<double>(),
    total[m] = 0;
  }
  bool any = false;
#pragma unroll 1
  for (int64_t b = begin / T; b * T < end; b++) {
    if (method[b] != HMM_REDONE) continue;
    const Sequence<Real> q(p, b);
    const int64_t from = max(begin - b * T, int64_t(1)), to = min(end - b * T, q.length);
    any = true;
#pragma unroll 1
    for (int64_t first = from; first < to; first += kFrames) {
      const int held = int(min(int64_t(kFrames), to - first));
      __syncthreads();
      for (int k = threadIdx.x; k < held * kArcs; k += blockDim.x) {
        const int64_t t = first + k / kArcs, row = (b * T + t) * N;
        const int i = i0 + k % kArcs, column = j0 + k % kArcs;
        left[k] = i < N ? joined(alpha[row - N + i], norm[row - N + i]) : 0;
        weight[k] = column < N ? state[row + column] : Real(0);
        right[k] = column < N ? entry(Local<Real>(q, t), alpha[row + column], norm[row + column], centre[b * T + t],
                                      weight[k], column)
                              : 0;
      }
      __syncthreads();
      Real sum[kArcsEach] = {};
#pragma unroll 1
      for (int k = 0; k < held * kArcs; k += kArcs) {
        const double n = right[k + lane + HMM_DEFECT(6)];
        const Real w = weight[k + lane];
#pragma unroll
        for (int m = 0; m < kArcsEach; m++)
          sum[m] += exp(Real((arcs[m] + left[k + warp + m * (kArcs / kArcsEach)]) - n)) * w;
      }
#pragma unroll
      for (int m = 0; m < kArcsEach; m++) total[m] += double(sum[m]);
    }
  }
  if (!any) return;
  Real *out = edge + int64_t(blockIdx.y) * N * N;
#pragma unroll
  for (int m = 0; m < kArcsEach; m++) {
    const int i = i0 + warp + m * (kArcs / kArcsEach);
    if (i >= N || j >= N) continue;
    Real &arc = out[int64_t(i) * N + j];
    arc = Real(double(arc) + total[m]);
  }
}

}  // namespace

template <class Real>
int redo_forward(const hmm_problem &p, bool all, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                 int32_t *method, void *stream) {
  const int N = int(p.states), wanted = N <= 8 ? 32 : N <= 16 ? 64 : N <= 32 ? 128 : N <= 64 ? 256 : kRedoThreads;
  const int groups = max(1, min(N, wanted / N)), threads = min(kRedoThreads, (groups * N + kWarp - 1) / kWarp * kWarp);
  return launch(redo_forward_kernel<Real>, dim3(unsigned(p.batch)), threads, RedoMemory<Real>::bytes(N, threads),
                stream, p, groups, all, log_partition, alpha, norm, centre, method);
}

template <class Real>
int redo_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                  const Real *norm, const Real *centre, const int32_t *method, Real *state, void *stream) {
  const int64_t held = min(p.states, int64_t(kRows));
  const size_t bytes = carved<double>(held) + carved<Real>(held) + carved<Real>(kBackThreads / kWarp);
  return launch(redo_backward_kernel<Real>, dim3(unsigned(p.batch)), kBackThreads, bytes, stream, p, grad,
                log_partition, alpha, norm, centre, method, state);
}

template <class Real>
int redo_counts(const hmm_problem &p, const Real *alpha, const Real *norm, const Real *centre, const int32_t *method,
                const Real *state, Real *edge, void *stream) {
  const unsigned tiles = unsigned((p.states + kArcs - 1) / kArcs);
  const size_t bytes = 2 * carved<double>(kFrames * kArcs) + carved<Real>(kFrames * kArcs);
  return launch(redo_counts_kernel<Real>, dim3(tiles * tiles, unsigned(count_blocks(p))), 256, bytes, stream, p,
                frames_a_block(p), alpha, norm, centre, method, state, edge);
}

#define HMM_OF(Real)                                                                                             \
  template int redo_forward<Real>(const hmm_problem &, bool, Real *, Real *, Real *, Real *, int32_t *, void *); \
  template int redo_backward<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *,  \
                                   const Real *, const int32_t *, Real *, void *);                               \
  template int redo_counts<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const int32_t *, \
                                 const Real *, Real *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
