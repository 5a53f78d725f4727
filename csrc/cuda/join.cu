// Where the walks of a scaled forward pass end: log Z, whether the certificates hold, and the number that the backward
// pass begins with.
//
//   Z' = sum_j a_{L-1}(j), or from both ends sum_ij a_{m-1}(i) A(i, j) b_m(j);     norm[b, 0, 0] = 1 / Z'
//   log Z = log Z' + sum_t (centre_t + max c) + the tops of initial and final scores - log 2^(30 walks + sum of k)
//
// And whether what the walks of chunks arrive with is what it must be (scaled_chunks.h), forward and backward.
//
// One block a sequence: N^2 arcs read from the caches, 4 L bytes of centres. Limits: none on N or T.
#include "scaled_chunks.h"

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

// What was taken out of the scores of a sequence of L > 0 frames. Barriers.
template <class Real>
__device__ __forceinline__ double taken_out(const hmm_problem &p, int64_t b, const Real *centre, double arcs_top,
                                            Real *part, double *part_double) {
  double taken = 0;
  for (int64_t t = threadIdx.x; t < p.lengths[b]; t += kThreads)
    taken += double(centre[b * p.time + t]) + (t ? arcs_top : 0);
  taken = block_sum<kThreads>(taken, part_double);
  taken += double(top_of(static_cast<const Real *>(p.initial) + b * p.initial_batch_stride, p.states, part));
  if (p.final) taken += double(top_of(static_cast<const Real *>(p.final) + b * p.final_batch_stride, p.states, part));
  return taken;
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    join_kernel(hmm_problem p, const Carried *carried, const Real *alpha, Real *norm, const Real *centre,
                void *workspace, Real *log_partition, int32_t *method, const int32_t *done) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  double *part_double = carve<double>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, L = p.lengths[b], row = b * p.time * N;
  if (done && done[b]) return;  // the whole block
  const bool both = p.sharing == HMM_BY_ENDS;
  const int64_t middle = meeting(L, both);
  if (L == 0) {  // the whole block
    if (threadIdx.x == 0) method[b] = both ? HMM_BOTH_ENDS : HMM_SCALED, log_partition[b] = 0;
    return;
  }
  const Arcs<Real> arcs = arcs_of<Real>(p, workspace, b);
  const double taken = taken_out(p, b, centre, double(arcs.certificate->top), part, part_double);
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

// The same of a sequence's chunks, a warp each in turn. Z' = sum_j a_{L-1}(j), times the factor of each chunk's first
// message to the one that it arrives with, by which norm[b, t, 0] of a chunk's first frame is corrected.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    join_chunks_kernel(hmm_problem p, ScaledChunks<Real> chunks, const Real *alpha, Real *norm, const Real *centre,
                       void *workspace, Real *log_partition, int32_t *method) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  double *part_double = carve<double>(at, kThreads / kWarp);
  const int N = p.states, lane = threadIdx.x % kWarp;
  const int64_t b = blockIdx.x, L = p.lengths[b], row = b * p.time * N, P = chunks_of(p);
  const Certificate<Real> &certificate = *arcs_of<Real>(p, workspace, b).certificate;
  if (L == 0 || !certificate.forgets) {  // the whole block: done by `join`
    if (threadIdx.x == 0) chunks.done[b] = 0;
    return;
  }
  const double taken = taken_out(p, b, centre, double(certificate.top), part, part_double);
  const int64_t last = (L - 1) / p.chunk_frames;
  const Carried *carried = chunks.carried + b * P;
  double logs = 0, wrong = 0;  // alike in a warp
  for (int64_t chunk = threadIdx.x / kWarp; chunk <= last; chunk += kThreads / kWarp) {
    wrong += carried[chunk].lost;
    logs -= double(carried[chunk].exponents) * kLn2;
    if (chunk == 0) continue;
    const int64_t first = row + chunk * p.chunk_frames * N;
    const Real *expected = alpha + first - N, *arrived = chunks.arrived + (b * P + chunk) * N;
    Real sum = 0, sum_of_arrived = 0;
    for (int j = lane; j < N; j += kWarp) sum += expected[j], sum_of_arrived += arrived[j];
    sum = warp_sum(sum), sum_of_arrived = warp_sum(sum_of_arrived);
    const Real factor = sum_of_arrived / sum;
    bool same = true;
    for (int j = lane; j < N; j += kWarp) {
      const Real x = expected[j] * factor;
      same &= fabs(arrived[j] - x) <= ldexp(x, -kSameBits<Real>) + Range<Real>::kTiny;
    }
    if (__any_sync(kAllLanes, !same) && !HMM_DEFECT(53)) wrong += 1;
    if (lane == 0 && !HMM_DEFECT(52)) norm[first] *= factor;
    logs -= log(double(factor));
  }
  logs = block_sum<kThreads>(lane == 0 ? logs : 0, part_double);
  wrong = block_sum<kThreads>(lane == 0 ? wrong : 0, part_double);
  if (threadIdx.x != 0) return;  // no barrier follows
  chunks.done[b] = wrong == 0;
  if (wrong > 0) return;
  const double z = carried[last].total;
  norm[row] = Real(1 / z);
  method[b] = HMM_SCALED;
  log_partition[b] = Real(taken + logs - kTopBits * kLn2 + log(z));
}

// Are the posteriors that each chunk arrives with those of the chunk behind? A warp a chunk in turn.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    join_chunks_back_kernel(hmm_problem p, ScaledChunks<Real> chunks, const int32_t *method, void *workspace) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  const int N = p.states, lane = threadIdx.x % kWarp;
  const int64_t b = blockIdx.x, L = p.lengths[b], P = chunks_of(p);
  const bool in_chunks = method[b] == HMM_SCALED && arcs_of<Real>(p, workspace, b).certificate->forgets;
  Real wrong = 0;
  if (in_chunks)
    for (int64_t chunk = threadIdx.x / kWarp; (chunk + 1) * p.chunk_frames < L; chunk += kThreads / kWarp) {
      const Real *arrived = chunks.arrived + (b * P + chunk) * N, *expected = chunks.left + (b * P + chunk + 1) * N;
      Real difference = 0;
      for (int i = lane; i < N; i += kWarp) difference += fabs(arrived[i] - expected[i]);
      difference = warp_sum(difference);
      if (!(difference <= ldexp(Real(1), -kSameBits<Real>)) && !HMM_DEFECT(54)) wrong += 1;
    }
  wrong = block_sum<kThreads>(lane == 0 ? wrong : Real(0), part);
  if (threadIdx.x == 0) chunks.done[b] = in_chunks && wrong == 0;
}

}  // namespace

template <class Real>
int join(const hmm_problem &p, const Carried *carried, Real *log_partition, const Real *alpha, Real *norm,
         const Real *centre, int32_t *method, const int32_t *done, void *workspace, void *stream) {
  return launch(join_kernel<Real>, dim3(unsigned(p.batch)), kThreads,
                carved<Real>(kThreads / kWarp) + carved<double>(kThreads / kWarp), stream, p, carried, alpha, norm,
                centre, workspace, log_partition, method, done);
}

template <class Real>
int join_chunks(const hmm_problem &p, const ScaledChunks<Real> &chunks, Real *log_partition, const Real *alpha,
                Real *norm, const Real *centre, int32_t *method, void *workspace, void *stream) {
  return launch(join_chunks_kernel<Real>, dim3(unsigned(p.batch)), kThreads,
                carved<Real>(kThreads / kWarp) + carved<double>(kThreads / kWarp), stream, p, chunks, alpha, norm,
                centre, workspace, log_partition, method);
}

template <class Real>
int join_chunks_back(const hmm_problem &p, const ScaledChunks<Real> &chunks, const int32_t *method, void *workspace,
                     void *stream) {
  return launch(join_chunks_back_kernel<Real>, dim3(unsigned(p.batch)), kThreads, carved<Real>(kThreads / kWarp),
                stream, p, chunks, method, workspace);
}

#define HMM_INSTANTIATE(Real)                                                                                          \
  template int join<Real>(const hmm_problem &, const Carried *, Real *, const Real *, Real *, const Real *, int32_t *, \
                          const int32_t *, void *, void *);                                                            \
  template int join_chunks<Real>(const hmm_problem &, const ScaledChunks<Real> &, Real *, const Real *, Real *,        \
                                 const Real *, int32_t *, void *, void *);                                             \
  template int join_chunks_back<Real>(const hmm_problem &, const ScaledChunks<Real> &, const int32_t *, void *, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
