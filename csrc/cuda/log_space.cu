// Forward-backward in log space, for transitions that vary over time.
//
//   c_t(j)     = max_i [alpha_{t-1}(i) + phi_t(i, j)]
//   norm_t(j)  = c_t(j) - C_t + log sum_i exp(alpha_{t-1}(i) + phi_t(i, j) - c_t(j)),        C_t = max_j c_t(j)
//   alpha_t(j) = norm_t(j) + (e_t(j) - max e_t) - M_t,                                      max_j alpha_t(j) = 0
//   log Z      = log sum_j exp(alpha_{L-1}(j) + f(j)) + sum_t (C_t + max e_t + M_t)         (the sum in float64)
//   p(z_{t-1} = i, z_t = j | x) = exp(phi_t(i, j) - C_t - u_t(j) + alpha_{t-1}(i)),
//   u_t(j) = norm_t(j) - log gamma_t(j)
//   gamma_{t-1}(i) = sum_j p(z_{t-1} = i, z_t = j | x) / what these sum to over i
//
// (csrc/cpu/log_space.h: every difference is between numbers of like size, messages are centred at every step.)
//
// A block goes through the frames of one sequence; scores pass through shared memory (staging.h). Forward, N / 32 warps
// or more hold a column a thread, several threads a column for N up to 256; a thread takes eight arcs at once (four in
// float64), their maximum before their exponentials, of which there is one an arc and one more for these. Backward, up
// to 32 lanes go along a row, four rows at once. M_t is subtracted where alpha is read, which saves a barrier.
// Cost a step, N^2 arcs, forward: an exponential, 2 maxima, 5 additions an arc, 4 (8 in float64) bytes read, and 16 N
// bytes; backward: an exponential, 4 additions, a product, 4 bytes read, 4 written where edges are asked for. Barriers
// a step: 1 and one a chunk of 10 KB: 2 for N up to 50 in float32, 8 for 128.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING, T none. Shared memory within 48 KB. Compiled and executed on the CPU,
// not timed.
#include "kernels.h"
#include "staging.h"

namespace hmm {
namespace {

constexpr int kTiledThreads = 256, kBackwardTile = 128;  // narrower tiles: a row's columns are shared by lanes

// ---- forward

// One more batch of rows for a column: (top, sum) = their log-sum, sum * exp(top), with those of rows `group`, group +
// groups, ... of a chunk. Messages are `middle` above what they should be.
template <class Real, bool Tiled>
__device__ __forceinline__ void log_sum_rows(const Chunk<Real, Tiled> &c, const Real *messages, Real middle, int group,
                                             int groups, int column, Real &top, Real &sum) {
  constexpr int kBatch = sizeof(Real) == 4 ? 8 : 4;
#pragma unroll 1
  for (int first = group; first < c.rows; first += kBatch * groups) {
    Real x[kBatch], a[kBatch], larger = top;
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = first + k * groups;
      x[k] = negative_infinity<Real>(), a[k] = 0;
      if (r < c.rows) x[k] = c[r][column + (HMM_MUTATION == 2)], a[k] = messages[c.row + r] - middle;
      larger = fmax(larger, x[k] + a[k]);
    }
    const Real from = or_zero(larger);
    sum *= exp(top - from);
#pragma unroll
    for (int k = 0; k < kBatch; k++)
      if (first + k * groups < c.rows) sum += exp((x[k] - from) + a[k]);
    top = larger;
  }
}

// What a block keeps in shared memory beside the ring.
template <class Real, bool Tiled> struct ForwardMemory {
  Real *messages;                   // norm_t + emissions, before M_t is taken out
  Real *partial_top, *partial_sum;  // of each thread, where it has a column to share
  Real *tops_c, *tops_alpha, *tops_frame;
  double *totals;

  __device__ __forceinline__ ForwardMemory(unsigned char *&memory, int N, int threads) {
    messages = carve<Real>(memory, N);
    partial_top = Tiled ? nullptr : carve<Real>(memory, threads),
    partial_sum = Tiled ? nullptr : carve<Real>(memory, threads);
    tops_c = carve<Real>(memory, threads / kWarp), tops_alpha = carve<Real>(memory, threads / kWarp);
    tops_frame = carve<Real>(memory, 2 * (threads / kWarp));
    totals = carve<double>(memory, threads / kWarp);
  }
  static size_t bytes(int64_t N, int threads) {
    const int warps = threads / kWarp;
    return carved<Real>(N) + (Tiled ? 0 : 2 * carved<Real>(threads)) + 2 * carved<Real>(warps) +
           carved<Real>(2 * warps) + carved<double>(warps);
  }
};

// The arcs into frame t, of which the first chunk is here: to partial_top and partial_sum, or where a column is one
// thread's, c_t to norm and the logarithm of the sum to alpha, until C_t is known. Returns the largest c_t of the
// thread's.
template <class Real, bool Tiled>
__device__ __forceinline__ Real sweep(Ring<Real, Tiled> &ring, Chunk<Real, Tiled> chunk, const Real *arcs, Real middle,
                                      const ForwardMemory<Real, Tiled> &held, Real *norm, Real *alpha) {
  const Tiling &o = ring.o;
  const int thread = threadIdx.x, group = Tiled ? 0 : thread / o.states, column = Tiled ? thread : thread % o.states;
  Real top_c = negative_infinity<Real>();
#pragma unroll 1
  for (int tile = 0; tile < o.tiles; tile++) {
    Real top = negative_infinity<Real>(), sum = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      if (tile + n > 0) chunk = ring.arrive(arcs, tile, n);
      if (group < o.groups && column < chunk.columns)
        log_sum_rows(chunk, held.messages, middle, group, o.groups, column, top, sum);
    }
    top_c = fmax(top_c, top);
    if (!Tiled) held.partial_top[thread] = top, held.partial_sum[thread] = sum;
    else if (column < chunk.columns) {
      norm[chunk.column + column] = top;
      alpha[chunk.column + column] = sum == 0 ? Real(0) : log(sum);
    }
  }
  return top_c;
}

// The groups' sums of column j together: c_t(j) and the logarithm of the sum, 0 where that is of nothing.
template <class Real>
__device__ __forceinline__ Real combine(const Real *partial_top, const Real *partial_sum, int groups, int N, int j,
                                        Real &log_sum) {
  Real c = negative_infinity<Real>(), sum = 0;
#pragma unroll 4
  for (int g = 0; g < groups; g++) c = fmax(c, partial_top[g * N + j]);
#pragma unroll 4
  for (int g = 0; g < groups; g++) sum += partial_sum[g * N + j] * exp(partial_top[g * N + j] - or_zero(c));
  log_sum = sum == 0 ? Real(0) : log(sum);
  return c;
}

// log Z, for thread 0: from the last frame's messages, its M and what has been taken out.
template <class Real, bool Tiled>
__device__ __forceinline__ double finish(const ForwardMemory<Real, Tiled> &held, int N, int64_t length, Real middle,
                                         double offset) {
  const int thread = threadIdx.x, warps = blockDim.x / kWarp;
  const bool feasible = middle - middle == 0;
  double total = 0;
  if (feasible && length > 0)
#pragma unroll 1
    for (int j = thread; j < N; j += blockDim.x) total += exp(double(held.messages[j] - middle));
  total = warp_sum(total);
  if (thread % kWarp == 0) held.totals[thread / kWarp] = total;
  __syncthreads();
  if (thread == 0)
#pragma unroll 1
    for (int w = 1; w < warps; w++) total += held.totals[w];
  if (length == 0) return 0;
  if (feasible) return offset + log(total);
  return middle == negative_infinity<Real>() ? double(middle) : double(middle - middle);
}

template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTile : kMostThreads, kBlocks<Real>)
    forward_kernel(hmm_problem p, Tiling o, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                   int32_t *method) {
  const int64_t b = blockIdx.x;
  HMM_SHARED_MEMORY(memory);
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x, warps = threads / kWarp;
  Ring<Real, Tiled> ring(o, memory);
  const ForwardMemory<Real, Tiled> held(memory, N, threads);
  const Sequence<Real> q(p, b);
  alpha += b * p.time * N, norm += b * p.time * N, centre += b * p.time;

  double offset = 0;  // of thread 0
  Real middle = 0;    // M of the frame before
  int64_t t = 0;
  ring.start(q.arcs(1), q.stride, q.length - 1);
  Chunk<Real, Tiled> chunk = {};
  Real ahead = q.next_emission(0);
  for (bool goes_on = q.length > 0; goes_on; t++) {
    Frame<Real> frame(q, t, !Tiled, ahead);
    ahead = Tiled ? Real(0) : q.next_emission(t + 1);
    Real *const norm_t = norm + t * N, *const alpha_t = alpha + t * N;
    Real top_c = negative_infinity<Real>();
    if (t > 0) top_c = sweep(ring, chunk, q.arcs(t), middle, held, norm_t, alpha_t);
    else
#pragma unroll 1
      for (int j = thread; j < N; j += threads) top_c = fmax(top_c, q.initial[j]);
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
      if (t == 0) c = q.initial[j];
      else if (Tiled) c = norm_t[j], log_sum = alpha_t[j];
      else c = combine(held.partial_top, held.partial_sum, o.groups, N, j, log_sum);
      const Real normal = (c - C) + log_sum, message = frame.template added<Tiled>(normal, j);
      norm_t[j] = normal, held.messages[j] = message;
      largest = larger_or_nan(largest, message);
    }
    largest = warp_larger_or_nan(largest);
    if (thread % kWarp == 0) held.tops_alpha[thread / kWarp] = largest;
    const bool last = t + 1 == q.length;
    if (last) __syncthreads();
    else chunk = ring.arrive(q.arcs(t + 1), 0, 0);
    middle = largest_of(held.tops_alpha, warps);
    const bool feasible = middle - middle == 0;
    goes_on = feasible && !last;
#pragma unroll 1
    for (int j = thread; j < N; j += threads) alpha_t[j] = feasible ? held.messages[j] - middle : held.messages[j];
    if (thread == 0) centre[t] = C, offset += double(C) + double(frame.top_e) + double(frame.top_f) + double(middle);
  }
  ring.stop();
  set(alpha + t * N, (p.time - t) * N, Real(0));
  set(norm + t * N, (p.time - t) * N, Real(0));
  set(centre + t, p.time - t, Real(0));
  const double z = finish(held, N, q.length, middle, offset);
  if (thread == 0) log_partition[b] = Real(z), method[b] = HMM_LOG_SPACE;
}

// ---- backward

template <class Real> size_t backward_fixed(int threads, int64_t N, bool tiled) {
  return (tiled ? 1 : 3) * carved<Real>(N) + carved<Real>(threads / kWarp);
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

template <class Real, bool Tiled> struct Backward {
  const hmm_problem &p;
  const Tiling &o;
  Ring<Real, Tiled> ring;
  Real *const u, *const shared_messages, *const shared_previous, *const warp_sums;
  int lanes;  // that share a row

  __device__ __forceinline__ Backward(const hmm_problem &problem, const Tiling &tiling, unsigned char *memory)
      : p(problem),
        o(tiling),
        ring(tiling, memory),
        u(carve<Real>(memory, o.states)),
        shared_messages(Tiled ? nullptr : carve<Real>(memory, o.states)),
        shared_previous(Tiled ? nullptr : carve<Real>(memory, o.states)),
        warp_sums(carve<Real>(memory, blockDim.x / kWarp)) {
    for (lanes = 1; lanes < o.width && lanes < kWarp;) lanes *= 2;
  }

  // alpha, norm, centre, state, edge (null to skip): of the sequence.
  __device__ __forceinline__ void walk(const Sequence<Real> &q, Real grad, const Real *alpha, const Real *norm,
                                       const Real *centre, Real *state, Real *edge) {
    const int N = o.states, thread = threadIdx.x, threads = blockDim.x;
    int64_t t = q.length - 1;
    ring.start(t > 0 ? q.arcs(t) : q.transition, -q.stride, t);
    Real sum = 0, norm_j = 0, alpha_j = 0;  // the thread's rows; its column's, where that is one
    Real *previous = Tiled ? state + t * N : shared_previous;
#pragma unroll 1
    for (int j = thread; j < N; j += threads) sum += previous[j] = exp(alpha[t * N + j]);
    sum = warp_sum(sum);
    for (;; t--) {
      if (thread % kWarp == 0) warp_sums[thread / kWarp] = sum;
      const Real C = centre[t];
      if (!Tiled && thread < N && t > 0) norm_j = norm[t * N + thread], alpha_j = alpha[(t - 1) * N + thread];
      __syncthreads();
      // The mass of gamma is exact: normalising it here keeps rounding errors from adding up over time.
      const Real scale = 1 / sum_of(warp_sums, threads / kWarp);
#pragma unroll 1
      for (int j = thread; j < N; j += threads) {
        const Real gamma = previous[j] * scale;
        state[t * N + j] = gamma * grad;
        if (t == 0) continue;
        u[j] = gamma == 0 ? Real(1e37) : (Tiled ? norm[t * N + j] : norm_j) - log(gamma);
        if (!Tiled) shared_messages[j] = alpha_j;
      }
      if (t == 0) break;
      const Real *const messages = Tiled ? alpha + (t - 1) * N : shared_messages;
      previous = Tiled ? state + (t - 1) * N : shared_previous;
      sum = 0;
#pragma unroll 1
      for (int tile = 0; tile < o.tiles; tile++)
#pragma unroll 1
        for (int n = 0; n < o.chunks; n++) {
          const Chunk<Real, Tiled> chunk = ring.arrive(q.arcs(t), tile, n);
          sum += posterior_rows(chunk, messages, u, C, grad, lanes, previous, edge ? edge + (t - 1) * N * N : nullptr);
        }
#pragma unroll 1
      for (int n = lanes; n < kWarp; n *= 2) sum += __shfl_xor_sync(kAllLanes, sum, n);
    }
  }
};

template <class Real, bool Tiled>
__global__ void __launch_bounds__(Tiled ? kTiledThreads : kMostThreads, (Tiled ? 2 : 1) * kBlocks<Real>)
    backward_kernel(hmm_problem p, Tiling o, const Real *grad, const Real *log_partition, const Real *alpha,
                    const Real *norm, const Real *centre, Real *state, Real *edge) {
  HMM_SHARED_MEMORY(memory);
  Backward<Real, Tiled> backward(p, o, memory);
  const int64_t b = blockIdx.x, T = p.time, N = o.states, steps = T > 1 ? T - 1 : 0;
  const Sequence<Real> q(p, b);
  const Real z = log_partition[b], g = grad[b];
  const int64_t used = q.length > 1 ? q.length - 1 : 0;
  state += b * T * N;
  if (edge) edge += b * steps * N * N;
  const bool infeasible = z == negative_infinity<Real>(), invalid = z - z != 0 && !infeasible;
  if (invalid || infeasible || g == 0 || q.length == 0) {
    const Real value = invalid ? z - z : Real(0);
    set(state, q.length * N, value);
    if (edge) set(edge, used * N * N, value);
  } else backward.walk(q, g, alpha + b * T * N, norm + b * T * N, centre + b * T, state, edge);
  set(state + q.length * N, (T - q.length) * N, Real(0));
  if (edge) set(edge + used * N * N, (steps - used) * N * N, Real(0));
  backward.ring.stop();
}

}  // namespace

template <class Real>
int log_space_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                      void *stream) {
  if (p.batch == 0) return HMM_OK;
  const bool tiled = p.states > kMostThreads;
  const int most = tiled ? kTile : kMostThreads;
  const auto fixed = tiled ? ForwardMemory<Real, true>::bytes : ForwardMemory<Real, false>::bytes;
  const Tiling o = tiling_of<Real>(p.states, most, kMostThreads, kTile, fixed(p.states, most));
  const size_t bytes = Ring<Real, true>::bytes(o) + fixed(p.states, o.threads);
  return launch(tiled ? forward_kernel<Real, true> : forward_kernel<Real, false>, dim3(unsigned(p.batch)), o.threads,
                bytes, stream, p, o, log_partition, alpha, norm, centre, method);
}

template <class Real>
int log_space_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                       const Real *norm, const Real *centre, Real *state, Real *edge, void *stream) {
  if (p.batch == 0) return HMM_OK;
  const bool tiled = p.states > kBackwardTile;
  const int most = tiled ? kTiledThreads : kMostThreads;
  const size_t fixed = backward_fixed<Real>(most, p.states, tiled);
  const Tiling o = tiling_of<Real>(p.states, most, kBackwardTile, kBackwardTile, fixed);
  const size_t bytes = Ring<Real, true>::bytes(o) + backward_fixed<Real>(o.threads, p.states, tiled);
  return launch(tiled ? backward_kernel<Real, true> : backward_kernel<Real, false>, dim3(unsigned(p.batch)), o.threads,
                bytes, stream, p, o, grad, log_partition, alpha, norm, centre, state, edge);
}

#define HMM_OF(Real)                                                                                                 \
  template int log_space_forward<Real>(const hmm_problem &, Real *, Real *, Real *, Real *, int32_t *, void *);      \
  template int log_space_backward<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *, \
                                        const Real *, Real *, Real *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
