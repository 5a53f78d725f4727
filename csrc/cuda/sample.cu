// Posterior samples by backward walks along the forward messages (csrc/cpu/sampling.h; Scott 2002).
//
//   z_{L-1} ~ alpha_{L-1},   z_{t-1} with probability proportional to w(i) = exp(log alpha_{t-1}(i) + phi_t(i, z_t))
//   z = the first i with w(0) + ... + w(i) > u sum_i w(i), where w(i) > 0
//
// A warp walks a path, S B of them. Messages are logarithms (HMM_LOG_SPACE; HMM_REDONE, in two numbers) or scaled
// probabilities
// (HMM_SCALED, where a column's exponentials are taken from its maximum). Sums are over 32 states at once, in the
// scores' type, and over those in float64, so that the same numbers give the states that the CPU's kernel draws, but
// where rounding decides. Cost a frame and path: N scores gathered, one 32-byte sector each from N rows (from the
// caches, where arcs are shared), N messages and N exponentials; 5 shuffles for the maximum, 5 for 32 states, 5 for the
// state within these. No barriers. Above kMostHeld states, scores are gathered again where they are needed again.
// Limits: N at most HMM_CUDA_MOST_STATES; T none. Shared memory: N numbers and N / 32 sums a warp, within 48 KB.
// Compiled and executed on the CPU, not timed.
#include "kernels.h"
#include "staging.h"

namespace hmm {
namespace {

constexpr int kMostWalks = 4;  // warps of a block

constexpr int kMostHeld = 4096;  // scores in shared memory
__host__ __device__ constexpr int64_t held_scores(int64_t N) { return N <= kMostHeld ? N : 0; }
template <class Real> size_t walk_bytes(int64_t N) {
  return carved<Real>(held_scores(N)) + carved<double>((N + kWarp - 1) / kWarp);
}

// The state of a frame; arcs: a column of scores, N apart, or null at the end. weight (N, or null), sums (N / 32): the
// warp's own.
template <class Real>
__device__ __forceinline__ int draw(const Real *alpha, const Real *rest, const Real *arcs, bool scaled, int N,
                                    Real uniform, Real *weight, double *sums) {
  const Real ninf = negative_infinity<Real>();
  const int lane = threadIdx.x % kWarp, blocks = (N + kWarp - 1) / kWarp;
  Real top = ninf;
#pragma unroll 2
  for (int i = lane; i < N; i += kWarp) {
    const Real score = arcs ? arcs[int64_t(i) * N] : Real(0);
    top = fmax(top, scaled ? score : score + alpha[i]);
    if (weight) weight[i] = score;
  }
  top = or_zero(warp_max(top));
  const auto weigh = [&](int i) {
    const Real score = weight ? weight[i] : arcs ? arcs[int64_t(i) * N] : Real(0);
    if (scaled) return exp(score - top) * alpha[i];
    return exp(Real((double(score) - double(top)) + (double(alpha[i]) + (rest ? double(rest[i]) : 0))));
  };
  double total = 0;
#pragma unroll 1
  for (int k = 0; k < blocks; k++) {
    const int i = k * kWarp + lane;
    Real w = 0;
    if (i < N) w = weigh(i);
    if (weight && i < N) weight[i] = w;
    total += double(warp_sum(w));
    if (lane == 0) sums[k] = total;
  }
  __syncwarp();
  const double target = double(uniform) * total;
  int k = 0;
  while (k < blocks - 1 && sums[k] <= target) k++;
  const Real left = Real(target - (k > 0 ? sums[k - 1] : 0));
  __syncwarp();  // sums are read
  const int i = k * kWarp + lane;
  const Real w = i >= N ? Real(0) : weight ? weight[i] : weigh(i);
  Real up_to = w;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Real before = __shfl_up_sync(kAllLanes, up_to, lanes);
    if (lane >= lanes) up_to += before;
  }
  const int found = __ffs(int(__ballot_sync(kAllLanes, up_to > left && w > 0)));
  if (found) return k * kWarp + found - 1;
  // Where rounding leaves nothing to draw, the last state of positive weight.
  return k * kWarp + int(warp_max(w > 0 ? float(lane) : 0.f));
}

template <class Real>
__global__ void __launch_bounds__(kMostWalks *kWarp, 4)
    sample_kernel(hmm_problem p, int64_t samples, const Real *log_partition, const Real *alpha, const Real *norm,
                  const int32_t *method, const Real *uniform, int64_t *states) {
  HMM_SHARED_MEMORY(memory);
  const int N = int(p.states), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Real *weight = nullptr;
  double *sums = nullptr;
  for (int w = 0; w < int(blockDim.x / kWarp); w++) {
    Real *const weights = N <= kMostHeld ? carve<Real>(memory, N) : nullptr;
    double *const totals = carve<double>(memory, (N + kWarp - 1) / kWarp);
    if (w == warp) weight = weights, sums = totals;
  }
  const int64_t walk = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp, b = walk % p.batch;  // walk: [sample, b]
  if (walk >= samples * p.batch) return;  // the whole warp
  const Sequence<Real> q(p, b);
  const bool feasible = log_partition[b] - log_partition[b] == 0, scaled = method[b] == HMM_SCALED,
             in_two = method[b] == HMM_REDONE;
  const int64_t length = feasible ? q.length : 0;
  alpha += b * p.time * N, norm += b * p.time * N, uniform += walk * p.time, states += walk * p.time;

  for (int64_t t = length + lane; t < p.time; t += kWarp) states[t] = -1;
  int state = 0, mine = 0;
  Real u = 0;
  for (int64_t t = length - 1; t >= 0;
       t--) {  // 32 numbers and states are read and written at once, where t is a multiple
    const int64_t frame = t - t % kWarp + lane;
    if (t == length - 1 || t % kWarp == kWarp - 1) u = frame <= t ? uniform[frame] : Real(0);
    const Real *const arcs = t < length - 1 ? q.arcs(t + 1) + state : nullptr;
    state = draw(alpha + t * N, in_two ? norm + t * N : nullptr, arcs, scaled, N,
                 __shfl_sync(kAllLanes, u, int(t % kWarp)), weight, sums);
    if (frame == t) mine = state;
    if (t % kWarp == 0 && frame < length) states[frame] = mine;
  }
}

}  // namespace

template <class Real>
int sample(const hmm_problem &p, int64_t samples, const Real *log_partition, const Real *alpha, const Real *norm,
           const int32_t *method, const Real *uniform, int64_t *states, void *stream) {
  const int64_t walks = samples * p.batch;
  if (walks == 0) return HMM_OK;
  const int warps = int(max(size_t(1), min(size_t(kMostWalks), 48 * 1024 / walk_bytes<Real>(p.states))));
  return launch(sample_kernel<Real>, dim3(unsigned((walks + warps - 1) / warps)), warps * kWarp,
                warps * walk_bytes<Real>(p.states), stream, p, samples, log_partition, alpha, norm, method, uniform,
                states);
}

template int sample<float>(const hmm_problem &, int64_t, const float *, const float *, const float *, const int32_t *,
                           const float *, int64_t *, void *);
template int sample<double>(const hmm_problem &, int64_t, const double *, const double *, const double *,
                            const int32_t *, const double *, int64_t *, void *);

}  // namespace hmm
