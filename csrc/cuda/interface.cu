// The C interface on a GPU: checks sizes, divides the workspace, and puts kernels on the stream. Sequences that the scaled
// sweep cannot certify are left to kernels in log space, which are always launched and return at once where there are none:
// what is to be done is decided on the device, and nothing here waits for it.
#include "device.h"
#include "kernels.h"

namespace hmm {
namespace {

bool valid(const hmm_problem *p) {
  if (!p || p->batch < 0 || p->time < 0 || p->states < 1 || p->states > HMM_CUDA_MOST_STATES) return false;
  if (p->batch > 0x7fffffff || p->batch * p->time > int64_t(0x7fffffff) * 8) return false;  // the grids' first axes
  return p->batch == 0 || (p->initial && p->lengths && (p->time < 2 || p->transition) && (p->time_varying || !p->time || p->emission));
}

template <class Real> bool scaled(const hmm_problem &p) { return !p.time_varying && p.time > 0 && p.states <= scaled_states<Real>(); }

// Sums over the batch: how many sequences add up in one block of counts in log space, and how many such blocks there are.
int64_t log_group(const hmm_problem &p) { return p.transition_batch_stride ? 1 : (p.batch + 15) / 16; }
int64_t log_counts(const hmm_problem &p) { return (p.batch + log_group(p) - 1) / log_group(p); }
bool summed_over_batch(const hmm_problem &p) { return !p.time_varying && !p.transition_batch_stride; }

// What a pass works in, from the workspace's start on.
template <class Real> struct Workspace {
  size_t for_scaled, counts = 0;  // bytes, blocks of N^2 numbers
  Workspace(const hmm_problem &p, bool backward) : for_scaled(scaled<Real>(p) ? (scaled_workspace<Real>(p, backward) + 15) / 16 * 16 : 0) {
    if (backward && summed_over_batch(p)) counts = size_t(log_counts(p) + (scaled<Real>(p) ? count_blocks(p) : 0));
  }
  size_t bytes(const hmm_problem &p) const { return for_scaled + counts * size_t(p.states * p.states) * sizeof(Real); }
};

template <class Real> __global__ void __launch_bounds__(256) sum_kernel(int64_t blocks, int64_t arcs, const Real *counts, Real *edge) {
  const int64_t arc = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (arc >= arcs) return;
  Real sum = 0;
  for (int64_t k = 0; k < blocks; k++) sum += counts[k * arcs + arc];
  edge[arc] = sum;
}

template <class Real>
int forward(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method, void *workspace, void *stream) {
  if (!valid(p)) return HMM_INVALID_ARGUMENT;
  if (p->batch == 0) return HMM_OK;
  if (!scaled<Real>(*p)) return log_space_forward(*p, false, log_partition, alpha, norm, centre, method, stream);
  const int status = scaled_forward(*p, log_partition, alpha, norm, centre, method, workspace, stream);
  return status ? status : log_space_forward(*p, true, log_partition, alpha, norm, centre, method, stream);
}

template <class Real>
int backward(const hmm_problem *p, const Real *grad, const Real *log_partition, const Real *alpha, const Real *norm,
             const Real *centre, const int32_t *method, Real *state, Real *edge, void *workspace, void *stream) {
  if (!valid(p)) return HMM_INVALID_ARGUMENT;
  const int64_t arcs = p->states * p->states;
  const bool summed = summed_over_batch(*p);
  if (p->batch == 0) return edge && summed ? fill_zeros(edge, size_t(arcs) * sizeof(Real), stream) : HMM_OK;
  const Workspace<Real> room(*p, true);
  // Blocks of counts: the scaled sweep's, which it sets, then those in log space, which are added to.
  Real *counts = !edge ? nullptr : summed ? reinterpret_cast<Real *>(static_cast<char *>(workspace) + room.for_scaled) : edge;
  Real *log_counts_from = counts;
  int status = HMM_OK;
  if (scaled<Real>(*p)) {
    status = scaled_backward(*p, grad, alpha, norm, centre, method, state, counts, workspace, stream);
    if (edge && summed) log_counts_from += count_blocks(*p) * arcs;
  }
  if (!status && edge && !p->time_varying && (summed || !scaled<Real>(*p)))
    status = fill_zeros(log_counts_from, size_t(log_counts(*p) * arcs) * sizeof(Real), stream);
  if (!status) status = log_space_backward(*p, log_group(*p), grad, log_partition, alpha, norm, centre, method, state, log_counts_from, stream);
  if (status || !edge || !summed) return status;
  return launch(sum_kernel<Real>, dim3(unsigned((arcs + 255) / 256)), 256, 0, stream, int64_t(room.counts), arcs,
                static_cast<const Real *>(counts), edge);
}

}  // namespace
}  // namespace hmm

#define HMM_DEFINE(suffix, Real)                                                                                         \
  int hmm_cuda_forward_##suffix(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre,        \
                                int32_t *method, void *workspace, void *stream) {                                        \
    return hmm::forward(p, log_partition, alpha, norm, centre, method, workspace, stream);                               \
  }                                                                                                                      \
  int hmm_cuda_backward_##suffix(const hmm_problem *p, const Real *grad, const Real *log_partition, const Real *alpha,   \
                                 const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge,   \
                                 void *workspace, void *stream) {                                                        \
    return hmm::backward(p, grad, log_partition, alpha, norm, centre, method, state, edge, workspace, stream);           \
  }                                                                                                                      \
  int hmm_cuda_viterbi_##suffix(const hmm_problem *p, Real *score, int16_t *pointers, int64_t *states, void *stream) {   \
    if (!hmm::valid(p)) return HMM_INVALID_ARGUMENT;                                                                     \
    return p->batch ? hmm::viterbi(*p, score, pointers, states, stream) : HMM_OK;                                        \
  }                                                                                                                      \
  int hmm_cuda_sample_##suffix(const hmm_problem *p, int64_t samples, const Real *log_partition, const Real *alpha,      \
                               const int32_t *method, const Real *uniform, int64_t *states, void *stream) {              \
    if (!hmm::valid(p) || samples < 0) return HMM_INVALID_ARGUMENT;                                                      \
    return p->batch && samples ? hmm::sample(*p, samples, log_partition, alpha, method, uniform, states, stream) : HMM_OK; \
  }

extern "C" {
int64_t hmm_cuda_workspace(const hmm_problem *p, int32_t real_bytes, int32_t pass) {
  if (!hmm::valid(p) || (real_bytes != 4 && real_bytes != 8)) return -1;
  const bool backward = pass == HMM_CUDA_BACKWARD;
  return int64_t(real_bytes == 4 ? hmm::Workspace<float>(*p, backward).bytes(*p) : hmm::Workspace<double>(*p, backward).bytes(*p));
}
HMM_DEFINE(f32, float)
HMM_DEFINE(f64, double)
}
