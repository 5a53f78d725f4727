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
// In chunks (log_space.cu), a block a chunk begins with gamma = exp(alpha) of its last frame, and goes on as above to
// its first one; where edges are asked for, through the arcs into it, too. The alpha before those is found again from
// norm, since the one that is kept has the messages from behind it added.
//
// Scores pass through shared memory (staging.h). To the front up to 32 lanes go along a row, four rows at once; to the
// end a column is a thread's, or several threads' for N up to 128, four arcs at once. Cost a step, N^2 arcs: an
// exponential, 4 additions, a product, 4 bytes (8 in float64) read, as many written where edges are asked for. Barriers
// a step: 1 and one a chunk of 10 KB: 2 for N up to 50 in float32, 8 for 128.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING, T none. Shared memory within 48 KB. Compiled and executed on the CPU,
// not timed.
#include "chunks.h"
#include "kernels.h"
#include "staging.h"
#include "walks.h"

namespace hmm {
namespace {

constexpr int kTiledThreads = 256, kBackwardTile = 128;  // narrower tiles: a row's columns are shared by lanes
constexpr int kColumnTile = kTiledThreads;               // but to the end a column is one thread's

template <class Real> size_t backward_fixed(int threads, int64_t N, bool tiled) {
  return (tiled ? 1 : 2) * carved<Real>(N) + (tiled ? 0 : carved<Real>(threads)) + carved<Real>(threads / kWarp);
}

// Posteriors of the arcs of a chunk, times grad, to `edge` (null for none), and their sums over the chunk's columns,
// added to `previous` but for the first tile. A row belongs to `lanes` lanes; returns what this thread's rows sum to.
template <class Real, bool Tiled>
__device__ __forceinline__ Real posterior_rows(const Chunk<Real, Tiled> &c, const Real *messages, const Real *u, Real C,
                                               Real grad, int lanes, Real *previous, Real *edge) {
  constexpr int kBatch = 4;
  const int rows_at_once = blockDim.x / lanes, lane = int(threadIdx.x) & (lanes - 1);
  Real all = 0;
#pragma unroll 1
  for (int first = 0; first < c.rows; first += kBatch * rows_at_once) {
    const int mine = first + threadIdx.x / lanes;
    Real a[kBatch], sum[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = mine + k * rows_at_once;
      a[k] = r < c.rows ? messages[c.row + r] : Real(0), sum[k] = 0;
    }
#pragma unroll 1
    for (int j = lane; j < c.columns; j += lanes) {
      const Real u_j = u[c.column + j];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int r = mine + k * rows_at_once;
        if (r >= c.rows) continue;
        const Real probability = exp(((c[r][j] - C) - u_j) + a[k]);
        sum[k] += probability;
        if (edge) edge[int64_t(c.row + r) * c.states + c.column + j] = grad * probability;
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = mine + k * rows_at_once;
#pragma unroll 1
      for (int n = lanes / 2; n > 0; n /= 2) sum[k] += __shfl_xor_sync(kAllLanes, sum[k], n);
      if (r >= c.rows) continue;
      all += sum[k];
      if (lane == 0) previous[c.row + r] = Tiled && c.column > 0 ? previous[c.row + r] + sum[k] : sum[k];
    }
  }
  return all;
}

// The same for the columns of a chunk, of which rows `group`, group + groups, ... are this thread's; adds what they sum
// to to `sum`.
template <class Real, bool Tiled>
__device__ __forceinline__ void posterior_column(const Chunk<Real, Tiled> &c, Real message, const Real *u, Real C,
                                                 Real grad, int group, int groups, int column, Real *edge, Real &sum) {
  constexpr int kBatch = 4;
#pragma unroll 1
  for (int first = group; first < c.rows; first += kBatch * groups) {
    Real probability[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = first + k * groups;
      probability[k] = r < c.rows ? exp(((c[r][column] - C) - u[c.row + r]) + message) : Real(0);
    }
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = first + k * groups;
      sum += probability[k];
      if (edge && r < c.rows) edge[int64_t(c.row + r) * c.states + c.column + column] = grad * probability[k];
    }
  }
}

// What a block keeps in shared memory beside the ring. Where there are tiles, gamma_t is in `state` until it is
// normalised.
template <class Real, bool Tiled> struct BackwardMemory {
  Real *u, *messages, *gamma, *warp_sums;  // gamma: of each row, or what each thread has of a column's

  __device__ __forceinline__ BackwardMemory(unsigned char *&memory, int N, int threads)
      : u(carve<Real>(memory, N)),
        messages(Tiled ? nullptr : carve<Real>(memory, N)),
        gamma(Tiled ? nullptr : carve<Real>(memory, threads)),
        warp_sums(carve<Real>(memory, threads / kWarp)) {}
};

// What a walk reads and writes, of one sequence; edge is null to skip.
template <class Real> struct BackwardArrays {
  const Real *alpha, *norm, *centre;
  Real *state, *edge;
  const Real *before = nullptr;  // of a chunk: messages of the frame before frame 0, from which arcs lead to it
};

// The arcs of a step, to `edge` and to `gamma` of the next frame; returns this thread's part of its sum.
template <bool ToEnd, class Real, bool Tiled>
__device__ __forceinline__ Real posterior_step(Ring<Real, Tiled> &ring, const Real *arcs, const Real *messages,
                                               const Real *u, Real C, Real grad, int lanes, Real *gamma, Real *edge) {
  const Tiling &o = ring.o;
  const int thread = threadIdx.x, group = Tiled ? 0 : thread / o.states, column = Tiled ? thread : thread % o.states;
  Real all = 0;
#pragma unroll 1
  for (int tile = 0; tile < o.tiles; tile++) {
    const int j = tile * o.width + column;
    const bool mine = ToEnd && group < o.groups && j < o.states;
    Real sum = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      const Chunk<Real, Tiled> chunk = ring.arrive(arcs, tile, n);
      if (!ToEnd) all += posterior_rows(chunk, messages, u, C, grad, lanes, gamma, edge);
      else if (mine) posterior_column(chunk, messages[j], u, C, grad, group, o.groups, column, edge, sum);
    }
    if (mine) gamma[Tiled ? j : thread] = sum, all += sum;
  }
  return all;
}

// One walk, from the last frame of a sequence or from the middle to one end.
template <bool ToEnd, class Real, bool Tiled>
__device__ __forceinline__ void backward_walk(const Tiling &o, unsigned char *memory, const Sequence<Real> &q,
                                              bool both, Real grad, const BackwardArrays<Real> &x) {
  constexpr int kStep = ToEnd ? 1 : -1;
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x;
  Ring<Real, Tiled> ring(o, memory);
  const BackwardMemory<Real, Tiled> held(memory, N, threads);
  int lanes = 1;  // that share a row
  while (!ToEnd && lanes < o.width && lanes < kWarp) lanes *= 2;
  const Walk walk = walk_to_ends(q.length, both, ToEnd);
  const bool enters = !ToEnd && x.before;
  const int64_t last = ToEnd ? q.length - 1 : enters ? -1 : 0;
  bool meets = walk.meets;  // t is of the other half, and only its message is known
  int64_t t = meets ? walk.first - kStep : walk.first;
  const int64_t steps = kStep * (last - t);
  const auto arcs_from = [&](int64_t frame) { return q.arcs(ToEnd ? frame + 1 : frame); };
  ring.start(steps > 0 ? arcs_from(t) : q.transition, kStep * q.stride, steps);
  Real sum = meets, norm_j = 0, alpha_j = 0;  // the thread's part of gamma's; its column's, where that is one
  Real *gamma_t = Tiled ? x.state + t * N : held.gamma;
  if (!meets) {
#pragma unroll 1
    for (int j = thread; j < N; j += threads) sum += gamma_t[j] = exp(x.alpha[t * N + j]);
    sum = warp_sum(sum);
  }
  for (;; t += kStep) {
    if (thread % kWarp == 0) held.warp_sums[thread / kWarp] = sum;
    const Real C = x.centre[meets ? 0 : t], rest = meets ? x.centre[q.length - 1] : Real(0);
    const Real *const norm = (meets ? x.alpha : x.norm) + t * N;
    if (!Tiled && thread < N && t != last) {
      norm_j = norm[thread];
      alpha_j = enters && t == 0 ? x.before[thread] : x.alpha[(t + kStep) * N + thread];
    }
#if HMM_MUTATION != 7
    __syncthreads();
#endif
    // The mass of gamma is exact: normalising it here keeps rounding errors from adding up over time.
    const Real scale = 1 / sum_of(held.warp_sums, threads / kWarp);
#pragma unroll 1
    for (int j = thread; j < N; j += threads) {
      Real gamma = 1;
      if (!meets) {
        gamma = gamma_t[j];
        if (ToEnd && !Tiled)
#pragma unroll 4
          for (int g = 1; g < o.groups; g++) gamma += gamma_t[g * N + j];
        gamma *= scale;
        x.state[t * N + j] = gamma * grad;
      }
      if (t == last) continue;
      const Real known = Tiled ? norm[j] : norm_j;
      held.u[j] = gamma == 0 ? Real(1e37) : (meets ? rest - known : known) - log(gamma);
      if (!Tiled) held.messages[j] = alpha_j;
    }
    if (t == last) break;
    const Real *const messages = Tiled ? x.alpha + (t + kStep) * N : held.messages;
    gamma_t = Tiled ? x.state + (t + kStep) * N : held.gamma;
    Real *edge = x.edge ? x.edge + (ToEnd ? t : t - 1) * N * N : nullptr;
    if (ToEnd && meets) edge = nullptr;  // the other walk's
    sum = posterior_step<ToEnd>(ring, arcs_from(t), messages, held.u, C, grad, lanes, gamma_t, edge);
    if (enters && t == 0) break;  // gamma of the frame before is another walk's
    meets = false;
#pragma unroll 1
    for (int n = lanes; n < kWarp; n *= 2) sum += __shfl_xor_sync(kAllLanes, sum, n);
  }
  ring.stop();
}

// A walk a block, from the end or from the middle as the messages are; where those are from the end, the grid's second
// row has nothing to do.
template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTiledThreads : kMostThreads, (Tiled ? 2 : 1) * kBlocks<Real>)
    backward_kernel(hmm_problem p, Tiling of_rows, Tiling of_columns, const Real *grad, const Real *log_partition,
                    const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state,
                    Real *edge) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states, steps = T > 1 ? T - 1 : 0;
  if (method[b] == HMM_CHUNKS) return;  // the whole block
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
#if HMM_MUTATION != 34
  __syncthreads();
#endif
  const BackwardArrays<Real> x = {alpha + at, norm + at, centre + b * T + span.first, state + span.first * N,
                                  edges ? edges + span.first * N * N : nullptr, enters ? before : nullptr};
  backward_walk<false, Real, false>(o, memory, q.part(span.first, span.frames, nullptr, nullptr), false, g, x);
}

}  // namespace

template <class Real>
int log_space_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                       const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge,
                       void *stream) {
  if (p.batch == 0) return HMM_OK;
  const bool tiled = p.states > kBackwardTile;
  const int most = tiled ? kTiledThreads : kMostThreads;
  const size_t fixed = backward_fixed<Real>(most, p.states, tiled);
  const Tiling rows = tiling_of<Real>(p.states, most, kBackwardTile, kBackwardTile, fixed);
  const Tiling columns = tiling_of<Real>(p.states, most, kBackwardTile, kColumnTile, fixed);
  const size_t bytes = max(Ring<Real, true>::bytes(rows), Ring<Real, true>::bytes(columns)) +
                       backward_fixed<Real>(rows.threads, p.states, tiled);
  if constexpr (sizeof(Real) == 4)
    if (by_chunks<Real>(p)) {
      const dim3 grid(unsigned(p.batch), unsigned(chunks_of(p)));
      const int status = launch(chunk_backward_kernel<Real>, grid, rows.threads, bytes + carved<Real>(p.states), stream,
                                p, rows, grad, alpha, norm, centre, method, state, edge);
      if (status) return status;
    }
  return launch(tiled ? backward_kernel<Real, true> : backward_kernel<Real, false>, dim3(unsigned(p.batch), 2),
                rows.threads, bytes, stream, p, rows, columns, grad, log_partition, alpha, norm, centre, method, state,
                edge);
}

#define HMM_OF(Real)                                                                                                 \
  template int log_space_backward<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *, \
                                        const Real *, const int32_t *, Real *, Real *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
