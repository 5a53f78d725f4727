// Forward-backward by scaled probabilities for shared transitions of many states: the product of a step over the whole
// batch is a matrix product of the caller's library, and what comes between two products is one kernel.
//
//   forward    x = message A (the caller's);   a_t = 2^k_t x * w_t        into alpha, where w_t was, and the message
//   backward   y = message A^T (the caller's); b_t = 2^k_{t+1} y / g_{t+1},  gamma_t = a_t * b_t,  u_t = w_t * b_t
//
// with k, g, the certificates and the two halves of scaled.cu, whose messages are two (B, N) in one product of two
// matrices, A for one and A^T for the other. What a sequence carries from step to step is in `Carried`. Sequences that
// have ended keep their message
// (forward) or have one of zeros (backward); what is multiplied for them is not looked at.
//
// What changes from pass to pass is read in device memory (walked.h), so that a CUDA graph of some steps serves passes
// over any T; a step past a walk's end does nothing.
//
// A step: 2 B N^2 flops a half in the product, 4 N^2 bytes of arcs each; here B N numbers of four arrays read and
// written, one block a sequence and half, two barriers. Launches: 2 a step, of which T / 2 follow each other from both
// ends, else T; one where a pass begins, one behind a graph's steps. Limits: N of at most HMM_CUDA_MOST_STATES; T none.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "scaled.h"
#include "walked.h"

namespace hmm {
namespace {

constexpr int kThreads = 512;

template <class Real> Carried *carried(const hmm_problem &p, void *workspace) {
  return reinterpret_cast<Carried *>(static_cast<char *>(workspace) + Arcs<Real>::bytes(p.states));
}

template <class Real> struct Forward {
  int64_t first;
  hmm_problem p;
  const Real *product;
  Real *message, *alpha, *norm;
  void *workspace;
  Carried *carried;
};

template <class Real> struct Backward {
  int64_t first;
  hmm_problem p;
  const Real *grad, *product, *alpha, *norm;
  Real *message, *w, *posterior;
  const int32_t *method;
  Carried *carried;
};

// Does an allowed arc lead to state j from one with a message? From the end: does one lead from j.
template <class Real>
__device__ __forceinline__ bool reachable(const Real *arcs, const Real *previous, int N, int j, bool from_end) {
  bool found = false;
  for (int i = 0; !found && i < N; i++)
    found = previous[i] > 0 && arcs[from_end ? int64_t(j) * N + i : int64_t(i) * N + j] > 0;
  return found;
}

// The s-th frame of every walk, s = first + step; the grid's second axis has the halves.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Forward<Real> *held, int64_t step) {
  HMM_SHARED_MEMORY(at);
  const auto [first, p, product, message, alpha, norm, workspace, carried] = *held;
  const int64_t s = first + step;
  Real *part = carve<Real>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, at_b = (blockIdx.y * p.batch + b) * N;
  const bool from_end = blockIdx.y == 1;
  const Walk walk = walk_from_ends(p.lengths[b], gridDim.y == 2, from_end);
  if (s >= walk.frames) {  // the whole block
    for (int j = threadIdx.x; s == 0 && j < N; j += kThreads) message[at_b + j] = 0;
    return;
  }
  const int64_t row = (b * p.time + walk.first + s * walk.step) * N, before = row - walk.step * N;
  Carried *state = carried + 2 * b + from_end;
  const Arcs<Real> arcs(workspace, 0, N);
  const Real smallest = ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *initial = static_cast<const Real *>(p.initial) + b * p.initial_batch_stride;
  const Real initial_top = s == 0 && !from_end ? top_of(initial, N, part) : Real(0);
  const int up = s ? correction(Real(state->total)) : 0;
  const Real scale = ldexp(Real(1), up);
  bool lost = s == 0 && !arcs.certificate->usable;
  Real sum = 0;
  for (int j = threadIdx.x; j < N; j += kThreads) {
    const Real w = alpha[row + j];
    const Real start = s ? Real(0) : from_end ? Real(1) : weight(initial[j], Real(0), initial_top);
    const Real a = s ? product[at_b + j] * w * scale : start * ldexp(Real(1), kTopBits) * w;
    if (!arcs.certificate->mixing && is_suspect(a, w, smallest * scale))
      lost |= s ? reachable(arcs.arcs, alpha + before, N, j, from_end) : start > 0;
    alpha[row + j] = message[at_b + j] = a;
    sum += a;
  }
  sum = block_sum<kThreads>(sum, part);
  lost |= !(sum >= arcs.certificate->least);
  const bool any = block_max(Real(lost), part) > 0;
  if (threadIdx.x != 0) return;  // no barrier follows
  norm[row] = scale;
  state->total = double(sum);
  state->exponents = (s ? state->exponents : 0) + up;
  state->lost = (s ? state->lost : 0) | any;
}

// The messages of the other halves, which the first products are of; zeros where there is nothing to go on from.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    meet_kernel(hmm_problem p, const Real *alpha, const int32_t *method, Real *message) {
  const int N = p.states;
  const int64_t b = blockIdx.x;
  const bool both = method[b] == HMM_BOTH_ENDS;
  const Walk walk = walk_to_ends(p.lengths[b], both, blockIdx.y == 1);
  const bool meets = both && walk.frames > 0 && walk.meets;
  for (int i = threadIdx.x; i < N; i += kThreads)
    message[(blockIdx.y * p.batch + b) * N + i] =
        meets ? alpha[(b * p.time + walk.first - walk.step) * N + i] : Real(0);
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const Backward<Real> *held, int64_t step) {
  HMM_SHARED_MEMORY(at);
  const auto [first, p, grad, product, alpha, norm, message, w, posterior, method, carried] = *held;
  const int64_t s = first + step;
  Real *part = carve<Real>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, at_b = (blockIdx.y * p.batch + b) * N, L = p.lengths[b], origin = b * p.time * N;
  const bool done = method[b] == HMM_SCALED || method[b] == HMM_BOTH_ENDS;
  const Walk walk = walk_to_ends(L, method[b] == HMM_BOTH_ENDS, blockIdx.y == 1);
  if (s == 0 && done && blockIdx.y == 0)
    for (int64_t k = L * N + threadIdx.x; k < p.time * N; k += kThreads) posterior[origin + k] = 0;
  if (s >= walk.frames || !done) {  // the whole block; what is lost is done by redo.cu
    for (int i = threadIdx.x; i < N; i += kThreads) message[at_b + i] = 0;
    return;
  }
  const int64_t row = origin + (walk.first + s * walk.step) * N;
  Carried *state = carried + 2 * b + blockIdx.y;
  const Real factor = s == 0 ? norm[origin] : norm[row - walk.step * N] / Real(state->total);
  const Real scale = s < walk.frames - 1 ? norm[row] : Real(1);
  Real sum = 0;
  for (int i = threadIdx.x; i < N; i += kThreads) {
    const Real a = alpha[row + i], y = s == 0 && !walk.meets ? Real(1) : product[at_b + i];
    const Real beta = a > 0 ? y * factor : Real(0), gamma = a * beta, u = w[row + i] * beta;
    posterior[row + i] = grad[b] * gamma;
    w[row + i] = scale * u;
    message[at_b + i] = u;
    sum += gamma;
  }
  sum = block_sum<kThreads>(sum, part);
  if (threadIdx.x == 0) state->total = double(sum);
}

// Behind the steps of a graph.
__global__ void __launch_bounds__(kWarp) advance_kernel(int64_t *first, int64_t steps) {
  if (threadIdx.x == 0) *first += steps - HMM_DEFECT(43);
}

constexpr size_t kShared = carved<double>(kThreads / kWarp) * 2;

}  // namespace

template <class Real> size_t steps_workspace(const hmm_problem &p, bool backward) {
  const size_t frames = backward ? sizeof(Real) * size_t(p.batch * p.time * p.states) : 0;
  return size_t(Arcs<Real>::bytes(p.states)) + 2 * sizeof(Carried) * size_t(p.batch) + frames;
}

template <class Real> Real *steps_messages(const hmm_problem &p, void *workspace) {
  return reinterpret_cast<Real *>(carried<Real>(p, workspace) + 2 * p.batch);
}

inline dim3 walks(const hmm_problem &p) { return dim3(unsigned(p.batch), p.sharing == HMM_BY_ENDS ? 2 : 1); }

template <class Real>
int steps_begin(const hmm_problem &p, Real *alpha, Real *norm, Real *centre, const Real *product, Real *message,
                void *held, void *workspace, void *stream) {
  const int status = prepare(p, true, centre, alpha, workspace, stream);
  const Forward<Real> walk = {0, p, product, message, alpha, norm, workspace, carried<Real>(p, workspace)};
  return status ? status : begin_walk(walk, held, stream);
}

template <class Real> int steps_forward(const hmm_problem &p, int64_t step, const void *held, void *stream) {
  return launch(forward_kernel<Real>, walks(p), kThreads, kShared, stream, static_cast<const Forward<Real> *>(held),
                step);
}

template <class Real>
int steps_end(const hmm_problem &p, Real *log_partition, const Real *alpha, Real *norm, const Real *centre,
              int32_t *method, void *workspace, void *stream) {
  return join(p, carried<Real>(p, workspace), log_partition, alpha, norm, centre, method, nullptr, workspace, stream);
}

template <class Real>
int steps_back_begin(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *centre,
                     const int32_t *method, Real *state, const Real *product, Real *message, void *held,
                     void *workspace, void *stream) {
  Real *w = steps_messages<Real>(p, workspace);
  int status = prepare(p, false, const_cast<Real *>(centre), w, workspace, stream);
  if (!status) status = launch(meet_kernel<Real>, walks(p), kThreads, 0, stream, p, alpha, method, message);
  const Backward<Real> walk = {0,       p, grad,  product, alpha,  norm,
                               message, w, state, method,  carried<Real>(p, workspace)};
  return status ? status : begin_walk(walk, held, stream);
}

template <class Real> int steps_backward(const hmm_problem &p, int64_t step, const void *held, void *stream) {
  return launch(backward_kernel<Real>, walks(p), kThreads, kShared, stream, static_cast<const Backward<Real> *>(held),
                step);
}

int steps_advance(int64_t steps, void *held, void *stream) {
  return launch(advance_kernel, dim3(1), kWarp, 0, stream, static_cast<int64_t *>(held), steps);
}

#define HMM_INSTANTIATE(Real)                                                                                       \
  template size_t steps_workspace<Real>(const hmm_problem &, bool);                                                 \
  template int steps_begin<Real>(const hmm_problem &, Real *, Real *, Real *, const Real *, Real *, void *, void *, \
                                 void *);                                                                           \
  template int steps_forward<Real>(const hmm_problem &, int64_t, const void *, void *);                             \
  template int steps_end<Real>(const hmm_problem &, Real *, const Real *, Real *, const Real *, int32_t *, void *,  \
                               void *);                                                                             \
  template int steps_back_begin<Real>(const hmm_problem &, const Real *, const Real *, const Real *, const Real *,  \
                                      const int32_t *, Real *, const Real *, Real *, void *, void *, void *);       \
  template int steps_backward<Real>(const hmm_problem &, int64_t, const void *, void *);                            \
  template Real *steps_messages<Real>(const hmm_problem &, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
