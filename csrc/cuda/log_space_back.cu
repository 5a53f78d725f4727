// Backward pass in log space, for transitions that vary over time, from the messages of log_space.cu.
//
//   p(z_{t-1} = i, z_t = j | x) = exp(phi_t(i, j) - C_t - u_t(j) + alpha_{t-1}(i)),
//   u_t(j) = norm_t(j) - log gamma_t(j)
//   gamma_{t-1}(i) = sum_j p(z_{t-1} = i, z_t = j | x) / what these sum to over i
//
// Where the messages are from both ends, m = (L + 1) / 2, two blocks go from the middle to the ends. The first one
// begins with the arcs into frame m, with log S - alpha_m(j) for u_m(j) and J for C_m, and goes on as above. The other
// one begins with the same arcs, log S - alpha_{m-1}(i) for u_{m-1}(i), and goes on to L-1:
//
//   p(z_t = i, z_{t+1} = j | x) = exp(phi_{t+1}(i, j) - C_t - u_t(i) + alpha_{t+1}(j)),
//   gamma_{t+1}(j) = sum_i p(z_t = i, z_{t+1} = j | x) / what these sum to over j
//
// In chunks by transfer matrices (log_space.cu), a block a chunk begins with gamma = exp(alpha) of its last frame, and
// goes on as above to its first one; where edges are asked for, through the arcs into it, too. The alpha before those
// is found again from norm, since the one that is kept has the messages from behind it added. In chunks that begin
// early: early_chunks.h.
//
// Scores pass through shared memory (staging.h). To the front up to 32 lanes go along a row, seven rows at once (two in
// float64), while to the end a column is a thread's, or several threads' for N up to 128, four arcs at once. What a
// frame is known by is loaded a step ahead; the warps that have no column of it copy. Cost a step, N^2 arcs: an
// exponential, 4 additions, a product, 4 bytes (8 in float64) read, as many written where edges are asked for. Barriers
// a step: 1 and one a chunk of 10 KB: 2 for N up to 50 in float32, 8 for 128.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING, T none. Shared memory within 48 KB. Compiled and executed on the CPU,
// not timed.
#include "log_space_back.h"

#include "chunks.h"
#include "early_chunks.h"

namespace hmm {
namespace {

// A walk a block, from the end or from the middle as the messages are; where those are from the end, the grid's second
// row has nothing to do.
template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTiledThreads : kMostThreads, (Tiled ? 2 : 1) * kBlocks<Real>)
    backward_kernel(hmm_problem p, Tiling of_rows, Tiling of_columns, const Real *grad, const Real *log_partition,
                    const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state,
                    Real *edge, const int32_t *done) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states, steps = T > 1 ? T - 1 : 0;
  if (method[b] == HMM_CHUNKS || (done && done[b])) return;  // the whole block
  const Sequence<Real> q(p, b);
  const Real z = log_partition[b], g = grad[b];
  const int64_t used = q.length > 1 ? q.length - 1 : 0;
  const bool both = method[b] == HMM_BOTH_ENDS, to_end = blockIdx.y == 1;
  const bool infeasible = z == negative_infinity<Real>(), invalid = z - z != 0 && !infeasible;
  const bool nothing = invalid || infeasible || g == 0 || q.length == 0;
  state += b * T * N;
  if (edge) edge += b * steps * N * N;
  const BackwardArrays<Real> x = {alpha + b * T * N, norm + b * T * N, centre + b * T, state, edge};
  if (to_end) {  // the whole block
    if (!nothing && meeting(q.length, both) < q.length)
      backward_walk<true, Real, Tiled>(of_columns, memory, q, both, g, x);
    return;
  }
  if (nothing) {
    const Real value = invalid ? z - z : Real(0);
    set(state, q.length * N, value);
    if (edge) set(edge, used * N * N, value);
  } else backward_walk<false, Real, Tiled>(of_rows, memory, q, both, g, x);
  set(state + q.length * N, (T - q.length) * N, Real(0));
  if (edge) set(edge + used * N * N, (steps - used) * N * N, Real(0));
}

// The messages of a chunk's last frame without what comes from behind it, which alpha has: from norm, as the forward
// pass had them. For a whole warp.
template <class Real>
__device__ __forceinline__ void messages_of(const Real *norm, const Real *emission, int N, Real *messages) {
  const int lane = threadIdx.x % kWarp;
  Real top_e = negative_infinity<Real>(), top = top_e;
  for (int j = lane; emission && j < N; j += kWarp) top_e = fmax(top_e, emission[j]);
  top_e = or_zero(warp_max(top_e));
  for (int j = lane; j < N; j += kWarp) {
    messages[j] = norm[j] + (emission ? emission[j] - top_e : Real(0));
    top = fmax(top, messages[j]);
  }
  top = or_zero(warp_max(top));
  for (int j = lane; j < N; j += kWarp) messages[j] -= top;
}

// A chunk a block, of the sequences that were done so: chunks.h. Its arcs are those into its frames.
template <class Real>
__global__ void __launch_bounds__(kMostThreads, kBlocks<Real>)
    chunk_backward_kernel(hmm_problem p, Tiling o, const Real *grad, const Real *alpha, const Real *norm,
                          const Real *centre, const int32_t *method, Real *state, Real *edge) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, chunk = blockIdx.y, T = p.time, N = p.states;
  if (method[b] != HMM_CHUNKS) return;  // the whole block
  const Sequence<Real> q(p, b);
  const Real g = grad[b];
  const Span span = span_of(p, q.length, chunk);
  Real *const edges = edge ? edge + b * (T - 1) * N * N : nullptr;
  state += b * T * N;
  if (chunk == 0) {
    set(state + q.length * N, (T - q.length) * N, Real(0));
    if (edges) set(edges + (q.length - 1) * N * N, (T - q.length) * N * N, Real(0));
  }
  if (span.frames <= 0) return;  // the whole block
  const int64_t at = (b * T + span.first) * N, arcs = chunk ? span.first - 1 : 0;  // the first step that is its
  if (g == 0) {  // the whole block
    set(state + span.first * N, span.frames * N, Real(0));
    if (edges) set(edges + arcs * N * N, (span.first + span.frames - 1 - arcs) * N * N, Real(0));
    return;
  }
  Real *const before = carve<Real>(memory, int(N));
  const bool enters = edges && chunk > 0;
  if (enters && threadIdx.x < kWarp)
    messages_of(norm + at - N, q.emission ? q.emission + (span.first - 1) * N : nullptr, int(N), before);
  if (!HMM_DEFECT(34)) __syncthreads();
  const BackwardArrays<Real> x = {alpha + at, norm + at, centre + b * T + span.first, state + span.first * N,
                                  edges ? edges + span.first * N * N : nullptr, enters ? before : nullptr};
  backward_walk<false, Real, false>(o, memory, q.part(span.first, span.frames, nullptr, nullptr), false, g, x);
}

}  // namespace

template <class Real>
int log_space_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                       const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge,
                       void *workspace, void *stream) {
  if (p.batch == 0) return HMM_OK;
  const auto [tiled, rows, columns, bytes] = backward_block<Real>(p.states);
  const EarlyChunks<Real> early(p, workspace);
  if (early.done) {
    const int status = early_backward(p, early, grad, log_partition, alpha, norm, centre, method, state, edge, stream);
    if (status) return status;
  }
  if constexpr (sizeof(Real) == 4)
    if (by_chunks<Real>(p)) {
      const dim3 grid(unsigned(p.batch), unsigned(chunks_of(p)));
      const int status = launch(chunk_backward_kernel<Real>, grid, rows.threads, bytes + carved<Real>(p.states), stream,
                                p, rows, grad, alpha, norm, centre, method, state, edge);
      if (status) return status;
    }
  return launch(tiled ? backward_kernel<Real, true> : backward_kernel<Real, false>, dim3(unsigned(p.batch), 2),
                rows.threads, bytes, stream, p, rows, columns, grad, log_partition, alpha, norm, centre, method, state,
                edge, early.done);
}

#define HMM_OF(Real)                                                                                                 \
  template int log_space_backward<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *, \
                                        const Real *, const int32_t *, Real *, Real *, void *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
