// Forward-backward through R classes in log space with messages in float64: what low_rank.cu could not certify. The
// twin in torch is hmm_speech/hmm/low_rank_redo.py; messages and their precision are those of redo.cu.
//
//   u_t(r) = log sum_i exp(alpha_{t-1}(i) + left(i, r)),   x_t(j) = log sum_r exp(u_t(r) + right(r, j)) + e_t(j)
//   alpha_t = x_t - D_t, D_t = max_j x_t(j) as a Real;     log Z = log sum_j exp(alpha_{L-1}(j)) + sum_t D_t
//   p(r | j) = exp(u_t(r) + right(r, j) - n_t(j)),         n_t(j) = alpha_t(j) + D_t - e_t(j)
//   p(i | r) = exp(alpha_{t-1}(i) + left(i, r) - u_t(r))
//   g_t(r) = sum_j p(r | j) gamma_t(j),  gamma_{t-1}(i) = sum_r p(i | r) g_t(r), made to sum to 1
//   counts of right(r, j) = sum_t p(r | j) gamma_t(j),   of left(i, r) = sum_t p(i | r) g_t(r),   times grad
//
// where e_t has the initial and final scores in. One block a sequence, which returns at once where it is not lost. No
// message is kept between the passes: the backward pass goes forward again and keeps alpha_t, as two Reals, where w_t
// and what leaves a frame were, which the products have read by then, and u_t likewise.
//
//   launches   1 forward, 2 backward
//   a frame    2 N R exponentials and 4 N R additions in float64 each, forward, backward (twice) and in the counts
//   a step     3 barriers forward, 3 back
//   limits     none on N, R and T: messages are in global memory, that is in the caches
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "kernels.h"
#include "low_rank.h"

namespace hmm {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

// A sequence, and its messages of the frame at hand.
template <class Real> struct LostSequence {
  Sequence<Real> q;
  Factors<Real> scores;
  int R;
  double *message, *classes;
  __device__ __forceinline__ LostSequence(const hmm_cuda_low_rank &p, int64_t b, double *messages, double *of_classes)
      : q(p.chain, b), scores(p, p.scores, b), R(int(p.rank)), message(messages + b * p.chain.states),
        classes(of_classes + b * p.rank) {}
};

// u_t from alpha_{t-1}: a warp a class.
template <class Real> __device__ __forceinline__ void into_classes(const LostSequence<Real> &x) {
  const int N = x.q.states, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < x.R; r += kWarps) {
    LogSum<Real> sum;
    sum.add(x.scores.left + int64_t(r) * N, 1, x.message, N, lane, kWarp);
    const double top = warp_max(sum.top);
    const Real all = warp_sum(sum.sum * exp(Real(sum.top - or_zero(top))));
    if (lane == 0) x.classes[r] = top + log(double(all));
  }
}

// Frame t of a sequence from the one before: u_t, alpha_t. Returns max x_t; of the last frame, mass is what
// exp(alpha_t) of this thread's states sums to.
template <class Real>
__device__ __forceinline__ double lost_step(const LostSequence<Real> &x, int64_t t, double *tops, double &mass) {
  const int N = x.q.states;
  if (t > 0) {
    into_classes(x);
    if (!HMM_DEFECT(41)) __syncthreads();
  }
  const Local<Real> local(x.q, t);
  double largest = negative_infinity<double>();
#pragma unroll 1
  for (int j = threadIdx.x; j < N; j += kThreads) {
    LogSum<Real> sum;
    if (t > 0) sum.add(x.scores.right + j, N, x.classes, x.R, 0, 1);
    const double score = (t > 0 ? sum.top + log(double(sum.sum)) : 0) + local(j);
    x.message[j] = score;
    largest = larger_or_nan(largest, score);
  }
  largest = block_larger_or_nan(largest, tops);
  const double centre = is_finite(largest) ? double(Real(largest)) : 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < N; j += kThreads) {
    x.message[j] -= centre;
    if (t == x.q.length - 1) mass += exp(x.message[j]);
  }
  __syncthreads();
  return largest;
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_redo_kernel(hmm_cuda_low_rank p, Real *log_partition, const int32_t *method, double *message,
                         double *classes) {
  const int64_t b = blockIdx.x;
  if (method[b] != HMM_REDONE) return;  // the whole block
  HMM_SHARED_MEMORY(at);
  double *tops = carve<double>(at, kWarps), *part = carve<double>(at, kWarps);
  const LostSequence<Real> x(p, b, message, classes);
  double offset = 0, largest = 0, mass = 0;
#pragma unroll 1
  for (int64_t t = 0; t < x.q.length && is_finite(largest); t++) {
    largest = lost_step(x, t, tops, mass);
    offset += double(Real(largest));
  }
  mass = block_sum<kThreads>(mass, part);
  if (threadIdx.x != 0) return;  // no barrier follows
  const double infeasible = largest == negative_infinity<double>() ? largest : largest - largest;
  log_partition[b] = Real(is_finite(largest) ? offset + log(mass) : infeasible);
}

// What a lost sequence keeps of all frames: (T, N), (T, R), (T,); a float64 is `high` and `low`.
template <class Real> struct Kept {
  Real *alpha, *alpha_low, *half, *half_low, *centre, *state, *posterior;
  __device__ __forceinline__ Kept of(int64_t b, int64_t T, int64_t N, int64_t R) const {
    return {alpha + b * T * N, alpha_low + b * T * N, half + b * T * R,    half_low + b * T * R,
            centre + b * T,    state + b * T * N,     posterior + b * T * R};
  }
};

// The forward pass again, whose messages are kept.
template <class Real>
__device__ __forceinline__ void lost_forward(const LostSequence<Real> &x, const Kept<Real> &kept, double *tops) {
  const int N = x.q.states;
  double mass = 0;
#pragma unroll 1
  for (int64_t t = 0; t < x.q.length; t++) {
    const double largest = lost_step(x, t, tops, mass);
    for (int j = threadIdx.x; j < N; j += kThreads)
      split(x.message[j], kept.alpha[t * N + j], kept.alpha_low[t * N + j]);
    for (int r = threadIdx.x; t > 0 && r < x.R; r += kThreads)
      split(x.classes[r], kept.half[t * x.R + r], kept.half_low[t * x.R + r]);
    if (threadIdx.x == 0) kept.centre[t] = Real(largest);
    __syncthreads();
  }
}

// gamma_t and g_t of all frames, from the last one on.
template <class Real>
__device__ __forceinline__ void lost_backward(const LostSequence<Real> &x, const Kept<Real> &kept, Real *part) {
  const int N = x.q.states, R = x.R, lane = threadIdx.x % kWarp;
  const double never = -negative_infinity<double>();
  int64_t t = x.q.length - 1;
  Real sum = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < N; j += kThreads) sum += kept.state[t * N + j] = exp(Real(x.message[j]));
  for (;; t--) {
    const Local<Real> local(x.q, t);
    Real *gamma = kept.state + t * N, *g = kept.posterior + t * R, *before = gamma - N;
    const Real *alpha = kept.alpha + t * N, *low = kept.alpha_low + t * N;
    const Real scale = 1 / block_sum<kThreads>(sum, part);  // it is 1 but for rounding, which would add up over time
#pragma unroll 1
    for (int j = threadIdx.x; j < N; j += kThreads) {
      gamma[j] *= scale;
      x.message[j] = entry(local, alpha[j], low[j], kept.centre[t], gamma[j], j);
    }
    if (t == 0) return;
    __syncthreads();
#pragma unroll 1
    for (int r = threadIdx.x / kWarp; r < R; r += kWarps) {
      const double u = joined(kept.half[t * R + r], kept.half_low[t * R + r]);
      const Real *right = x.scores.right + int64_t(r) * N;
      Real all = 0;
#pragma unroll 1
      for (int j = lane; j < N; j += kWarp) all += exp(Real((u + double(right[j])) - x.message[j])) * gamma[j];
      all = warp_sum(all);
      if (lane == 0) g[r] = all, x.classes[r] = all == 0 ? never : u;
    }
    __syncthreads();
    sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < N; i += kThreads) {
      const double a = joined(alpha[i - N], low[i - N]);
      Real all = 0;
#pragma unroll 1
      for (int r = 0; r < R; r++)
        all += exp(Real((a + double(x.scores.left[int64_t(r) * N + i])) - x.classes[r])) * g[r];
      sum += before[i] = all;
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_redo_backward_kernel(hmm_cuda_low_rank p, const Real *grad, const Real *log_partition,
                                  const int32_t *method, Kept<Real> kept, double *message, double *classes) {
  const int64_t b = blockIdx.x, N = p.chain.states;
  if (method[b] != HMM_REDONE) return;  // the whole block
  HMM_SHARED_MEMORY(at);
  double *tops = carve<double>(at, kWarps);
  Real *part = carve<Real>(at, kWarps);
  const LostSequence<Real> x(p, b, message, classes);
  const Kept<Real> mine = kept.of(b, p.chain.time, N, p.rank);
  const Real z = log_partition[b];
  if (!is_finite(double(z))) {  // what is past the end is 0 already
    set(mine.state, x.q.length * N, z == negative_infinity<Real>() ? Real(0) : z - z);
    return;
  }
  lost_forward(x, mine, tops);
  lost_backward(x, mine, part);
  __syncthreads();
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < x.q.length * N; k += kThreads) mine.state[k] *= grad[b];
#pragma unroll 1
  for (int64_t k = p.rank + threadIdx.x; k < x.q.length * p.rank; k += kThreads) mine.posterior[k] *= grad[b];
}

constexpr int kCountThreads = 256;

// Adds the counts of lost sequences to edge (..., 2 R, N): every entry is one thread's.
template <class Real>
__global__ void __launch_bounds__(kCountThreads)
    low_rank_redo_counts_kernel(hmm_cuda_low_rank p, int64_t blocks, const Real *log_partition, const int32_t *method,
                                Kept<Real> kept, Real *edge) {
  const int64_t N = p.chain.states, R = p.rank, T = p.chain.time, matrix = blockIdx.x / blocks;
  const int64_t entries = 2 * R * N, k = blockIdx.x % blocks * kCountThreads + threadIdx.x, r = k / N % R;
  const int j = int(k % N);
  const bool own = p.chain.transition_batch_stride != 0, left = k < R * N;
  double total = 0;
  bool any = false;
#pragma unroll 1
  for (int64_t b = own ? matrix : 0; b < (own ? matrix + 1 : p.chain.batch); b++) {
    if (method[b] != HMM_REDONE || k >= entries) continue;
    const Real z = log_partition[b];
    any = true;
    if (z == negative_infinity<Real>()) continue;
    if (z - z != 0) {
      total += double(z - z);
      continue;
    }
    const Sequence<Real> q(p.chain, b);
    const Kept<Real> of = kept.of(b, T, N, R);
    const double score = double(static_cast<const Real *>(p.scores)[b * p.chain.transition_batch_stride + k]);
#pragma unroll 1
    for (int64_t t = 1; t < q.length; t++) {
      const int64_t row = t * N + j, before = row - N - HMM_DEFECT(44), half = t * R + r;
      const Real arriving = left ? of.posterior[half] : of.state[row];
      if (arriving == 0) continue;
      const double u = joined(of.half[half], of.half_low[half]);
      const double from = left ? joined(of.alpha[before], of.alpha_low[before]) : u;
      const double to =
          left ? u : entry(Local<Real>(q, t), of.alpha[row], of.alpha_low[row], of.centre[t], arriving, j);
      total += double(exp(Real((from + score) - to)) * arriving);
    }
  }
  if (!any) return;
  Real &counted = edge[matrix * entries + k];
  counted = Real(double(counted) + total);
}

}  // namespace

template <class Real>
int low_rank_redo(const hmm_cuda_low_rank &p, Real *log_partition, const int32_t *method, void *workspace,
                  void *stream) {
  const LowRankWorkspace<Real> room(p, false, workspace);
  return launch(low_rank_redo_kernel<Real>, dim3(unsigned(p.chain.batch)), kThreads, 2 * carved<double>(kWarps),
                stream, p, log_partition, method, room.message, room.classes);
}

template <class Real>
int low_rank_back_end(const hmm_cuda_low_rank &p, const Real *grad, const Real *log_partition, const int32_t *method,
                      Real *state, Real *edge, Real *classes, Real *leaving, void *workspace, void *stream) {
  const LowRankWorkspace<Real> room(p, true, workspace);
  const Kept<Real> kept = {room.w, leaving, classes, room.half_low, room.centre, state, room.posterior};
  const int status = launch(low_rank_redo_backward_kernel<Real>, dim3(unsigned(p.chain.batch)), kThreads,
                            carved<double>(kWarps) + carved<Real>(kWarps), stream, p, grad, log_partition, method,
                            kept, room.message, room.classes);
  if (status || !edge) return status;
  const int64_t blocks = (2 * p.rank * p.chain.states + kCountThreads - 1) / kCountThreads;
  return launch(low_rank_redo_counts_kernel<Real>, dim3(unsigned(blocks * matrices(p.chain))), kCountThreads, 0,
                stream, p, blocks, log_partition, method, kept, edge);
}

#define HMM_INSTANTIATE(Real)                                                                                       \
  template int low_rank_redo<Real>(const hmm_cuda_low_rank &, Real *, const int32_t *, void *, void *);             \
  template int low_rank_back_end<Real>(const hmm_cuda_low_rank &, const Real *, const Real *, const int32_t *,      \
                                       Real *, Real *, Real *, Real *, void *, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
