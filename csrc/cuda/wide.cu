// The walks of scaled.cu for more states than its registers hold arcs of: 129 to 256, in float32.
//
//   out(j) = sum_i message(i) M(i, j),  M = A or A^T;  what is made of it: scaled.cu, its certificates: scaled.h
//
// One block of 512 threads a walk; or for the walks of two sequences side by side, which share what they read of M,
// where there are more walks than multiprocessors. A thread has 4 columns of M and the rows of one of 8 slices: 160
// rows of M stay in registers (two sequences: 128), of the others as many in shared memory as the device gives a block,
// and the last ones come from the caches at every step. Of 256 rows:
//
//                                      one sequence: shared, caches    two: shared, caches    M stays on the
//   sm_75 (64 KB a block)                            48      48             32      96        multiprocessor up to
//   sm_86, 89, 120 (99 KB)                           80      16             80      48        N = 208, 240, 256
//   sm_80 (163 KB), 90, 100 (227 KB)                 96       0            128       0        (two: 160, 208, 256)
//
// The slices' sums meet in shared memory: two barriers a step. Is a state reachable that has no message? If the product
// of the arcs with ones, where a message was, is not 0: allowed arcs are at least 2^-100 (scaled.h). So steps with such
// a state take two products, also those of a chain whose last states are not reached yet.
//
// Few long sequences are cut into chunks, a block each: scaled_chunks.h.
//
//   launches   1 for M and its transpose, 1 forward, 1 backward, beside those of scaled.cu
//   a step     2 x 256 N flops a walk; 1 KB of shared memory or of the caches a row that is not in registers, for one
//              sequence or two; 8 KB for the slices' sums, written and read
//   limits     N of at most 256 (from 129 on: fewer are right, and slower than scaled.cu); frames below 2^31. 512
//              threads, 9 to 147 KB of shared memory.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include <type_traits>

#include "scaled_chunks.h"

namespace hmm {
namespace {

constexpr int kThreads = 512, kColumns = int(kWideStates), kQuads = kColumns / 4, kSlices = kThreads / kQuads;
constexpr int kMatrix = kColumns * kColumns;
// Rows of a thread and of all in registers, for S sequences a block; then in groups.
template <int S> constexpr int kHeld = S == 1 ? 20 : 16;
template <int S> constexpr int kHeldRows = kHeld<S> * kSlices;
constexpr int kGroup = 2, kGroupRows = kGroup * kSlices, kParts = kColumns / kWarp;  // warps that own a message

template <int S> __host__ __device__ constexpr int groups_of(int64_t N) {
  return N > kHeldRows<S> ? int((N - kHeldRows<S> + kGroupRows - 1) / kGroupRows) : 0;
}

// Groups of rows that a block has in shared memory, and those that it reads from the caches.
struct Groups {
  int near, far;
};

// A and A^T of every matrix, with zeros up to 256 rows and columns; a block 16 rows.
constexpr int kPackedRows = 16;
template <class Real>
__global__ void __launch_bounds__(kColumns) pack_kernel(hmm_problem p, void *workspace, Real *packed) {
  const int N = p.states, j = threadIdx.x, transposed = blockIdx.z;
  const Arcs<Real> arcs(workspace, blockIdx.x, N);
  packed += (2 * int64_t(blockIdx.x) + transposed) * kMatrix;
  for (int i = blockIdx.y * kPackedRows; i < int(blockIdx.y + 1) * kPackedRows; i++)
    packed[i * kColumns + j] = i < N && j < N ? arcs.arcs[transposed ? j * N + i : i * N + j] : Real(0);
}

template <class Real> struct alignas(2 * sizeof(Real)) Two {
  Real x, y;
};
template <class Real> __device__ __forceinline__ void add(Real x, const Four<Real> &arcs, Four<Real> &sum) {
  sum.x = fma(x, arcs.x, sum.x), sum.y = fma(x, arcs.y, sum.y);
  sum.z = fma(x, arcs.z, sum.z), sum.w = fma(x, arcs.w, sum.w);
}

// The products of S messages with groups of rows; `arcs` and `message` are this thread's in the first group.
template <int S, class Real>
__device__ __forceinline__ void add_groups(const Four<Real> *arcs, const Real *message, int groups,
                                           Four<Real> (&sum)[S]) {
#pragma unroll (2 / S)
  for (int g = 0; g < groups; g++) {
    const Four<Real> even = arcs[0], odd = arcs[kQuads];
#pragma unroll
    for (int s = 0; s < S; s++) {
      const Two<Real> x = *reinterpret_cast<const Two<Real> *>(message + s * kColumns);
      add(x.x, even, sum[s]), add(x.y, odd, sum[s]);
    }
    arcs += kGroupRows * kQuads, message += kGroupRows;
  }
}

// What a block works with in shared memory: of each sequence a message, the slices' products, and sums by warps; flags
// by warps; and the groups of rows that it holds. Messages are followed by barriers, and so are products.
template <int S, class Real> struct Room {
  Real *message, *partial, *part;
  int32_t *flags, *lost;
  int64_t *exponents;  // registers are few: of the owner of state 0 alone
  Real *rows;
  __device__ __forceinline__ Room(unsigned char *&at, int near)
      : message(carve<Real>(at, S * kColumns)),
        partial(carve<Real>(at, S * kSlices * kColumns)),
        part(carve<Real>(at, kThreads / kWarp)),
        flags(carve<int32_t>(at, S * kParts)),
        lost(carve<int32_t>(at, S * kParts)),
        exponents(carve<int64_t>(at, S)),
        rows(carve<Real>(at, near * kGroupRows * kColumns)) {}
  static constexpr size_t bytes(int near) {
    return carved<Real>(S * kColumns) + carved<Real>(S * kSlices * kColumns) + carved<Real>(kThreads / kWarp) +
           carved<Real>(near * kGroupRows * kColumns) + 2 * carved<int32_t>(S * kParts) + carved<int64_t>(S);
  }
};

// The arcs of a block, as its threads have them.
template <int S, class Real> struct Matrix {
  Four<Real> held[kHeld<S>];
  const Four<Real> *near_rows, *far_rows;
  int near, far, slice, quad;
  // To be followed by a barrier.
  __device__ __forceinline__ Matrix(const Real *matrix, Groups groups, const Room<S, Real> &room)
      : near(groups.near), far(groups.far), slice(threadIdx.x / kQuads), quad(threadIdx.x % kQuads) {
    const Four<Real> *four = reinterpret_cast<const Four<Real> *>(matrix) + quad;
#pragma unroll
    for (int k = 0; k < kHeld<S>; k++) held[k] = four[(k / 4 * 4 * kSlices + 4 * slice + k % 4) * kQuads];
    Four<Real> *rows = reinterpret_cast<Four<Real> *>(room.rows);
    for (int k = slice; k < near * kGroupRows; k += kSlices)
      rows[k * kQuads + quad] = four[(kHeldRows<S> + k) * kQuads + HMM_DEFECT(23)];
    near_rows = rows + kGroup * slice * kQuads + quad;
    far_rows = four + (kHeldRows<S> + near * kGroupRows + kGroup * slice) * kQuads;
  }
  // This slice's share of the S products, into room.partial. Between two barriers.
  __device__ __forceinline__ void multiply(const Room<S, Real> &room) const {
    Four<Real> sum[S];
#pragma unroll
    for (int s = 0; s < S; s++) sum[s] = {0, 0, 0, 0};
    // Half of the warps of a scheduler begin where the others end: registers, shared memory and caches work at a time.
    const bool far_first = slice / 2 % 2;
    const Real *message = room.message + kHeldRows<S> + kGroup * slice, *far_message = message + near * kGroupRows;
    if (far_first) add_groups<S>(far_rows, far_message, far, sum);
    else add_groups<S>(near_rows, message, near, sum);
#pragma unroll
    for (int k = 0; k < kHeld<S>; k += 4)
#pragma unroll
      for (int s = 0; s < S; s++) {
        const Four<Real> x =
            *reinterpret_cast<const Four<Real> *>(room.message + s * kColumns + k * kSlices + 4 * slice);
        add(x.x, held[k], sum[s]), add(x.y, held[k + 1], sum[s]);
        add(x.z, held[k + 2], sum[s]), add(x.w, held[k + 3], sum[s]);
      }
    if (far_first) add_groups<S>(near_rows, message, near, sum);
    else add_groups<S>(far_rows, far_message, far, sum);
#pragma unroll
    for (int s = 0; s < S; s++)
      reinterpret_cast<Four<Real> *>(room.partial)[(s * kSlices + slice) * kQuads + quad] = sum[s];
  }
};

// Number `j` of the product of sequence `s`, from the slices.
template <class Real> __device__ __forceinline__ Real joined_slices(const Real *partial, int s, int j) {
  Real even = 0, odd = 0;
#pragma unroll
  for (int q = 0; q < kSlices; q += 2) {
    even += partial[(s * kSlices + q) * kColumns + j];
    odd += partial[(s * kSlices + q + 1) * kColumns + j];
  }
  return even + odd;
}

// The sum over the warps of sequence `s`.
template <class Number> __device__ __forceinline__ Number sum_of_parts(const Number *part, int s) {
  Number sum = 0;
#pragma unroll
  for (int q = 0; q < kParts; q++) sum += part[s * kParts + q];
  return sum;
}

// What a thread owns between two products: number j of the message of one of the block's sequences.
template <int S> struct Owner {
  int s, j, lane, warp;
  int64_t b;
  bool in_range;  // the whole warp
  bool owns;
  __device__ __forceinline__ explicit Owner(const hmm_problem &p)
      : s(int(threadIdx.x) / kColumns % S),
        j(threadIdx.x % kColumns),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        b(int64_t(blockIdx.x) * S + s),
        in_range(threadIdx.x < S * kColumns),
        owns(in_range && b < p.batch && j < p.states) {}
};
template <class Real>
__device__ __forceinline__ const Real *matrix_of(const hmm_problem &p, const Real *packed, bool transposed) {
  const int64_t matrix = p.transition_batch_stride ? blockIdx.x : 0;  // S is 1 where each sequence has one
  return packed + (2 * matrix + transposed) * kMatrix;
}

// Of a number in alpha; in chunks of one in a sequence's part of it, which saves the registers that would spill else.
template <bool InChunks> using Index = std::conditional_t<InChunks, int, int64_t>;

// The grid's second axis has the halves, or the chunks (S is 1). alpha, which may be w, gets a (from the end, b);
// norm[b, t, 0] gets 2^k_t. Halves leave alone what is done in chunks.
template <int S, bool InChunks, class Real>
__global__ void __launch_bounds__(kThreads, 1)
    wide_forward_kernel(hmm_problem p, void *workspace, const Real *packed, Groups groups, const Real *weights,
                        Real *alpha, Real *norm, Carried *carried, ScaledChunks<Real> chunks) {
  HMM_SHARED_MEMORY(at);
  const Room<S, Real> room(at, groups.near);
  const int N = p.states;
  const bool from_end = !InChunks && blockIdx.y == 1, both = !InChunks && gridDim.y == 2;
  const Owner<S> own(p);
  int most = 0;  // frames: below 2^31, which would be 1 TB
  Walk walk = {0, 0, 1, false};
  for (int s = 0; s < S; s++) {
    const int64_t b = int64_t(blockIdx.x) * S + s;
    if (b >= p.batch || (!InChunks && chunks.done && chunks.done[b])) continue;
    const Walk of_b = InChunks ? walk_along_chunk(p, p.lengths[b], blockIdx.y)
                               : walk_from_ends(p.lengths[b], both, from_end);
    most = max(most, int(of_b.frames));
    if (s == own.s) walk = of_b;
  }
  if (InChunks && own.owns) clear_past_end<InChunks>(p, own.b, own.j, alpha);
  // Read in every step: registers are few.
  const Certificate<Real> &certificate = *arcs_of<Real>(p, workspace, blockIdx.x).certificate;
  if (most == 0 || (InChunks && !certificate.forgets)) return;  // the whole block
  const Matrix<S, Real> matrix(matrix_of(p, packed, from_end), groups, room);
  const Real smallest = ldexp(Real(1), Range<Real>::kEntryBits);  // messages below are suspect

  const int first = InChunks ? -int(walk.warm_up) : 0;  // step 0 is the first own frame
  const int n = own.owns ? int(walk.frames) + first : first, stride = walk.step * N;
  most += first;
  const auto end_of_walk = [&] { return carried + (InChunks ? own.b * gridDim.y + blockIdx.y : 2 * own.b + from_end); };
  const Real *initial = static_cast<const Real *>(p.initial);
  if (InChunks) weights += blockIdx.x * p.time * N, alpha += blockIdx.x * p.time * N, norm += blockIdx.x * p.time * N;
  Index<InChunks> at_frame = (InChunks ? walk.first : own.b * p.time + walk.first) * N + own.j;  // of step s
  Real start = 1;
  for (int s = 0; s < S && !from_end && !(InChunks && walk.first > 0); s++) {
    const int64_t b = int64_t(blockIdx.x) * S + s;
    const Real *scores = b < p.batch ? initial + b * p.initial_batch_stride : nullptr;
    const Real top = top_of(scores, N, room.part);
    if (s == own.s && own.owns) start = weight(scores[own.j], Real(0), top);
  }
  __syncthreads();  // part is written again
  Real a = 0;  // a_t of state j
  bool lost = false, suspect = false, reached = false;  // reached: a_{t-1} was not 0
  if (own.in_range && own.j == 0) room.exponents[own.s] = 0;
  if (n > 0) {
    const Real w = weights[at_frame];
    a = start * ldexp(Real(1), kTopBits) * w;
    lost |= !certificate.mixing && a < smallest && start > 0 && w > 0;
  }
  for (int s = first;; s++) {
    if (s < n) {
      if (!InChunks || s >= 0) alpha[at_frame] = a;
      else if (s == -1) chunks.arrived[(own.b * gridDim.y + blockIdx.y) * N + own.j] = a;
    }
    at_frame += stride;
    const Real w = s + 1 < n ? weights[at_frame] : Real(0);
    if (own.in_range) {
      room.message[threadIdx.x] = a;
      const Real sum = warp_sum(a);
      const bool any = __any_sync(kAllLanes, suspect);
      if (own.lane == 0) room.part[own.warp] = sum, room.flags[own.warp] = any && !HMM_DEFECT(24);
    }
    if (!HMM_DEFECT(21)) __syncthreads();
    const Real total = sum_of_parts(room.part, own.s);
    if (s < n) lost |= !(total >= certificate.least);
    if (s == n - 1 && own.j == 0) end_of_walk()->total = double(total);
    const int up = s + 1 < n ? correction(total) : 0;
    const Real scale = up ? ldexp(Real(1), up) : Real(1);
    if (s + 1 < n && own.j == 0) {
      if (!InChunks || s + 1 >= 0) norm[at_frame] = scale;
      room.exponents[own.s] = up + (InChunks && s < 0 ? 0 : room.exponents[own.s]);  // of own frames
    }
    bool ones = false;  // is a product with ones due, for states without a message that may be reachable?
    for (int q = 0; q < S * kParts; q++) ones |= room.flags[q];
    if (ones) {
      if (own.in_range) room.message[threadIdx.x] = reached;
      __syncthreads();
    }
    while (ones || s < most - 1) {
      matrix.multiply(room);
      __syncthreads();
      if (!ones) break;
      lost |= suspect && joined_slices(room.partial, own.s, own.j) > 0;
      if (own.in_range) room.message[threadIdx.x] = a;
      ones = false;
      if (!HMM_DEFECT(25)) __syncthreads();
    }
    if (InChunks && s == -1) lost = false;
    if (s == most - 1) break;  // the whole block
    reached = a > 0;
    a = s + 1 < n ? joined_slices(room.partial, own.s, own.j) * w * scale : Real(0);
    suspect = !certificate.mixing && is_suspect(a, w, smallest * scale);
  }
  lost |= !certificate.usable;
  if (own.in_range) {
    const bool any = __any_sync(kAllLanes, own.owns && lost);
    if (own.lane == 0) room.lost[own.warp] = any;
  }
  __syncthreads();
  if (!own.owns || own.j != 0) return;  // no barrier follows
  Carried *end = end_of_walk();
  end->exponents = room.exponents[own.s], end->lost = sum_of_parts(room.lost, own.s) > 0;
}

// `counted`, which may be w, gets 2^k_t w_t b_t (the second half: 2^k_t w_t a_t), what the counts need.
template <int S, bool InChunks, class Real>
__global__ void __launch_bounds__(kThreads, 1)
    wide_backward_kernel(hmm_problem p, void *workspace, const Real *packed, Groups groups, const Real *grad,
                         const Real *alpha, const Real *norm, const int32_t *method, const Real *w, Real *counted,
                         Real *state, ScaledChunks<Real> chunks) {
  HMM_SHARED_MEMORY(at);
  const Room<S, Real> room(at, groups.near);
  const int N = p.states;
  const bool to_end = !InChunks && blockIdx.y == 1;
  const Owner<S> own(p);
  const int64_t T = p.time;
  int most = 0;  // frames: below 2^31, which would be 1 TB
  Walk walk = {0, 0, 1, false};
  for (int s = 0; s < S; s++) {
    const int64_t b = int64_t(blockIdx.x) * S + s;
    if (b >= p.batch || (method[b] != HMM_SCALED && (InChunks || method[b] != HMM_BOTH_ENDS))) continue;
    if (!InChunks && chunks.done && chunks.done[b]) continue;
    const Walk of_b = InChunks ? walk_back_in_chunk(p, p.lengths[b], blockIdx.y)
                               : walk_to_ends(p.lengths[b], method[b] == HMM_BOTH_ENDS, to_end);
    most = max(most, int(of_b.frames));
    if (s == own.s) {
      walk = of_b;
      if (own.owns && !to_end) clear_past_end<InChunks>(p, b, own.j, state);
    }
  }
  if (most == 0) return;  // the whole block
  if (InChunks && !arcs_of<Real>(p, workspace, blockIdx.x).certificate->forgets) return;
  const Matrix<S, Real> matrix(matrix_of(p, packed, !to_end), groups, room);
  const int first = InChunks ? -int(walk.warm_up) : 0;  // step 0 is the first own frame
  const int n = own.owns ? int(walk.frames) + first : first, stride = walk.step * N;
  most += first;
  const int scales = InChunks && blockIdx.y > 0 ? n : n - 1;  // frame 0 has none
  int64_t at_frame = (own.b * T + walk.first) * N + own.j;
  const Real upstream = n > 0 ? grad[own.b] : Real(0);
  if (InChunks && own.in_range) {
    const Real sum = warp_sum(n > 0 ? alpha[at_frame] : Real(0));
    if (own.lane == 0) room.part[own.warp] = sum;
  }
  if (own.in_range) room.message[threadIdx.x] = n > 0 && walk.meets ? alpha[at_frame - stride] : Real(0);
  __syncthreads();
  Real later = 0;  // 1 / Z; then 2^k of the frame before
  if (InChunks) later = 1 / sum_of_parts(room.part, own.s);
  else if (n > 0) later = norm[own.b * T * N];
  for (int s = first; s < most; s++) {
    const bool runs = s < n;
    const Real a = runs ? alpha[at_frame] : Real(0), v = runs ? w[at_frame] : Real(0);
    const Real scale = s < scales ? norm[at_frame - own.j] : Real(1), g = s > first ? sum_of_parts(room.part, own.s) : Real(1);
    matrix.multiply(room);
    if (!HMM_DEFECT(22)) __syncthreads();
    if (own.in_range) {
      const Real y = s == first && !walk.meets ? Real(1) : joined_slices(room.partial, own.s, own.j);
      // 1 / g to first order: g is 1 but for a step's rounding.
      const Real beta = a > 0 ? y * (later * (Real(2) - g)) : Real(0), gamma = a * beta, u = v * beta;
      if (runs && (!InChunks || s >= 0)) state[at_frame] = upstream * gamma, counted[at_frame] = scale * u;
      else if (runs && s == -1) chunks.arrived[(own.b * gridDim.y + blockIdx.y) * N + own.j] = gamma;
      if (InChunks && s == n - 1) chunks.left[(own.b * gridDim.y + blockIdx.y) * N + own.j] = gamma;
      room.message[threadIdx.x] = u;
      const Real sum = warp_sum(gamma);
      if (own.lane == 0) room.part[own.warp] = sum;
    }
    later = scale, at_frame += stride;
    __syncthreads();
  }
}

// Calls body(S, groups) for the number of sequences a block.
template <int S> struct Sequences {
  static constexpr int value = S;
};
template <class Real, class Body> int with_room(const hmm_problem &p, int halves, bool in_chunks, Body body) {
  const int limit = shared_memory_limit(), processors = multiprocessors();
  if (limit < 0 || processors < 0) return HMM_CUDA_ERROR - (limit < 0 ? limit : processors);
  const auto of = [&](auto sequences) {
    constexpr int S = decltype(sequences)::value;
    const int64_t free = limit - int64_t(Room<S, Real>::bytes(0));
    const int64_t room = free / int64_t(sizeof(Real) * kGroupRows * kColumns), all = groups_of<S>(p.states);
    const int near = int(room < 0 ? 0 : room < all ? room : all);
    return body(sequences, Groups{near, int(all) - near});
  };
  // Two sequences a block, of one matrix, once there are more walks than can go side by side.
  const bool one = in_chunks || p.transition_batch_stride || p.batch * halves <= processors;
  return one ? of(Sequences<1>{}) : of(Sequences<2>{});
}

template <class Real> int pack(const hmm_problem &p, void *workspace, Real *packed, void *stream) {
  const dim3 rows(unsigned(matrices(p)), kColumns / kPackedRows, 2);
  return launch(pack_kernel<Real>, rows, kColumns, 0, stream, p, workspace, packed);
}

}  // namespace

size_t wide_bytes(const hmm_problem &p) { return 2 * sizeof(float) * size_t(matrices(p) * kMatrix); }

// M is packed once a pass: for the chunks, where there are any.
int wide_forward(const hmm_problem &p, bool in_chunks, void *workspace, float *packed, const float *w, float *alpha,
                 float *norm, Carried *carried, const ScaledChunks<float> &chunks, void *stream) {
  const int status = in_chunks || !chunks.done ? pack(p, workspace, packed, stream) : HMM_OK;
  const int halves = p.sharing == HMM_BY_ENDS ? 2 : 1;
  return status ? status : with_room<float>(p, halves, in_chunks, [&](auto sequences, Groups groups) {
    constexpr int S = decltype(sequences)::value;
    const size_t shared = Room<S, float>::bytes(groups.near);
    const auto walk = [&](auto kernel, dim3 walks, Carried *ends) {
      return launch(kernel, walks, kThreads, shared, stream, p, workspace, packed, groups, w, alpha, norm, ends, chunks);
    };
    if constexpr (S == 1)
      if (in_chunks) return walk(wide_forward_kernel<1, true, float>, chunk_walks(p), chunks.carried);
    return walk(wide_forward_kernel<S, false, float>, dim3(unsigned((p.batch + S - 1) / S), halves), carried);
  });
}

int wide_backward(const hmm_problem &p, bool in_chunks, void *workspace, float *packed, const float *grad,
                  const float *alpha, const float *norm, const int32_t *method, const float *w, float *counted,
                  float *state, const ScaledChunks<float> &chunks, void *stream) {
  const int status = in_chunks || !chunks.done ? pack(p, workspace, packed, stream) : HMM_OK;
  return status ? status : with_room<float>(p, 2, in_chunks, [&](auto sequences, Groups groups) {
    constexpr int S = decltype(sequences)::value;
    const size_t shared = Room<S, float>::bytes(groups.near);
    const auto walk = [&](auto kernel, dim3 walks) {
      return launch(kernel, walks, kThreads, shared, stream, p, workspace, packed, groups, grad, alpha, norm, method, w,
                    counted, state, chunks);
    };
    if constexpr (S == 1)
      if (in_chunks) return walk(wide_backward_kernel<1, true, float>, chunk_walks(p));
    return walk(wide_backward_kernel<S, false, float>, dim3(unsigned((p.batch + S - 1) / S), 2));
  });
}

}  // namespace hmm
