// Forward-backward through R classes by scaled probabilities: the two products of a step over the whole batch are the
// caller's library's, and what comes behind them is one kernel.
//
//   forward    u = message L, x = u R (the caller's);   a_t = 2^k_t x * w_t   into alpha, where w_t was, and the message
//   backward   v = message R^T, y = v L^T;   b_t = y / G_t,  G_t = sum a_t y,  gamma_t = a_t * b_t;  message = w_t * b_t
//
// with the names, certificates and outputs of hmm_speech/hmm/low_rank_ops.py; k brings a sum that has left [2^18, 2^31)
// back at once. Each sequence is walked from its first frame on, and back from its last; a step past its end does
// nothing. What changes from pass to pass is read in device memory (walked.h). What fails is done again by
// low_rank_redo.cu.
//
// A step: 4 B N R flops in the products, 8 N R bytes of factors; here B (N + R) numbers of three arrays, backward six,
// one block a sequence, two barriers. Launches: 3 a step, 3 beside them forward, 5 backward. Limits: none on N, R or T.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "low_rank.h"
#include "walked.h"

namespace hmm {
namespace {

constexpr int kThreads = 512;

template <class Real> struct LowRankForward {
  int64_t first;
  hmm_cuda_low_rank p;
  const Real *between, *product;
  Real *message, *alpha, *half;
  Carried *carried;
};

template <class Real> struct LowRankBackward {
  int64_t first;
  hmm_cuda_low_rank p;
  const Real *grad, *between, *product, *alpha, *w;
  Real *message, *posterior, *classes, *leaving;
  const int32_t *method;
};

template <class Real>
__global__ void __launch_bounds__(256) low_rank_weights_kernel(hmm_cuda_low_rank p, Real *centre, Real *w) {
  const int64_t row = int64_t(blockIdx.x) * (256 / kWarp) + threadIdx.x / kWarp;
  if (row >= p.chain.batch * p.chain.time) return;  // a whole warp
  const Real *shift = static_cast<const Real *>(p.shift) + row / p.chain.time * p.shift_batch_stride;
  weigh_frame<true>(p.chain, row, shift, Real(0), centre, w);
}

// Is one of n sources with a message tied to a target by a number above 0? They are `apart` from each other.
template <class Real>
__device__ __forceinline__ bool reached(const Real *sources, const Real *ties, int64_t apart, int n) {
  bool found = false;
  for (int k = 0; !found && k < n; k++) found = sources[k] > 0 && ties[k * apart] > 0;
  return found;
}

// Frame first + step of every sequence.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_forward_kernel(const LowRankForward<Real> *held, int64_t step) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  const LowRankForward<Real> f = *held;
  const int N = f.p.chain.states, R = f.p.rank;
  const int64_t s = f.first + step, b = blockIdx.x, row = b * f.p.chain.time + s;
  Real *a = f.alpha + row * N, *u = f.half + row * R, *message = f.message + b * N;
  const Real *product = f.product + b * N, *between = f.between + b * R;
  if (s >= f.p.chain.lengths[b]) {  // the whole block
    if (s < f.p.chain.time) set(u, R, Real(0));
    if (s == 0) set(message, N, Real(0));
    return;
  }
  const Factors<Real> factors(f.p, f.p.chain.transition, b);
  const double least = f.p.demands[0];
  const bool entrywise = f.p.demands[1] == 0 && !HMM_DEFECT(42);
  const Real smallest = ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *initial = static_cast<const Real *>(f.p.chain.initial) + b * f.p.chain.initial_batch_stride;
  const Real initial_top = s == 0 ? top_of(initial, N, part) : Real(0);
  bool lost = false;
  for (int r = threadIdx.x; r < R; r += kThreads) {
    const Real x = s ? between[r] : Real(0);
    if (entrywise && s && x < smallest) lost |= reached(a - N, factors.left + int64_t(r) * N, 1, N);
    u[r] = x;
  }
  Real sum = 0;
  for (int j = threadIdx.x; j < N; j += kThreads) {
    const Real w = a[j], start = s ? Real(0) : weight(initial[j], Real(0), initial_top);
    const Real x = s ? product[j] * w : start * ldexp(Real(1), kTopBits) * w;
    if (entrywise && is_suspect(x, w, smallest)) lost |= s ? reached(between, factors.right + j, N, R) : start > 0;
    a[j] = message[j] = x;
    sum += x;
  }
  sum = block_sum<kThreads>(sum, part);
  const bool any = block_max(Real(lost || !(double(sum) >= least)), part) > 0;
  const int up = correction(sum);
  const Real scale = ldexp(Real(1), up);
  for (int j = threadIdx.x; up != 0 && j < N; j += kThreads) a[j] = message[j] = message[j] * scale;
  if (threadIdx.x != 0) return;  // no barrier follows
  Carried &carried = f.carried[b];
  carried.total = double(sum) * double(scale);
  carried.exponents = (s ? carried.exponents : 0) + up;
  carried.lost = (s ? carried.lost : 0) | any;
}

// log Z, and which sequences are lost: their messages become 0.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_end_kernel(hmm_cuda_low_rank p, const Carried *carried, const Real *centre, Real *log_partition,
                        Real *alpha, Real *half, int32_t *method) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  double *part_double = carve<double>(at, kThreads / kWarp);
  const int N = p.chain.states;
  const int64_t b = blockIdx.x, T = p.chain.time, L = p.chain.lengths[b];
  const Carried found = carried[b];
  const bool lost = L > 0 && found.lost;
  double taken = 0;
  for (int64_t t = threadIdx.x; t < L; t += kThreads) taken += double(centre[b * T + t]);
  taken = block_sum<kThreads>(taken, part_double);
  if (L > 0) {  // the whole block
    taken += double(L - 1) * p.top[b * p.top_batch_stride];
    taken += double(top_of(static_cast<const Real *>(p.chain.initial) + b * p.chain.initial_batch_stride, N, part));
    if (p.chain.final)
      taken += double(top_of(static_cast<const Real *>(p.chain.final) + b * p.chain.final_batch_stride, N, part));
  }
  if (lost) set(alpha + b * T * N, L * N, Real(0)), set(half + b * T * p.rank, L * p.rank, Real(0));
  if (threadIdx.x != 0) return;  // no barrier follows
  method[b] = lost ? HMM_REDONE : HMM_SCALED;
  const double ended = taken - double(found.exponents + kTopBits) * kLn2 + log(found.total);
  log_partition[b] = L == 0 ? Real(0) : Real(ended);
}

// Frame L - 1 - (first + step) of every sequence.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_backward_kernel(const LowRankBackward<Real> *held, int64_t step) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  const LowRankBackward<Real> f = *held;
  const int N = f.p.chain.states, R = f.p.rank;
  const int64_t s = f.first + step, b = blockIdx.x, T = f.p.chain.time, row = b * T;
  const int64_t L = f.method[b] == HMM_SCALED ? f.p.chain.lengths[b] : 0, t = L - 1 - s;
  Real *message = f.message + b * N;
  if (s == 0) {  // past the end, of what is done by low_rank_redo.cu, and where no classes are on the way
    const int64_t last = L > 0 ? L - 1 : 0;
    set(f.posterior + (row + L) * N, (T - L) * N, Real(0)), set(f.leaving + (row + L) * N, (T - L) * N, Real(0));
    set(f.classes + (row + last) * R, (T - last) * R, Real(0));
  }
  if (t < 0) {  // the whole block
    set(message, N, Real(0));
    return;
  }
  const Real *a = f.alpha + (row + t) * N, *product = f.product + b * N;
  Real mass = 0;
  for (int i = threadIdx.x; i < N; i += kThreads)
    if (a[i] > 0) mass += a[i] * (s ? product[i] : Real(1));  // what cannot be reached may have overflowed
  const Real inverse = 1 / block_sum<kThreads>(mass, part);
  for (int r = threadIdx.x; s > 0 && r < R; r += kThreads)
    f.classes[(row + t) * R + r] = f.between[b * R + r] * inverse;
  Real *posterior = f.posterior + (row + t) * N, *next = f.leaving + (row + t + 1) * N;
  for (int i = threadIdx.x; i < N; i += kThreads) {
    const Real beta = a[i] > 0 ? (s ? product[i] : Real(1)) * inverse : Real(0);
    posterior[i] = f.grad[b] * (a[i] * beta);
    if (s > 0) next[i] = message[i] * inverse;
    message[i] = f.w[(row + t) * N + i] * beta;
    if (t == 0) f.leaving[row * N + i] = 0;
  }
}

template <class Real> constexpr size_t kShared = carved<Real>(kThreads / kWarp);

template <class Real> int weigh(const hmm_cuda_low_rank &p, Real *centre, Real *w, void *stream) {
  const int64_t blocks = (p.chain.batch * p.chain.time + 256 / kWarp - 1) / (256 / kWarp);
  return launch(low_rank_weights_kernel<Real>, dim3(unsigned(blocks)), 256, 0, stream, p, centre, w);
}

}  // namespace

template <class Real> size_t low_rank_workspace(const hmm_cuda_low_rank &p, bool backward) {
  return LowRankWorkspace<Real>(p, backward, nullptr).bytes;
}

template <class Real>
int low_rank_begin(const hmm_cuda_low_rank &p, Real *alpha, Real *half, const Real *between, const Real *product,
                   Real *message, void *held, void *workspace, void *stream) {
  const LowRankWorkspace<Real> room(p, false, workspace);
  const int status = weigh(p, room.centre, alpha, stream);
  const LowRankForward<Real> walk = {0, p, between, product, message, alpha, half, room.carried};
  return status ? status : begin_walk(walk, held, stream);
}

template <class Real>
int low_rank_forward(const hmm_cuda_low_rank &p, int64_t step, const void *held, void *stream) {
  return launch(low_rank_forward_kernel<Real>, dim3(unsigned(p.chain.batch)), kThreads, kShared<Real>, stream,
                static_cast<const LowRankForward<Real> *>(held), step);
}

template <class Real>
int low_rank_end(const hmm_cuda_low_rank &p, Real *log_partition, Real *alpha, Real *half, int32_t *method,
                 void *workspace, void *stream) {
  const LowRankWorkspace<Real> room(p, false, workspace);
  const int status =
      launch(low_rank_end_kernel<Real>, dim3(unsigned(p.chain.batch)), kThreads,
             kShared<Real> + kShared<double>, stream, p, room.carried, room.centre, log_partition, alpha, half, method);
  return status ? status : low_rank_redo(p, log_partition, method, workspace, stream);
}

template <class Real>
int low_rank_back_begin(const hmm_cuda_low_rank &p, const Real *grad, const Real *alpha, const int32_t *method,
                        Real *state, Real *classes, Real *leaving, const Real *between, const Real *product,
                        Real *message, void *held, void *workspace, void *stream) {
  const LowRankWorkspace<Real> room(p, true, workspace);
  const int status = weigh(p, room.centre, room.w, stream);
  const LowRankBackward<Real> walk = {0,       p,     grad,    between, product, alpha,
                                      room.w, message, state, classes, leaving, method};
  return status ? status : begin_walk(walk, held, stream);
}

template <class Real>
int low_rank_backward(const hmm_cuda_low_rank &p, int64_t step, const void *held, void *stream) {
  return launch(low_rank_backward_kernel<Real>, dim3(unsigned(p.chain.batch)), kThreads, kShared<Real>, stream,
                static_cast<const LowRankBackward<Real> *>(held), step);
}

#define HMM_INSTANTIATE(Real)                                                                                         \
  template size_t low_rank_workspace<Real>(const hmm_cuda_low_rank &, bool);                                          \
  template int low_rank_begin<Real>(const hmm_cuda_low_rank &, Real *, Real *, const Real *, const Real *, Real *,    \
                                    void *, void *, void *);                                                          \
  template int low_rank_forward<Real>(const hmm_cuda_low_rank &, int64_t, const void *, void *);                      \
  template int low_rank_end<Real>(const hmm_cuda_low_rank &, Real *, Real *, Real *, int32_t *, void *, void *);      \
  template int low_rank_back_begin<Real>(const hmm_cuda_low_rank &, const Real *, const Real *, const int32_t *,      \
                                         Real *, Real *, Real *, const Real *, const Real *, Real *, void *, void *,  \
                                         void *);                                                                     \
  template int low_rank_backward<Real>(const hmm_cuda_low_rank &, int64_t, const void *, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
