// Where the walks of a scaled forward pass end: log Z, whether the certificates hold, and the number that the backward
// pass begins with.
//
//   Z' = sum_j a_{L-1}(j), or from both ends sum_ij a_{m-1}(i) A(i, j) b_m(j);     norm[b, 0, 0] = 1 / Z'
//   log Z = log Z' + sum_t (centre_t + max c) + the tops of initial and final scores - log 2^(30 walks + sum of k)
//
// One block a sequence: N^2 arcs read from the caches, 4 L bytes of centres. Limits: none on N or T.
#include "scaled.h"

namespace hmm {
namespace {

constexpr int kThreads = 256;
template <class Real>
constexpr int kLeastJoinedBits = Range<Real>::kSmallestBits + kTopBits + 1 + Range<Real>::kPrecision + 6;

// sum_ij a(i) A(i, j) b(j), a warp a row.
template <class Real>
__device__ __forceinline__ double joined_sum(const Real *a, const Real *arcs, const Real *b, int N, double *part) {
  double all = 0;
  for (int i = threadIdx.x / kWarp; i < N; i += kThreads / kWarp) {
    Real sum = 0;
    for (int j = threadIdx.x % kWarp; j < N; j += kWarp) sum = fma(arcs[int64_t(i) * N + j], b[j], sum);
    all += double(a[i]) * double(sum);
  }
  return block_sum<kThreads>(all, part);
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    join_kernel(hmm_problem p, const Carried *carried, const Real *alpha, Real *norm, const Real *centre,
                void *workspace, Real *log_partition, int32_t *method) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  double *part_double = carve<double>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, L = p.lengths[b], row = b * p.time * N;
  const bool both = p.sharing == HMM_BY_ENDS;
  const int64_t middle = meeting(L, both);
  if (L == 0) {  // the whole block
    if (threadIdx.x == 0) method[b] = both ? HMM_BOTH_ENDS : HMM_SCALED, log_partition[b] = 0;
    return;
  }
  const Arcs<Real> arcs = arcs_of<Real>(p, workspace, b);
  const double arcs_top = double(arcs.certificate->top);
  double taken = 0;
  for (int64_t t = threadIdx.x; t < L; t += kThreads) taken += double(centre[b * p.time + t]) + (t ? arcs_top : 0);
  taken = block_sum<kThreads>(taken, part_double);
  taken += double(top_of(static_cast<const Real *>(p.initial) + b * p.initial_batch_stride, N, part));
  if (p.final) taken += double(top_of(static_cast<const Real *>(p.final) + b * p.final_batch_stride, N, part));
  carried += 2 * b;
  int64_t exponents = carried[0].exponents + kTopBits;
  bool lost = carried[0].lost;
  double z = carried[0].total;
  if (middle < L) {
    z = joined_sum(alpha + row + (middle - 1) * N, arcs.arcs, alpha + row + middle * N, N, part_double);
    exponents += carried[1].exponents + kTopBits;
    lost |= carried[1].lost || !(z >= exp2(double(kLeastJoinedBits<Real>)) * N * N * N);
  }
  if (threadIdx.x != 0) return;  // no barrier follows
  norm[row] = Real(1 / z);
  method[b] = lost ? HMM_REDONE : both ? HMM_BOTH_ENDS : HMM_SCALED;
  log_partition[b] = Real(taken - double(exponents) * kLn2 + log(z));
}

}  // namespace

template <class Real>
int join(const hmm_problem &p, const Carried *carried, Real *log_partition, const Real *alpha, Real *norm,
         const Real *centre, int32_t *method, void *workspace, void *stream) {
  return launch(join_kernel<Real>, dim3(unsigned(p.batch)), kThreads,
                carved<Real>(kThreads / kWarp) + carved<double>(kThreads / kWarp), stream, p, carried, alpha, norm,
                centre, workspace, log_partition, method);
}

template int join<float>(const hmm_problem &, const Carried *, float *, const float *, float *, const float *,
                         int32_t *, void *, void *);
template int join<double>(const hmm_problem &, const Carried *, double *, const double *, double *, const double *,
                          int32_t *, void *, void *);

}  // namespace hmm
