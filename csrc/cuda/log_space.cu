// Forward pass in log space, for transitions that vary over time; log_space_back.cu has the backward pass.
//
//   c_t(j)     = max_i [alpha_{t-1}(i) + phi_t(i, j)]
//   norm_t(j)  = c_t(j) - C_t + log sum_i exp(alpha_{t-1}(i) + phi_t(i, j) - c_t(j)),        C_t = max_j c_t(j)
//   alpha_t(j) = norm_t(j) + (e_t(j) - max e_t) - M_t,                                      max_j alpha_t(j) = 0
//   log Z      = log sum_j exp(alpha_{L-1}(j) + f(j)) + sum_t (C_t + max e_t + M_t)         (the sum in float64)
//
// (csrc/cpu/log_space.h: every difference is between numbers of like size, messages are centred at every step.)
//
// From both ends, with m = (L + 1) / 2, one block walks frames 0 to m-1, another one L-1 to m, against the arcs:
//
//   norm_t(i)  = log sum_j exp(phi_{t+1}(i, j) + alpha_{t+1}(j)) - C_t, and alpha_t of it as above; norm_{L-1} = 0, and
//                final scores are among frame L-1's
//   log Z      = J + log S + sum_t (C_t + max e_t + M_t),   J = max_ij [alpha_{m-1}(i) + phi_m(i, j) + alpha_m(j)],
//   S          = sum_ij exp(alpha_{m-1}(i) + phi_m(i, j) + alpha_m(j) - J)                  (join_kernel)
//
// In chunks, whose ends transfer.cu and bridge.cu know, each is a chain of its own that a block walks from its front:
// from the log messages of the frame before it, through the arcs into its first frame, to its last one, to which the
// log messages from behind are added as final scores are. Chunks that begin early: early_chunks.h. What is done so is
// left out of the other kernels.
//
// Scores pass through shared memory (staging.h). From the front a column is a thread's, or several threads', each of
// which takes ten arcs at once (four in float64; more for N over 64), their maximum before their exponentials, of which
// there is one an arc and one more for these; up to four lanes put together what they have, while the other warps copy.
// From the end, up to 32 lanes go along a row, as many as a chunk's rows leave. M_t is subtracted where alpha is read,
// which saves a barrier. Cost a step, N^2 arcs: an exponential, 2 maxima, 5 additions an arc, 4 (8 in float64) bytes
// read, and 16 N bytes; rows of more than 128 are cut into tiles, where a sum goes on from tile to tile. Barriers a
// step: 1 and one a chunk of 10 KB: 2 for N up to 50 in float32, 8 for 128. The join reads N^2 arcs twice, one block a
// sequence.
// Limits: N at most HMM_CUDA_MOST_STATES_VARYING, T none. Shared memory within 48 KB. Compiled and executed on the CPU,
// not timed.
#include "log_space.h"

#include "chunks.h"
#include "early_chunks.h"

namespace hmm {
namespace {

constexpr int kRowTile = 128;  // columns: narrower tiles, since a row's columns are shared by lanes
constexpr int kJoinThreads = 256;

// Whole sequences from the front, a block each.
template <class Real, bool Large>
__global__ void __launch_bounds__(Large ? kTile : kForwardThreads<Real>, kBlocks<Real>)
    forward_kernel(hmm_problem p, Tiling o, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                   int32_t *method, const int32_t *done) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states;
  if (done && done[b]) return;  // the whole block
  const Sequence<Real> q(p, b);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  const double z = forward_walk<false, Real, Large, Large>(o, memory, q, false, alpha, norm, centre);
  clear(q.length, T - q.length, N, alpha, norm, centre);
  if (threadIdx.x == 0) log_partition[b] = Real(z), method[b] = HMM_LOG_SPACE;
}

// Two blocks a sequence, each of which has half of the frames. RowTiles: rows in tiles.
template <class Real, bool Large, bool RowTiles>
__global__ void __launch_bounds__(Large ? kTile : kForwardThreads<Real>, 1)
    halves_kernel(hmm_problem p, Tiling of_columns, Tiling of_rows, Real *log_partition, Real *alpha, Real *norm,
                  Real *centre, int32_t *method, double *taken, const int32_t *done) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, T = p.time, N = p.states;
  if (done && done[b]) return;  // the whole block
  const Sequence<Real> q(p, b);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  if (blockIdx.y == 1) {  // the whole block
    if (q.length < 2) return;
    const double out = forward_walk<true, Real, Large, RowTiles>(of_rows, memory, q, true, alpha, norm, centre);
    if (threadIdx.x == 0) taken[2 * b + 1] = out;
    return;
  }
  const double out = forward_walk<false, Real, Large, Large>(of_columns, memory, q, true, alpha, norm, centre);
  clear(q.length, T - q.length, N, alpha, norm, centre);
  if (threadIdx.x != 0) return;
  method[b] = HMM_BOTH_ENDS;
  if (q.length < 2) log_partition[b] = Real(out);
  else taken[2 * b] = out;
}

// A chunk a block, of the sequences that are done so: chunks.h.
template <class Real>
__global__ void __launch_bounds__(kMostThreads, kBlocks<Real>)
    chunk_forward_kernel(hmm_problem p, Tiling o, Chunks chunks, Real *alpha, Real *norm, Real *centre) {
  HMM_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x, chunk = blockIdx.y, T = p.time, N = p.states;
  if (!chunks.done[b]) return;  // the whole block
  const Sequence<Real> q(p, b);
  alpha += b * T * N, norm += b * T * N, centre += b * T;
  if (chunk == 0) clear(q.length, T - q.length, N, alpha, norm, centre);
  const Span span = span_of(p, q.length, chunk);
  if (span.frames <= 0) return;  // the whole block
  const int64_t end = (b * chunks_of(p) + chunk) * N;
  const Sequence<Real> part = q.part(span.first, span.frames, chunk ? chunks.entry + end : nullptr,
                                     span.last ? nullptr : chunks.exit + end);
  forward_walk<false, Real, false, false>(o, memory, part, false, alpha + span.first * N, norm + span.first * N,
                                          centre + span.first);
}

// log Z where the halves meet; J and log S in place of the centres of frames 0 and L-1, which nothing needs. A warp a
// row.
template <class Real>
__global__ void __launch_bounds__(kJoinThreads, 1)
    join_kernel(hmm_problem p, Real *log_partition, const Real *alpha, Real *centre, const double *taken,
                const int32_t *done) {
  HMM_SHARED_MEMORY(memory);
  constexpr int kWarps = kJoinThreads / kWarp;
  Real *const tops = carve<Real>(memory, kWarps);
  double *const sums = carve<double>(memory, kWarps);
  const int64_t b = blockIdx.x;
  const int N = int(p.states), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Sequence<Real> q(p, b);
  const int64_t m = meeting(q.length, true);
  if (m == q.length || (done && done[b])) return;  // the whole block
  const Real *const before = alpha + (b * p.time + m - 1) * N, *const behind = before + (HMM_DEFECT(8) ? 0 : N);
  const Real *const arcs = q.arcs(m);
  Real top = negative_infinity<Real>();
  for (int i = warp; i < N; i += kWarps)
#pragma unroll 4
    for (int j = lane; j < N; j += kWarp) top = fmax(top, arcs[int64_t(i) * N + j] + (before[i] + behind[j]));
  top = warp_max(top);
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  const Real J = or_zero(largest_of(tops, kWarps));
  double total = 0;
  for (int i = warp; i < N; i += kWarps) {
    Real sum = 0;
#pragma unroll 4
    for (int j = lane; j < N; j += kWarp) sum += exp((arcs[int64_t(i) * N + j] - J) + (before[i] + behind[j]));
    total += double(sum);
  }
  total = block_sum<kJoinThreads>(total, sums);
  if (threadIdx.x != 0) return;  // no barrier follows
  centre += b * p.time;
  centre[0] = J, centre[q.length - 1] = Real(log(total));
  log_partition[b] = Real(taken[2 * b] + taken[2 * b + 1] + double(J) + log(total));
}

}  // namespace

template <class Real> size_t log_space_workspace(const hmm_problem &p, bool backward) {
  const size_t early = EarlyChunks<Real>::bytes(p);
  if (backward) return early;
  return 2 * sizeof(double) * size_t(p.batch) + (by_chunks<Real>(p) ? Chunks::bytes(p) : early);
}

template <class Real, bool Large, bool RowTiles>
static int halves_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                          int32_t *method, double *taken, const int32_t *done, void *stream) {
  constexpr int kWarps = kJoinThreads / kWarp;
  const auto fixed = ForwardMemory<Real, Large>::bytes;
  const Tiling columns = forward_block<Real>(p.states).tiling;
  const int threads = columns.threads;
  const Tiling rows =
      RowTiles ? tiling_of<Real>(p.states, threads, kRowTile, kRowTile, fixed(p.states, threads)) : columns;
  const size_t bytes = max(Ring<Real, Large>::bytes(columns), Ring<Real, RowTiles>::bytes(rows));
  const dim3 walks(unsigned(p.batch), 2);
  const int status =
      launch(halves_kernel<Real, Large, RowTiles>, walks, threads, bytes + fixed(p.states, threads), stream, p, columns,
             rows, log_partition, alpha, norm, centre, method, taken, done);
  return status ? status
                : launch(join_kernel<Real>, dim3(unsigned(p.batch)), kJoinThreads,
                         carved<Real>(kWarps) + carved<double>(kWarps), stream, p, log_partition, alpha, centre, taken,
                         done);
}

template <class Real>
int log_space_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                      void *workspace, void *stream) {
  if (p.batch == 0) return HMM_OK;
  const auto [large, o, bytes] = forward_block<Real>(p.states);
  double *const taken = static_cast<double *>(workspace);
  const int32_t *done = nullptr;  // what is done in chunks
  if constexpr (sizeof(Real) == 4)
    if (by_chunks<Real>(p)) {
      const Chunks chunks(p, taken + 2 * p.batch);
      const dim3 grid(unsigned(p.batch), unsigned(chunks_of(p)));
      done = chunks.done;
      int status = transfer(p, chunks, stream);
      if (!status) status = bridge(p, chunks, log_partition, method, stream);
      if (!status)
        status = launch(chunk_forward_kernel<Real>, grid, o.threads, bytes, stream, p, o, chunks, alpha, norm, centre);
      if (status) return status;
    }
  const EarlyChunks<Real> early(p, taken + 2 * p.batch);
  if (early.done) {
    done = early.done;
    const int status = early_forward(p, early, log_partition, alpha, norm, centre, method, stream);
    if (status) return status;
  }
  if (p.sharing == HMM_BY_ENDS) {
    const auto halves = large                 ? halves_forward<Real, true, true>
                        : p.states > kRowTile ? halves_forward<Real, false, true>
                                              : halves_forward<Real, false, false>;
    return halves(p, log_partition, alpha, norm, centre, method, taken, done, stream);
  }
  return launch(large ? forward_kernel<Real, true> : forward_kernel<Real, false>, dim3(unsigned(p.batch)), o.threads,
                bytes, stream, p, o, log_partition, alpha, norm, centre, method, done);
}

#define HMM_OF(Real)                                                                                               \
  template size_t log_space_workspace<Real>(const hmm_problem &, bool);                                            \
  template int log_space_forward<Real>(const hmm_problem &, Real *, Real *, Real *, Real *, int32_t *, void *, void *);
HMM_OF(float)
HMM_OF(double)
#undef HMM_OF

}  // namespace hmm
