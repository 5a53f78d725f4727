// Transitions that vary over time in chunks that begin early: early_chunks.h.
//
// Three launches forward, with the walks of what is left, and three backward. Cost a step, shared memory and barriers
// are those of log_space.cu and log_space_back.cu; a join reads 3 N numbers a chunk, one block a sequence.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING; 65,535 chunks. Compiled and executed on the CPU, not timed.
#include "early_chunks.h"

#include "log_space.h"
#include "log_space_back.h"

namespace hmm {
namespace {

constexpr int kJoinThreads = 256, kJoinWarps = kJoinThreads / kWarp;
template <class Real> constexpr Real kSame = sizeof(Real) == 4 ? Real(0x1p-20) : Real(0x1p-49);

// The frames of a chunk, of which a sequence may have fewer or none.
struct OwnFrames {
  int64_t first, end;
  __device__ __forceinline__ OwnFrames(const hmm_problem &p, int64_t chunk)
      : first(chunk * p.chunk_frames), end(min(first + p.chunk_frames, p.time)) {}
};

// A chunk a block.
template <class Real, bool Large>
__global__ void __launch_bounds__(Large ? kTile : kForwardThreads<Real>, 1)
    walk_kernel(hmm_problem p, Tiling o, EarlyChunks<Real> chunks, Real *alpha, Real *norm, Real *centre) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states, chunk = b * gridDim.y + blockIdx.y;
  const Sequence<Real> q(p, b);
  const OwnFrames own(p, blockIdx.y);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  const int64_t past = max(own.first, q.length);
  clear(past, own.end - past, N, alpha, norm, centre);
  const Walk walk = walk_along_chunk(p, q.length, blockIdx.y);
  if (walk.frames == 0) return;  // the whole block
  Real *const arrived = chunks.arrived + 2 * chunk * N;
  set(arrived, N, Real(0));  // each by the thread that reads it
  Sequence<Real> part = q.part(walk.first, walk.frames, walk.first > 0 ? arrived : nullptr, nullptr);
  if (walk.first + walk.frames < q.length) part.final = nullptr;
  const double taken =
      forward_walk<false, Real, Large, Large, true>(o, memory, part, false, alpha + walk.first * N,
                                                    norm + walk.first * N, centre + walk.first, walk.warm_up, arrived);
  if (threadIdx.x == 0) chunks.taken[chunk] = taken;
}

// What a sequence's walks come to, a warp a chunk in turn. Infinite or NaN in total where a message is not the same, or
// a chunk has no path: then the sequence is not done so.
template <class Real>
__global__ void __launch_bounds__(kJoinThreads, 1)
    join_kernel(hmm_problem p, EarlyChunks<Real> chunks, Real *log_partition, const Real *alpha, int32_t *method) {
  HMM_SHARED_MEMORY(memory);
  double *const sums = carve<double>(memory, kJoinWarps);
  const int N = int(p.states), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x, L = p.lengths[b], P = chunks_of(p);
  double total = 0;
  for (int64_t chunk = warp; chunk * p.chunk_frames < L; chunk += kJoinWarps) {
    total += chunks.taken[b * P + chunk];
    if (chunk == 0) continue;
    const Real *const expected = alpha + (b * p.time + chunk * p.chunk_frames - 1) * N,
                     *const arrived = chunks.arrived + 2 * (b * P + chunk) * N;
    bool same = true;
    for (int j = lane; j < N; j += kWarp) {
      const Real x = expected[j], y = arrived[j];
      // -inf, of a state without a path, is no more than itself.
      same &= x == y || (x - x == 0 && fabs(x - y) <= kSame<Real> * (1 + Real(0.5) * fabs(x)));
    }
    if (__any_sync(kAllLanes, !same) && !HMM_DEFECT(58)) total = double(negative_infinity<Real>());
  }
  if (warp == 0 && L > 0) {
    const Real *const last = alpha + (b * p.time + L - 1) * N;
    double sum = 0;
    for (int j = lane; j < N; j += kWarp) sum += exp(double(last[j]));
    total += log(warp_sum(sum));
  }
  total = block_sum<kJoinThreads>(lane == 0 ? total : 0, sums);
  if (threadIdx.x != 0) return;  // no barrier follows
  const bool done = L > 0 && total - total == 0;
  chunks.done[b] = done;
  if (done) log_partition[b] = Real(total), method[b] = HMM_LOG_SPACE;
}

// Whether the backward pass goes through a sequence in chunks: its messages are from the front, and there is something
// to do.
template <class Real>
__device__ __forceinline__ bool goes_back(const Real *grad, const Real *log_partition, const int32_t *method,
                                          int64_t length, int64_t b) {
  const Real z = log_partition[b];
  return method[b] == HMM_LOG_SPACE && z - z == 0 && grad[b] != 0 && length > 0;
}

// A chunk a block; its arcs are those out of its frames.
template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTiledThreads : kMostThreads, 1)
    walk_back_kernel(hmm_problem p, Tiling o, EarlyChunks<Real> chunks, const Real *grad, const Real *log_partition,
                     const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state,
                     Real *edge) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states, chunk = b * gridDim.y + blockIdx.y;
  const Sequence<Real> q(p, b);
  if (!goes_back(grad, log_partition, method, q.length, b)) return;  // the whole block
  const OwnFrames own(p, blockIdx.y);
  state += b * T * N;
  if (edge) edge += b * (T - 1) * N * N;
  const int64_t past = max(own.first, q.length), arcs = max(own.first, q.length - 1), end = min(own.end, T - 1);
  set(state + past * N, (own.end - past) * N, Real(0));
  if (edge) set(edge + arcs * N * N, (end - arcs) * N * N, Real(0));
  const Walk walk = walk_back_in_chunk(p, q.length, blockIdx.y);
  if (walk.frames == 0) return;  // the whole block
  const int64_t at = (b * T + own.first) * N;
  const BackwardArrays<Real> x = {alpha + at,
                                  norm + at,
                                  centre + b * T + own.first,
                                  state + own.first * N,
                                  edge ? edge + own.first * N * N : nullptr,
                                  nullptr,
                                  walk.frames - walk.warm_up,
                                  chunks.arrived + 2 * chunk * N,
                                  chunks.left + chunk * N};
  const Sequence<Real> part = q.part(own.first, walk.frames, nullptr, nullptr);
  backward_walk<false, Real, Tiled, true>(o, memory, part, false, grad[b], x);
}

// Are the posteriors that each chunk arrives with those of the chunk behind? A warp a chunk in turn.
template <class Real>
__global__ void __launch_bounds__(kJoinThreads, 1)
    join_back_kernel(hmm_problem p, EarlyChunks<Real> chunks, const Real *grad, const Real *log_partition,
                     const int32_t *method) {
  HMM_SHARED_MEMORY(memory);
  double *const sums = carve<double>(memory, kJoinWarps);
  const int N = int(p.states), lane = threadIdx.x % kWarp;
  const int64_t b = blockIdx.x, L = p.lengths[b], P = chunks_of(p);
  const bool walked = goes_back(grad, log_partition, method, L, b);
  double wrong = 0;
  for (int64_t chunk = threadIdx.x / kWarp; walked && (chunk + 1) * p.chunk_frames < L; chunk += kJoinWarps) {
    const Real *const arrived = chunks.arrived + 2 * (b * P + chunk) * N,
                     *const expected = chunks.left + (b * P + chunk + 1) * N;
    Real difference = 0;
    for (int i = lane; i < N; i += kWarp) difference += fabs(arrived[i] - expected[i]);
    difference = warp_sum(difference);
    if (!(difference <= kSame<Real>) && !HMM_DEFECT(59)) wrong += 1;
  }
  wrong = block_sum<kJoinThreads>(lane == 0 ? wrong : 0, sums);
  if (threadIdx.x == 0) chunks.done[b] = walked && wrong == 0;
}

dim3 walks_of(const hmm_problem &p) { return dim3(unsigned(p.batch), unsigned(chunks_of(p))); }

}  // namespace

template <class Real>
int early_forward(const hmm_problem &p, const EarlyChunks<Real> &chunks, Real *log_partition, Real *alpha, Real *norm,
                  Real *centre, int32_t *method, void *stream) {
  const auto [large, tiling, bytes] = forward_block<Real>(p.states);
  const int status = launch(large ? walk_kernel<Real, true> : walk_kernel<Real, false>, walks_of(p), tiling.threads,
                            bytes, stream, p, tiling, chunks, alpha, norm, centre);
  return status ? status
                : launch(join_kernel<Real>, dim3(unsigned(p.batch)), kJoinThreads, carved<double>(kJoinWarps), stream,
                         p, chunks, log_partition, alpha, method);
}

template <class Real>
int early_backward(const hmm_problem &p, const EarlyChunks<Real> &chunks, const Real *grad, const Real *log_partition,
                   const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state,
                   Real *edge, void *stream) {
  const auto [tiled, rows, columns, bytes] = backward_block<Real>(p.states);
  const int status =
      launch(tiled ? walk_back_kernel<Real, true> : walk_back_kernel<Real, false>, walks_of(p), rows.threads, bytes,
             stream, p, rows, chunks, grad, log_partition, alpha, norm, centre, method, state, edge);
  return status ? status
                : launch(join_back_kernel<Real>, dim3(unsigned(p.batch)), kJoinThreads, carved<double>(kJoinWarps),
                         stream, p, chunks, grad, log_partition, method);
}

#define HMM_OF(Real)                                                                                                   \
  template int early_forward<Real>(const hmm_problem &, const EarlyChunks<Real> &, Real *, Real *, Real *, Real *,     \
                                   int32_t *, void *);                                                                 \
  template int early_backward<Real>(const hmm_problem &, const EarlyChunks<Real> &, const Real *, const Real *,        \
                                    const Real *, const Real *, const Real *, const int32_t *, Real *, Real *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
