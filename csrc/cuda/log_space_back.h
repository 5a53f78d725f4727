// One walk of a backward pass in log space over transitions that vary over time, to either end: log_space_back.cu has
// the recursion and the kernels.
#pragma once
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
                                               Real grad, int lanes_log2, Real *previous, Real *edge) {
  constexpr int kBatch = kRowsAtOnce<Real>;
  const int lanes = 1 << lanes_log2, rows_at_once = int(blockDim.x) >> lanes_log2;
  const int lane = int(threadIdx.x) & (lanes - 1);
  Real all = 0;
#pragma unroll 1
  for (int first = 0; first < c.rows; first += kBatch * rows_at_once) {
    const int mine = first + (int(threadIdx.x) >> lanes_log2);
    Real *const to = edge ? edge + int64_t(c.row + mine) * c.states + c.column : nullptr;
    Real a[kBatch], sum[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = mine + k * rows_at_once;
      a[k] = r < c.rows ? messages[c.row + r] : negative_infinity<Real>(), sum[k] = 0;
    }
#pragma unroll 1
    for (int j = lane; j < c.columns; j += lanes) {
      const Real u_j = u[c.column + j];
      Real probability[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {  // of a row that is not there as of the last one, which a[k] makes 0
        probability[k] = exp(((c[min(mine + k * rows_at_once, c.rows - 1)][j] - C) - u_j) + a[k]);
        sum[k] += probability[k];
      }
      if (edge)
#pragma unroll
        for (int k = 0; k < kBatch; k++)
          if (mine + k * rows_at_once < c.rows) to[k * rows_at_once * c.states + j] = grad * probability[k];
    }
    // Row by row within a step, so that no row waits for another one.
#pragma unroll
    for (int n = kWarp / 2; n > 0; n /= 2) {
      if (n >= lanes) continue;
      Real other[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) other[k] = __shfl_xor_sync(kAllLanes, sum[k], n);
#pragma unroll
      for (int k = 0; k < kBatch; k++) sum[k] += other[k];
    }
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int r = mine + k * rows_at_once;
      all += sum[k];
      if (lane != 0 || r >= c.rows) continue;
      previous[c.row + r] = Tiled && c.column > 0 ? previous[c.row + r] + sum[k] : sum[k];
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
  // Of a chunk that begins early: how many frames are its own, and not another chunk's; and posteriors of the frame
  // behind these, in the first of two rows that those of all others come to, and of frame 0.
  int64_t own = 0;
  Real *arrived = nullptr, *left = nullptr;
};

// The arcs of a step, to `edge` and to `gamma` of the next frame; returns this thread's part of its sum.
template <bool ToEnd, class Real, bool Tiled>
__device__ __forceinline__ Real posterior_step(Ring<Real, Tiled> &ring, const Real *arcs, const Real *messages,
                                               const Real *u, Real C, Real grad, int lanes_log2, Real *gamma,
                                               Real *edge) {
  const Tiling &o = ring.o;
  const int thread = threadIdx.x, group = Tiled ? 0 : thread / o.states, column = Tiled ? thread : thread % o.states;
  Real all = 0;
#pragma unroll 1
  for (int tile = 0; tile < ring.tiles(); tile++) {
    const int j = tile * o.width + column;
    const bool mine = ToEnd && group < o.groups && j < o.states;
    Real sum = 0;
#pragma unroll 1
    for (int n = 0; n < o.chunks; n++) {
      ring.arrive(tile + n > 0 ? 0 : first_copier(o.states));
      const Chunk<Real, Tiled> chunk = ring.here(arcs, tile, n);
      if (!ToEnd) all += posterior_rows(chunk, messages, u, C, grad, lanes_log2, gamma, edge);
      else if (mine) posterior_column(chunk, messages[j], u, C, grad, group, o.groups, column, edge, sum);
    }
    if (mine) gamma[Tiled ? j : thread] = sum, all += sum;
  }
  return all;
}

// One walk, from the last frame of a sequence or from the middle to one end.
template <bool ToEnd, class Real, bool Tiled, bool Early = false>
__device__ __forceinline__ void backward_walk(const Tiling &o, unsigned char *memory, const Sequence<Real> &q,
                                              bool both, Real grad, const BackwardArrays<Real> &x) {
  constexpr int kStep = ToEnd ? 1 : -1;
  const int N = o.states, thread = threadIdx.x, threads = blockDim.x;
  Ring<Real, Tiled> ring(o, memory);
  const BackwardMemory<Real, Tiled> held(memory, N, threads);
  int lanes_log2 = 0;  // of those that share a row
  while (!ToEnd && 1 << lanes_log2 < o.width && 1 << lanes_log2 < kWarp) lanes_log2++;
  const Walk walk = walk_to_ends(q.length, both, ToEnd);
  const bool enters = !ToEnd && x.before;
  const int64_t last = ToEnd ? q.length - 1 : enters ? -1 : 0;
  bool meets = walk.meets;  // t is of the other half, and only its message is known
  int64_t t = meets ? walk.first - kStep : walk.first;
  const int64_t steps = kStep * (last - t);
  const auto arcs_from = [&](int64_t frame) { return q.arcs(ToEnd ? frame + 1 : frame); };
  ring.start(steps > 0 ? arcs_from(t) : q.transition, kStep * q.stride, steps);
  const auto early = [&](int64_t frame) { return Early && frame >= x.own + HMM_DEFECT(60); };
  const auto state_of = [&](int64_t frame) {
    return early(frame) ? x.arrived + ((frame - x.own) & 1) * N : x.state + frame * N;
  };
  Real sum = meets;  // the thread's part of gamma's
  // What frame t and the one after it are known by, a step ahead; of the thread's column, where that is one. C is each
  // warp's first lane's: what all lanes load alike, nvcc waits for at once, to keep it in a uniform register.
  Real first_C = 0, norm_j = 0, alpha_j = 0;
  const auto look_ahead = [&](int64_t frame) {
    if (frame == last) return;
    if (thread % kWarp == 0) first_C = x.centre[frame == t && meets ? 0 : frame];
    if (Tiled || thread >= N) return;
    norm_j = ((frame == t && meets ? x.alpha : x.norm) + frame * N)[thread];
    alpha_j = enters && frame == 0 ? x.before[thread] : x.alpha[(frame + kStep) * N + thread];
  };
  look_ahead(t);
  Real *gamma_t = Tiled ? state_of(t) : held.gamma;
  if (!meets) {
#pragma unroll 1
    for (int j = thread; j < N; j += threads) sum += gamma_t[j] = exp(x.alpha[t * N + j]);
    sum = warp_sum(sum);
  }
  for (;; t += kStep) {
    if (thread % kWarp == 0) held.warp_sums[thread / kWarp] = sum;
    const Real rest = meets ? x.centre[q.length - 1] : Real(0);
    const Real *const norm = (meets ? x.alpha : x.norm) + t * N;
    if (!HMM_DEFECT(7)) __syncthreads();
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
        state_of(t)[j] = early(t) ? gamma : gamma * grad;
        if (Early && t == last) x.left[j] = gamma;
      }
      if (t == last) continue;
      const Real known = Tiled ? norm[j] : norm_j;
      held.u[j] = gamma == 0 ? Real(1e37) : (meets ? rest - known : known) - log(gamma);
      if (!Tiled) held.messages[j] = alpha_j;
    }
    if (t == last) break;
    const Real C = __shfl_sync(kAllLanes, first_C, 0);
    look_ahead(t + kStep);
    const Real *const messages = Tiled ? x.alpha + (t + kStep) * N : held.messages;
    gamma_t = Tiled ? state_of(t + kStep) : held.gamma;
    Real *edge = x.edge ? x.edge + (ToEnd ? t : t - 1) * N * N : nullptr;
    if ((ToEnd && meets) || early(t - 1)) edge = nullptr;  // another walk's
    sum = posterior_step<ToEnd>(ring, arcs_from(t), messages, held.u, C, grad, lanes_log2, gamma_t, edge);
    if (enters && t == 0) break;  // gamma of the frame before is another walk's
    meets = false;
#pragma unroll 1
    for (int n = 1 << lanes_log2; n < kWarp; n *= 2) sum += __shfl_xor_sync(kAllLanes, sum, n);
  }
  ring.stop();
}

// What a block of walks to either end needs; tiled: rows in tiles.
struct BackwardBlock {
  bool tiled;
  Tiling rows, columns;
  size_t bytes;
};
template <class Real> BackwardBlock backward_block(int64_t states) {
  const bool tiled = states > kBackwardTile;
  const int most = tiled ? kTiledThreads : kMostThreads;
  const size_t fixed = backward_fixed<Real>(most, states, tiled);
  const int threads = tiled ? most : threads_of_rows<Real>(states, most);
  const Tiling rows = tiling_of<Real>(states, threads, kBackwardTile, kBackwardTile, fixed);
  const Tiling columns = tiling_of<Real>(states, threads, kBackwardTile, kColumnTile, fixed);
  return {tiled, rows, columns,
          max(Ring<Real, true>::bytes(rows), Ring<Real, true>::bytes(columns)) +
              backward_fixed<Real>(rows.threads, states, tiled)};
}

}  // namespace
}  // namespace hmm
