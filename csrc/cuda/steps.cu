// Forward-backward by scaled probabilities for shared transitions of many states: the product of a step over the whole batch
// is a matrix product of the caller's library, and what comes between two products is one kernel.
//
//   forward    x = message A (the caller's);   a_t = 2^k_t x * w_t        into alpha, where w_t was, and the message
//   backward   y = message A^T (the caller's); b_t = 2^k_{t+1} y / g_{t+1},  gamma_t = a_t * b_t,  u_t = w_t * b_t
//
// with k, g and the certificates of scaled.cu; a_{-1} and u_L are nothing, the first and last frames need no product. What a
// sequence carries from step to step is in `Carried`. Sequences that have ended keep their message (forward) or have one of
// zeros (backward); what is multiplied for them is not looked at.
//
// A step: 2 B N^2 flops in the product, 4 N^2 bytes of arcs from the second cache; here B N numbers of four arrays read and
// written, one block a sequence, two barriers. Launches: 2 a frame. Limits: N of at most HMM_CUDA_MOST_STATES; T none.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "scaled.h"

namespace hmm {
namespace {

constexpr int kThreads = 512;

template <class Real> Carried *carried(const hmm_problem &p, void *workspace) {
  return reinterpret_cast<Carried *>(static_cast<char *>(workspace) + Arcs<Real>::bytes(p.states));
}

// The sum over the block, for all threads, in order; `part` holds a number a warp. Two barriers.
template <class Number> __device__ __forceinline__ Number block_sum(Number x, Number *part) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
#if HMM_MUTATION == 14
  x = __shfl_sync(kAllLanes, x, 0);  // which is no fence
#else
  __syncthreads();
#endif
  x = 0;
  for (int q = 0; q < kThreads / kWarp; q++) x += part[q];
  return x;
}

template <class Real>
__global__ void __launch_bounds__(kThreads) forward_kernel(hmm_problem p, int64_t t, const Real *product, Real *message, Real *alpha,
                                                           Real *norm, void *workspace, Carried *state) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, row = (b * p.time + t) * N;
  if (t >= p.lengths[b]) {  // the whole block
    for (int j = threadIdx.x; t == 0 && j < N; j += kThreads) message[b * N + j] = 0;
    return;
  }
  const Arcs<Real> arcs(workspace, 0, N);
  const Real ninf = negative_infinity<Real>(), smallest = ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *initial = static_cast<const Real *>(p.initial) + b * p.initial_batch_stride;
  Real initial_top = ninf;
  for (int j = threadIdx.x; t == 0 && j < N; j += kThreads) initial_top = fmax(initial_top, initial[j]);
  if (t == 0) initial_top = block_max(initial_top, part);
  if (initial_top == ninf) initial_top = 0;
  const int up = t ? correction(Real(state[2 * b].total)) : 0;
  const Real scale = ldexp(Real(1), up);
  bool lost = t == 0 && !arcs.certificate->usable;
  Real sum = 0;
  for (int j = threadIdx.x; j < N; j += kThreads) {
    const Real w = alpha[row + j];
    const Real start = t ? Real(0) : weight(initial[j], Real(0), initial_top);
    const Real a = t ? product[b * N + j] * w * scale : start * ldexp(Real(1), kTopBits) * w;
    if (!arcs.certificate->mixing && a < smallest * scale && w > 0) {
      bool reached = start > 0;
      for (int i = 0; t && !reached && i < N; i++) reached = alpha[row - N + i] > 0 && arcs.arcs[int64_t(i) * N + j] > 0;
      lost |= reached;
    }
    alpha[row + j] = message[b * N + j] = a;
    sum += a;
  }
  sum = block_sum(sum, part);
  lost |= !(sum >= arcs.certificate->least);
  const bool any = block_max(Real(lost), part) > 0;
  if (threadIdx.x != 0) return;  // no barrier follows
  norm[row] = scale;
  state[2 * b].total = double(sum);
  state[2 * b].exponents = (t ? state[2 * b].exponents : 0) + up;
  state[2 * b].lost = (t ? state[2 * b].lost : 0) | any;
}

template <class Real>
__global__ void __launch_bounds__(kThreads) backward_kernel(hmm_problem p, int64_t t, const Real *grad, const Real *product, Real *message,
                                                            const Real *alpha, const Real *norm, const int32_t *method, Real *w, Real *posterior,
                                                            Carried *state) {
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, kThreads / kWarp);
  const int N = p.states;
  const int64_t b = blockIdx.x, row = (b * p.time + t) * N, L = p.lengths[b];
  const bool scaled = method[b] == HMM_SCALED;
  if (t >= L || !scaled) {  // the whole block; what is lost is left to the kernels in log space
    for (int i = threadIdx.x; i < N; i += kThreads) {
      message[b * N + i] = 0;
      if (scaled) posterior[row + i] = 0;
    }
    return;
  }
  Real factor;
  if (t == L - 1) {
    Real last = 0;
    for (int i = threadIdx.x; i < N; i += kThreads) last += alpha[row + i];
    factor = Real(1) / block_sum(last, part);
  } else factor = norm[row + N] / Real(state[2 * b].total);
  const Real scale = t ? norm[row] : Real(1);
  Real sum = 0;
  for (int i = threadIdx.x; i < N; i += kThreads) {
    const Real a = alpha[row + i], y = t == L - 1 ? Real(1) : product[b * N + i];
    const Real beta = a > 0 ? y * factor : Real(0), gamma = a * beta, u = w[row + i] * beta;
    posterior[row + i] = grad[b] * gamma;
    w[row + i] = scale * u;
    message[b * N + i] = u;
    sum += gamma;
  }
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) state[2 * b].total = double(sum);
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

template <class Real> int steps_begin(const hmm_problem &p, Real *alpha, Real *centre, void *workspace, void *stream) {
  return prepare(p, true, centre, alpha, workspace, stream);
}

template <class Real>
int steps_forward(const hmm_problem &p, int64_t t, const Real *product, Real *message, Real *alpha, Real *norm, void *workspace, void *stream) {
  return launch(forward_kernel<Real>, dim3(unsigned(p.batch)), kThreads, kShared, stream, p, t, product, message, alpha, norm,
                workspace, carried<Real>(p, workspace));
}

template <class Real>
int steps_end(const hmm_problem &p, Real *log_partition, const Real *alpha, Real *norm, const Real *centre, int32_t *method, void *workspace,
              void *stream) {
  return join(p, carried<Real>(p, workspace), log_partition, alpha, norm, centre, method, workspace, stream);
}

template <class Real> int steps_back_begin(const hmm_problem &p, const Real *centre, void *workspace, void *stream) {
  return prepare(p, false, const_cast<Real *>(centre), steps_messages<Real>(p, workspace), workspace, stream);
}

template <class Real>
int steps_backward(const hmm_problem &p, int64_t t, const Real *grad, const Real *product, Real *message, const Real *alpha,
                   const Real *norm, const int32_t *method, Real *state, void *workspace, void *stream) {
  return launch(backward_kernel<Real>, dim3(unsigned(p.batch)), kThreads, kShared, stream, p, t, grad, product, message, alpha,
                norm, method, steps_messages<Real>(p, workspace), state, carried<Real>(p, workspace));
}

#define HMM_INSTANTIATE(Real)                                                                                            \
  template size_t steps_workspace<Real>(const hmm_problem &, bool);                                                      \
  template int steps_begin<Real>(const hmm_problem &, Real *, Real *, void *, void *);                                   \
  template int steps_forward<Real>(const hmm_problem &, int64_t, const Real *, Real *, Real *, Real *, void *, void *);  \
  template int steps_end<Real>(const hmm_problem &, Real *, const Real *, Real *, const Real *, int32_t *, void *, void *); \
  template int steps_back_begin<Real>(const hmm_problem &, const Real *, void *, void *);                                \
  template int steps_backward<Real>(const hmm_problem &, int64_t, const Real *, const Real *, Real *, const Real *,      \
                                    const Real *, const int32_t *, Real *, void *, void *);                              \
  template Real *steps_messages<Real>(const hmm_problem &, void *);
HMM_INSTANTIATE(float)
HMM_INSTANTIATE(double)

}  // namespace hmm
