// Forward-backward by scaled probabilities, for transitions that do not vary over time and fit a block's registers.
//
//   A(i, j) = exp(phi(i, j) - c(j)),  c(j) = max_i phi(i, j);     w_t(j) = exp(e_t(j) + c(j) - max over j of the same)
//   a_t = 2^k_t (a_{t-1} A) * w_t;    log Z = log sum_j a_{L-1}(j) + what was taken out
//   y_{t-1} = A (w_t * b_t),  b_{t-1} = 2^k_t y_{t-1} / g_t;      gamma_t = a_t * b_t,  sum_i gamma_t(i) = 1
//   counts(i, j) = A(i, j) sum_t a_{t-1}(i) 2^k_t w_t(j) b_t(j)
//
// k_t brings the sum of a_{t-1} back to 2^30 when it has left [2^18, 2^31). Since sum_i a_{t-1}(i) y_{t-1}(i) is
// 2^-k_t sum_j a_t(j) b_t(j), the scale of b is known before its sum is; g_t is that sum as it came out, 1 but for
// rounding, known a step later, and dividing by it (1 / g = 2 - g) keeps rounding from adding up over time. So both
// sweeps have one barrier a step. When the numbers are exact: scaled.h.
//
// From both ends, as in csrc/cpu/scaled_arcs.h: with m = (L + 1) / 2, one block walks frames 0 to m-1, another one
// L-1 to m, against the arcs, b_t = 2^k_t (A b_{t+1}) * w_t from 2^30 w_{L-1}; join.cu makes Z of the two. Backward,
// each half goes on from the other one's message, to its own end. No step is done twice, and half as many follow each
// other.
//
// What does not depend on the step before is done for all frames at once: prepare.cu exponentiates the transitions and
// the emissions (w into alpha, where a_t replaces w_t), counts.cu adds up the counts. The sweeps hold A in registers: 4
// lanes share a column (forward) or a row (backward; from the end, the other of the two), 4 K numbers each; they read
// the message of the step before from shared memory, 16 bytes at a time, add up over 4 lanes by two shuffles, and write
// theirs.
//
// Few long sequences are cut into chunks, all walked at once: scaled_chunks.h.
//
//   launches   6 forward, 8 backward with counts, whatever T is; 1 and 2 of them for sequences that are done again; 2
//              more in chunks
//   a frame    2 N^2 flops forward, 4 N^2 backward with counts; N exponentials each; 16 N bytes forward, 28 N backward
//              (float)
//   a step     the dependent chain: K reads of shared memory, 4 K / 2 fused products, 2 + 3 shuffles, one barrier
//   limits     N of at most 128 (float), 96 (double): beyond, A does not fit the registers of a block beside the rest
//              (160 spills from sm_90 on). Up to 256 (float) wide.cu does the walks; else see steps.cu and redo.cu. T
//              none. 32 threads for 8 states.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include <type_traits>

#include "scaled_chunks.h"

namespace hmm {
namespace {

constexpr int kShare = 4;  // lanes that share a column or row
constexpr int kOwners = kWarp / kShare;

// This lane's share of a column or row of `count` arcs, `stride` apart; 0 beyond.
template <int K, class Real>
__device__ __forceinline__ void hold(const Real *arcs, int stride, int count, int share, Real (&numbers)[4 * K]) {
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int at = 4 * (kShare * k + share) + c;
      numbers[4 * k + c] = at < count ? arcs[at * stride] : Real(0);
    }
}

// sum over this lane's share of a row in shared memory times its numbers, then over the 4 lanes.
template <int K, class Real>
__device__ __forceinline__ Real product(const Real (&numbers)[4 * K], const Real *row, int share) {
  const Four<Real> *four = reinterpret_cast<const Four<Real> *>(row);
  Real even = 0, odd = 0;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const Four<Real> x = four[kShare * k + share];
    even = fma(numbers[4 * k], x.x, even);
    odd = fma(numbers[4 * k + 1], x.y, odd);
    even = fma(numbers[4 * k + 2], x.z, even);
    odd = fma(numbers[4 * k + 3], x.w, odd);
  }
  Real sum = even + odd;
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}

// The sum of a number that the 4 lanes of each owner have alike, over the owners of a warp.
template <class Real> __device__ __forceinline__ Real sum_of_owners(Real x) {
#pragma unroll
  for (int lanes = kShare; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The sum of one number a warp; those past the block's warps are 0.
template <int K, class Real> __device__ __forceinline__ Real sum_of_warps(const Real *part) {
  const Four<Real> *four = reinterpret_cast<const Four<Real> *>(part);
  Real even = 0, odd = 0;
#pragma unroll
  for (int q = 0; q < (2 * K + 3) / 4; q++) {
    const Four<Real> x = four[q];
    even += x.x + x.z;
    odd += x.y + x.w;
  }
  return even + odd;
}

// Does an allowed arc lead from a state with a message to this lane's column? For all lanes of the column.
template <int K, class Real>
__device__ __forceinline__ bool reachable(const Real (&arcs)[4 * K], const Real *previous, int share) {
  bool found = false;
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int c = 0; c < 4; c++) found |= arcs[4 * k + c] > 0 && previous[4 * (kShare * k + share) + c] > 0;
  const unsigned votes = __ballot_sync(kAllLanes, found), lane = threadIdx.x % kWarp;
  return votes >> (lane / kShare * kShare) & ((1u << kShare) - 1);
}

// Is this lane's column one that is suspect, and reachable? For whole warps.
template <int K, class Real>
__device__ __forceinline__ bool flushed(const Real (&arcs)[4 * K], const Real *previous, int share, bool suspect) {
  return __any_sync(kAllLanes, suspect) && reachable<K>(arcs, previous, share) && suspect;
}

// What a sweep keeps in shared memory: the messages of two steps, and their sums by warps.
template <int K, class Real> struct Rows {
  static constexpr int kPadded = 4 * kShare * K, kParts = (2 * K + 3) / 4 * 4;
  Real *even, *odd, *even_part, *odd_part;
  __device__ explicit Rows(unsigned char *&at)
      : even(carve<Real>(at, kPadded)),
        odd(carve<Real>(at, kPadded)),
        even_part(carve<Real>(at, kParts)),
        odd_part(carve<Real>(at, kParts)) {}
  static constexpr size_t bytes() { return 2 * carved<Real>(kPadded) + 2 * carved<Real>(kParts); }
  // What pads is 0 throughout. To be followed by a barrier.
  __device__ void clear() const {
    for (int k = threadIdx.x; k < kPadded; k += blockDim.x) even[k] = odd[k] = 0;
    for (int k = threadIdx.x; k < kParts; k += blockDim.x) even_part[k] = odd_part[k] = 0;
  }
  __device__ Real *message(int64_t t) const { return t & 1 ? odd : even; }
  __device__ Real *part(int64_t t) const { return t & 1 ? odd_part : even_part; }
};

constexpr int threads_of(int64_t N) { return int((N + kOwners - 1) / kOwners) * kWarp; }

// What a thread owns, with the other lanes of its share: number `own` of a message, which one of them writes.
struct Place {
  int lane, warp, share, own;
  bool owner, writer;
};
__device__ __forceinline__ Place place(int N) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, own = warp * kOwners + lane / kShare;
  return {lane, warp, lane % kShare, own, own < N, own < N && lane % kShare == 0};
}

// What a_0 is of state j before its weight: exp of the initial score; from the end, 1. Two barriers.
template <class Real>
__device__ __forceinline__ Real first_number(const hmm_problem &p, int64_t b, int j, bool from_end, Real *part) {
  const Real ninf = negative_infinity<Real>(),
             *scores = static_cast<const Real *>(p.initial) + b * p.initial_batch_stride;
  const Real initial = j < p.states && !from_end ? scores[j] : ninf, top = block_max(initial, part);
  if (j >= p.states) return 0;
  return from_end ? Real(1) : weight(initial, Real(0), top == ninf ? Real(0) : top);
}

// What a walk ends with, beside its total; `flags`: one a warp. A barrier.
__device__ __forceinline__ void end_walk(bool lost, int64_t exponents, int32_t *flags, Carried &carried) {
  const bool any = __any_sync(kAllLanes, lost);
  if (threadIdx.x % kWarp == 0) flags[threadIdx.x / kWarp] = any;
  __syncthreads();
  if (threadIdx.x != 0) return;  // no barrier follows
  int32_t redo = 0;
  for (int q = 0; q < int(blockDim.x / kWarp); q++) redo |= flags[q];
  carried.exponents = exponents, carried.lost = redo;
}

// One block a walk: the grid's second axis has the halves, or the chunks. alpha, which may be w, gets a (from the end,
// b); norm[b, t, 0] gets 2^k_t. Halves leave alone what is done in chunks.
template <int K, bool InChunks, class Real>
__global__ void __launch_bounds__(64 * K, 1)
    forward_kernel(hmm_problem p, void *workspace, const Real *w, Real *alpha, Real *norm, Carried *carried,
                   ScaledChunks<Real> chunks) {
  HMM_SHARED_MEMORY(at);
  const Rows<K, Real> rows(at);
  Real *reduced = carve<Real>(at, 2 * K);
  int32_t *flags = carve<int32_t>(at, 2 * K);
  const int N = p.states;
  const auto [lane, warp, share, j, owner, writer] = place(N);
  const bool from_end = !InChunks && blockIdx.y == 1;
  const int64_t b = blockIdx.x, chunk = b * gridDim.y + blockIdx.y;
  if (!InChunks && chunks.done && chunks.done[b]) return;  // the whole block
  const Walk walk = InChunks ? walk_along_chunk(p, p.lengths[b], blockIdx.y)
                             : walk_from_ends(p.lengths[b], gridDim.y == 2, from_end);
  if (InChunks && writer) clear_past_end<InChunks>(p, b, j, alpha);
  const Arcs<Real> packed = arcs_of<Real>(p, workspace, b);
  if (walk.frames == 0 || (InChunks && !packed.certificate->forgets)) return;  // the whole block
  carried += InChunks ? chunk : 2 * b + from_end;

  Real arcs[4 * K];  // of column j, or row
  hold<K>(packed.arcs + (from_end ? j * N : j), from_end ? 1 : N, owner ? N : 0, share, arcs);
  rows.clear();
  const bool mixing = packed.certificate->mixing;
  const Real least = packed.certificate->least, smallest = ldexp(Real(1), Range<Real>::kEntryBits);
  bool lost = !packed.certificate->usable;

  const int64_t stride = walk.step * N, n = walk.frames, ahead = 4 * stride;
  int64_t own = (b * p.time + walk.first) * N + (owner ? j : 0);  // of step s
  Real *scales = norm + (b * p.time + walk.first) * N;
  const auto weight_of = [&](int64_t s) { return owner && s < n ? w[own + s * stride] : Real(0); };
  Real a = 0;  // a_t of column j, alike in its lanes
  int64_t exponents = 0;
  // Hands on a_t and goes on to the next frame; v holds its weight, then that of 3 frames later. False after the last.
  const auto step = [&](int64_t s, Real &v) {
    if (writer) {
      rows.message(s)[j] = a;
      if (!InChunks || s >= walk.warm_up - HMM_DEFECT(55)) alpha[own] = a;
      else if (s == walk.warm_up - 1) chunks.arrived[chunk * N + j] = a;
    }
    const Real sum = sum_of_owners(a);
    if (lane == 0) rows.part(s)[warp] = sum;
    if (!HMM_DEFECT(11)) __syncthreads();
    const Real total = sum_of_warps<K>(rows.part(s));
    lost |= !(total >= least);
    if (InChunks && s == walk.warm_up - 1 && !HMM_DEFECT(51)) exponents = 0, lost = !packed.certificate->usable;
    if (s == n - 1) {
      if (threadIdx.x == 0) carried->total = double(total);
      return false;
    }
    const int up = correction(total);
    const Real scale = up ? ldexp(Real(1), up) : Real(1);
    exponents += up;
    a = product<K>(arcs, rows.message(s), share) * v * scale;
    if (threadIdx.x == 0 && (!InChunks || s + 1 >= walk.warm_up)) scales[(s + 1) * stride] = scale;
    if (!mixing) lost |= flushed<K>(arcs, rows.message(s), share, is_suspect(a, v, smallest * scale));
    v = owner && s + 4 < n ? w[own + ahead] : Real(0);
    own += stride;
    return true;
  };
  Real w_0 = weight_of(0), w_1 = weight_of(1), w_2 = weight_of(2);
  const Real start = first_number(p, b, j, from_end || walk.first > 0, reduced);
  a = start * ldexp(Real(1), kTopBits) * w_0;
  lost |= !mixing && a < smallest && start > 0 && w_0 > 0;
  w_0 = weight_of(3);
  __syncwarp();  // the writer of a column puts a_0 where its lanes have read w_0
  for (int64_t s = 0; step(s, w_1) && step(s + 1, w_2) && step(s + 2, w_0); s += 3) continue;
  end_walk(lost, exponents, flags, *carried);
}

// One block a walk. `counted`, which may be w, gets 2^k_t w_t b_t (the second half: 2^k_t w_t a_t), what the counts
// need.
template <int K, bool InChunks, class Real>
__global__ void __launch_bounds__(64 * K, 1)
    backward_kernel(hmm_problem p, void *workspace, const Real *grad, const Real *alpha, const Real *norm,
                    const int32_t *method, const Real *w, Real *counted, Real *state, ScaledChunks<Real> chunks) {
  HMM_SHARED_MEMORY(at);
  const Rows<K, Real> rows(at);
  const int N = p.states;
  const auto [lane, warp, share, i, owner, writer] = place(N);
  const bool to_end = !InChunks && blockIdx.y == 1;
  const int64_t b = blockIdx.x, L = p.lengths[b], T = p.time, chunk = b * gridDim.y + blockIdx.y;
  if (method[b] != HMM_SCALED && (InChunks || method[b] != HMM_BOTH_ENDS)) return;  // the whole block
  if (!InChunks && chunks.done && chunks.done[b]) return;                            // the whole block
  const Walk walk =
      InChunks ? walk_back_in_chunk(p, L, blockIdx.y) : walk_to_ends(L, method[b] == HMM_BOTH_ENDS, to_end);
  if (writer && !to_end) clear_past_end<InChunks>(p, b, i, state);
  const Arcs<Real> packed = arcs_of<Real>(p, workspace, b);
  if (walk.frames == 0 || (InChunks && !packed.certificate->forgets)) return;  // the whole block

  Real arcs[4 * K];  // of row i, or column
  hold<K>(packed.arcs + (to_end ? i : i * N), to_end ? N : 1, owner ? N : 0, share, arcs);
  rows.clear();
  const int64_t n = walk.frames, stride = walk.step * N, ahead = 3 * stride;
  int64_t own = (b * T + walk.first) * N + (owner ? i : 0), own_scale = (b * T + walk.first) * N;
  const auto number_of = [&](const Real *x, int64_t s) { return owner && s < n ? x[own + s * stride] : Real(0); };
  const int64_t scales = InChunks && blockIdx.y > 0 ? n : n - 1;  // frame 0 has none
  const auto scale_of = [&](int64_t s) { return s < scales ? norm[own_scale + s * stride] : Real(1); };
  const Real upstream = grad[b];
  Real a_0 = number_of(alpha, 0), a_1 = number_of(alpha, 1), a_2 = number_of(alpha, 2);
  Real v_0 = number_of(w, 0), v_1 = number_of(w, 1), v_2 = number_of(w, 2);
  Real scale_0 = scale_of(0), scale_1 = scale_of(1), scale_2 = scale_of(2);
  const Real sum_of_first = InChunks ? sum_of_owners(a_0) : Real(0);
  __syncthreads();
  if (writer && walk.meets) rows.message(-1)[i] = alpha[own - stride];
  if (InChunks && lane == 0) rows.part(-1)[warp] = sum_of_first;
  if (!HMM_DEFECT(15)) __syncthreads();
  Real later = InChunks ? 1 / sum_of_warps<K>(rows.part(-1)) : norm[b * T * N];  // 1 / Z; then 2^k of the frame before

  // gamma_t and what the next frame needs; a, v and scale hold those of t, then of 3 frames later. Returns false after
  // the last.
  const auto step = [&](int64_t s, Real &a, Real &v, Real &scale) {
    const Real g = s == 0 ? Real(1) : sum_of_warps<K>(rows.part(s - 1));
    Real y = product<K>(arcs, rows.message(s - 1), share);
    if (s == 0 && !walk.meets) y = 1;
    // 1 / g to first order: g is 1 but for a step's rounding.
    const Real beta = a > 0 ? y * (later * (Real(2) - g)) : Real(0), gamma = a * beta, u = v * beta;
    if (writer) {
      if (!InChunks || s >= walk.warm_up) state[own] = upstream * gamma, counted[own] = scale * u;
      else if (s == walk.warm_up - 1) chunks.arrived[chunk * N + i] = gamma;
      if (InChunks && s == n - 1) chunks.left[chunk * N + i] = gamma;
      rows.message(s)[i] = u;
    }
    const Real sum = sum_of_owners(gamma);
    if (lane == 0) rows.part(s)[warp] = sum;
    later = scale;
    const bool more = owner && s + 3 < n;
    a = more ? alpha[own + ahead] : Real(0), v = more ? w[own + ahead] : Real(0);
    scale = s + 3 < scales ? norm[own_scale + ahead] : Real(1);
    own += stride, own_scale += stride;
    if (!HMM_DEFECT(12)) __syncthreads();
    return s + 1 < n;
  };
  for (int64_t s = 0; step(s, a_0, v_0, scale_0) && step(s + 1, a_1, v_1, scale_1) && step(s + 2, a_2, v_2, scale_2);
       s += 3)
    continue;
}

// Calls body(Width<K>) for the smallest K of the list with 16 K >= N.
template <int K> struct Width {
  static constexpr int value = K;
};
template <class Real, class Body> int with_width(int64_t N, Body body) {
  if (N <= 32) return body(Width<2>{});
  if (N <= 64) return body(Width<4>{});
  if constexpr (sizeof(Real) == 8) return body(Width<6>{});
  else {
    if (N <= 96) return body(Width<6>{});
    return body(Width<8>{});
  }
}

}  // namespace

template <> int64_t scaled_states<float>() { return kWideStates; }
template <> int64_t scaled_states<double>() { return 96; }
static bool wide(const hmm_problem &p) { return p.states > 128; }

// The arcs, as wide.cu has them too where it does the walks; then what the walks carry, or what the counts need.
template <class Real> static Real *behind_arcs(const hmm_problem &p, void *workspace) {
  return reinterpret_cast<Real *>(static_cast<char *>(workspace) + matrices(p) * Arcs<Real>::bytes(p.states));
}
template <class Real> static size_t before_chunks(const hmm_problem &p, bool backward) {
  const size_t arcs = size_t(matrices(p) * Arcs<Real>::bytes(p.states)) + (wide(p) ? wide_bytes(p) : 0);
  const size_t walks =
      backward ? sizeof(Real) * size_t(p.batch * p.time * p.states) : 2 * sizeof(Carried) * size_t(p.batch);
  return (arcs + walks + 15) / 16 * 16;
}
template <class Real> size_t scaled_workspace(const hmm_problem &p, bool backward) {
  return before_chunks<Real>(p, backward) + (scaled_by_chunks<Real>(p) ? ScaledChunks<Real>::bytes(p) : 0);
}
template <class Real> Real *scaled_messages(const hmm_problem &p, void *workspace) {
  return behind_arcs<Real>(p, workspace) + (wide(p) ? wide_bytes(p) / sizeof(Real) : 0);
}
template <class Real> static ScaledChunks<Real> chunks_in(const hmm_problem &p, bool backward, void *workspace) {
  if (!scaled_by_chunks<Real>(p)) return ScaledChunks<Real>();
  return ScaledChunks<Real>(p, static_cast<char *>(workspace) + before_chunks<Real>(p, backward));
}

// Walks of all chunks, where there are any, and what they come to; then of the sequences that are not done so.
template <class Walk, class Join> static int walk_all(bool chunks, Walk walk, Join join_walks) {
  int status = chunks ? walk(std::true_type{}) : HMM_OK;
  if (chunks && !status) status = join_walks();
  return status ? status : walk(std::false_type{});
}

template <class Real>
int scaled_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                   void *workspace, void *stream) {
  Carried *carried = reinterpret_cast<Carried *>(scaled_messages<Real>(p, workspace));
  const ScaledChunks<Real> chunks = chunks_in<Real>(p, false, workspace);
  Real *w = chunks.weights ? chunks.weights : alpha;
  const auto walk = [&](auto in_chunks) {
    constexpr bool InChunks = decltype(in_chunks)::value;
    if constexpr (sizeof(Real) == 4)
      if (wide(p))
        return wide_forward(p, InChunks, workspace, behind_arcs<Real>(p, workspace), w, alpha, norm, carried, chunks,
                            stream);
    return with_width<Real>(p.states, [&](auto width) {
      constexpr int K = decltype(width)::value;
      const size_t shared = Rows<K, Real>::bytes() + carved<Real>(2 * K) + carved<int32_t>(2 * K);
      const dim3 walks = InChunks ? chunk_walks(p) : dim3(unsigned(p.batch), p.sharing == HMM_BY_ENDS ? 2 : 1);
      return launch(forward_kernel<K, InChunks, Real>, walks, threads_of(p.states), shared, stream, p, workspace, w,
                    alpha, norm, InChunks ? chunks.carried : carried, chunks);
    });
  };
  int status = prepare(p, true, centre, w, workspace, stream);
  if (!status)
    status = walk_all(chunks.done, walk, [&] {
      return join_chunks(p, chunks, log_partition, alpha, norm, centre, method, workspace, stream);
    });
  if (status) return status;
  return join(p, carried, log_partition, alpha, norm, centre, method, chunks.done, workspace, stream);
}

template <class Real>
int scaled_backward(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *centre,
                    const int32_t *method, Real *state, void *workspace, void *stream) {
  Real *counted = scaled_messages<Real>(p, workspace);
  const ScaledChunks<Real> chunks = chunks_in<Real>(p, true, workspace);
  Real *w = chunks.weights ? chunks.weights : counted;
  const auto walk = [&](auto in_chunks) {
    constexpr bool InChunks = decltype(in_chunks)::value;
    if constexpr (sizeof(Real) == 4)
      if (wide(p))
        return wide_backward(p, InChunks, workspace, behind_arcs<Real>(p, workspace), grad, alpha, norm, method, w,
                             counted, state, chunks, stream);
    return with_width<Real>(p.states, [&](auto width) {
      constexpr int K = decltype(width)::value;
      const dim3 walks = InChunks ? chunk_walks(p) : dim3(unsigned(p.batch), 2);
      return launch(backward_kernel<K, InChunks, Real>, walks, threads_of(p.states), Rows<K, Real>::bytes(), stream, p,
                    workspace, grad, alpha, norm, method, w, counted, state, chunks);
    });
  };
  const int status = prepare(p, false, const_cast<Real *>(centre), w, workspace, stream);
  if (status) return status;
  return walk_all(chunks.done, walk, [&] { return join_chunks_back(p, chunks, method, workspace, stream); });
}

#define HMM_INSTANTIATE(Real)                                                                                        \
  template size_t scaled_workspace<Real>(const hmm_problem &, bool);                                                 \
  template int scaled_forward<Real>(const hmm_problem &, Real *, Real *, Real *, Real *, int32_t *, void *, void *); \
  template Real *scaled_messages<Real>(const hmm_problem &, void *);                                                 \
  template int scaled_backward<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *,    \
                                     const int32_t *, Real *, void *, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
