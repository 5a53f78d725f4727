// The C interface on a GPU: checks sizes, divides the workspace, and puts kernels on the stream. Sequences that the
// scaled sweep cannot certify are left to the kernels of redo.cu, which are always launched and return at once where
// there are none: what is to be done is decided on the device, and nothing here waits for it.
#include "device.h"
#include "kernels.h"

namespace hmm {
namespace {

bool valid(const hmm_problem *p) {
  if (!p || p->batch < 0 || p->time < 0 || p->states < 1 || p->chunk_frames < 0 || p->warm_up < 0) return false;
  if (p->states > (p->time_varying ? HMM_CUDA_MOST_STATES_VARYING : HMM_CUDA_MOST_STATES)) return false;
  if (p->batch > 0x7fffffff || p->batch * p->time > int64_t(0x7fffffff) * 8) return false;  // the grids' first axes
  return p->batch == 0 ||
         (p->initial && p->lengths && (p->time < 2 || p->transition) && (p->time_varying || !p->time || p->emission));
}

// Scaled probabilities within one kernel; or with a matrix product of the caller's a step, which hmm_cuda_forward and
// hmm_cuda_backward do not do: all sequences are done as redo.cu does them then.
template <class Real> bool scaled(const hmm_problem &p) {
  return !p.time_varying && p.time > 0 && p.states <= scaled_states<Real>();
}
template <class Real> bool in_steps(const hmm_problem &p) {
  return !p.time_varying && p.time > 0 && !p.transition_batch_stride && p.states > scaled_states<Real>();
}

// Counts of all sequences are one matrix: added up in blocks of ranges of frames, where there is more than one.
bool summed_over_batch(const hmm_problem &p) { return !p.time_varying && !p.transition_batch_stride; }
bool in_blocks(const hmm_problem &p) { return summed_over_batch(p) && count_blocks(p) > 1; }

// What a pass works in, from the workspace's start on: what the sweeps need, then blocks of N^2 counts to be added up.
template <class Real> struct Workspace {
  size_t for_sweeps = 0, blocks = 0;
  Workspace(const hmm_problem &p, bool backward) {
    if (scaled<Real>(p)) for_sweeps = scaled_workspace<Real>(p, backward);
    if (in_steps<Real>(p)) for_sweeps = steps_workspace<Real>(p, backward);
    if (p.time_varying) for_sweeps = log_space_workspace<Real>(p, backward);
    for_sweeps = (for_sweeps + 15) / 16 * 16;
    if (backward && in_blocks(p)) blocks = size_t(count_blocks(p));
  }
  size_t bytes(const hmm_problem &p) const { return for_sweeps + blocks * size_t(p.states * p.states) * sizeof(Real); }
};

template <class Real>
__global__ void __launch_bounds__(256) sum_kernel(int64_t blocks, int64_t arcs, const Real *counts, Real *edge) {
  const int64_t arc = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (arc >= arcs) return;
  Real sum = 0;
  for (int64_t k = 0; k < blocks; k++) sum += counts[k * arcs + arc];
  edge[arc] = sum;
}

template <class Real>
int forward(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
            void *workspace, void *stream) {
  if (!valid(p)) return HMM_INVALID_ARGUMENT;
  if (p->batch == 0) return HMM_OK;
  if (p->time_varying) return log_space_forward(*p, log_partition, alpha, norm, centre, method, workspace, stream);
  if (!scaled<Real>(*p)) return redo_forward(*p, true, log_partition, alpha, norm, centre, method, stream);
  const int status = scaled_forward(*p, log_partition, alpha, norm, centre, method, workspace, stream);
  return status ? status : redo_forward(*p, false, log_partition, alpha, norm, centre, method, stream);
}

// The rest of a backward pass over transitions that do not vary over time: what is to be done again, and the counts. u:
// what the scaled sweep left, or null.
template <class Real>
int finish(const hmm_problem &p, const Real *u, const Real *grad, const Real *log_partition, const Real *alpha,
           const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge, void *workspace,
           void *stream) {
  const int64_t arcs = p.states * p.states, blocks = count_blocks(p);
  Real *counted = edge;
  if (edge && in_blocks(p))
    counted = reinterpret_cast<Real *>(static_cast<char *>(workspace) + Workspace<Real>(p, true).for_sweeps);
  int status = redo_backward(p, grad, log_partition, alpha, norm, centre, method, state, stream);
  if (status || !edge) return status;
  if (u) status = counts(p, grad, alpha, norm, u, method, counted, workspace, stream);
  else
    status = fill_zeros(
        counted,
        size_t((summed_over_batch(p) ? 1 : p.batch) * arcs) * sizeof(Real) * (counted == edge ? 1 : size_t(blocks)),
        stream);
  if (!status && blocks)
    status = redo_counts(p, alpha, norm, centre, method, static_cast<const Real *>(state), counted, stream);
  if (status || counted == edge) return status;
  return launch(sum_kernel<Real>, dim3(unsigned((arcs + 255) / 256)), 256, 0, stream, blocks, arcs,
                static_cast<const Real *>(counted), edge);
}

template <class Real>
int backward(const hmm_problem *p, const Real *grad, const Real *log_partition, const Real *alpha, const Real *norm,
             const Real *centre, const int32_t *method, Real *state, Real *edge, void *workspace, void *stream) {
  if (!valid(p)) return HMM_INVALID_ARGUMENT;
  if (p->batch == 0)
    return edge && summed_over_batch(*p) ? fill_zeros(edge, size_t(p->states * p->states) * sizeof(Real), stream)
                                         : HMM_OK;
  if (p->time_varying)
    return log_space_backward(*p, grad, log_partition, alpha, norm, centre, method, state, edge, workspace, stream);
  const Real *u = nullptr;
  if (scaled<Real>(*p)) {
    const int status = scaled_backward(*p, grad, alpha, norm, centre, method, state, workspace, stream);
    if (status) return status;
    u = scaled_messages<Real>(*p, workspace);
  }
  return finish(*p, u, grad, log_partition, alpha, norm, centre, method, state, edge, workspace, stream);
}

template <class Real> bool valid_step(const hmm_problem *p, int64_t step) {
  return valid(p) && p->batch > 0 && in_steps<Real>(*p) && step >= 0;
}

bool valid(const hmm_cuda_low_rank *p) {
  return p && p->chain.batch > 0 && p->chain.time > 0 && p->chain.states > 0 && p->rank > 0 &&
         p->chain.batch * p->chain.time <= int64_t(0x7fffffff) * 8;
}
bool valid_pass(const hmm_cuda_low_rank *p) {
  const hmm_problem *c = p ? &p->chain : nullptr;
  return valid(p) && c->initial && c->transition && c->emission && c->lengths && p->scores && p->shift && p->top &&
         p->demands;
}

}  // namespace
}  // namespace hmm

#define HMM_DEFINE(suffix, Real)                                                                                       \
  int hmm_cuda_forward_##suffix(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre,      \
                                int32_t *method, void *workspace, void *stream) {                                      \
    return hmm::forward(p, log_partition, alpha, norm, centre, method, workspace, stream);                             \
  }                                                                                                                    \
  int hmm_cuda_backward_##suffix(const hmm_problem *p, const Real *grad, const Real *log_partition, const Real *alpha, \
                                 const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge, \
                                 void *workspace, void *stream) {                                                      \
    return hmm::backward(p, grad, log_partition, alpha, norm, centre, method, state, edge, workspace, stream);         \
  }                                                                                                                    \
  int hmm_cuda_viterbi_##suffix(const hmm_problem *p, Real *score, Real *delta, int16_t *pointers, int64_t *states,    \
                                void *stream) {                                                                        \
    if (!hmm::valid(p)) return HMM_INVALID_ARGUMENT;                                                                   \
    return p->batch ? hmm::viterbi(*p, score, delta, pointers, states, stream) : HMM_OK;                               \
  }                                                                                                                    \
  int hmm_cuda_sample_##suffix(const hmm_problem *p, int64_t samples, const Real *log_partition, const Real *alpha,    \
                               const Real *norm, const int32_t *method, const Real *uniform, int64_t *states,          \
                               void *stream) {                                                                         \
    if (!hmm::valid(p) || samples < 0) return HMM_INVALID_ARGUMENT;                                                    \
    if (p->batch == 0 || samples == 0) return HMM_OK;                                                                  \
    return hmm::sample(*p, samples, log_partition, alpha, norm, method, uniform, states, stream);                      \
  }

#define HMM_DEFINE_STEPS(suffix, Real)                                                                                 \
  int hmm_cuda_steps_begin_##suffix(const hmm_problem *p, Real *alpha, Real *norm, Real *centre, const Real *product,  \
                                    Real *message, void *held, void *workspace, void *stream) {                        \
    if (!hmm::valid_step<Real>(p, 0)) return HMM_INVALID_ARGUMENT;                                                     \
    return hmm::steps_begin(*p, alpha, norm, centre, product, message, held, workspace, stream);                       \
  }                                                                                                                    \
  int hmm_cuda_steps_forward_##suffix(const hmm_problem *p, int64_t step, const void *held, void *stream) {            \
    if (!hmm::valid_step<Real>(p, step)) return HMM_INVALID_ARGUMENT;                                                  \
    return hmm::steps_forward<Real>(*p, step, held, stream);                                                           \
  }                                                                                                                    \
  int hmm_cuda_steps_end_##suffix(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre,    \
                                  int32_t *method, void *workspace, void *stream) {                                    \
    if (!hmm::valid_step<Real>(p, 0)) return HMM_INVALID_ARGUMENT;                                                     \
    const int status = hmm::steps_end<Real>(*p, log_partition, alpha, norm, centre, method, workspace, stream);        \
    return status ? status : hmm::redo_forward(*p, false, log_partition, alpha, norm, centre, method, stream);         \
  }                                                                                                                    \
  int hmm_cuda_steps_back_begin_##suffix(const hmm_problem *p, const Real *grad, const Real *alpha, const Real *norm,  \
                                         const Real *centre, const int32_t *method, Real *state, const Real *product,  \
                                         Real *message, void *held, void *workspace, void *stream) {                   \
    if (!hmm::valid_step<Real>(p, 0)) return HMM_INVALID_ARGUMENT;                                                     \
    return hmm::steps_back_begin(*p, grad, alpha, norm, centre, method, state, product, message, held, workspace,      \
                                 stream);                                                                              \
  }                                                                                                                    \
  int hmm_cuda_steps_backward_##suffix(const hmm_problem *p, int64_t step, const void *held, void *stream) {           \
    if (!hmm::valid_step<Real>(p, step)) return HMM_INVALID_ARGUMENT;                                                  \
    return hmm::steps_backward<Real>(*p, step, held, stream);                                                          \
  }                                                                                                                    \
  int hmm_cuda_steps_back_end_##suffix(const hmm_problem *p, const Real *grad, const Real *log_partition,              \
                                       const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, \
                                       Real *state, Real *edge, void *workspace, void *stream) {                       \
    if (!hmm::valid_step<Real>(p, 0)) return HMM_INVALID_ARGUMENT;                                                     \
    return hmm::finish(*p, static_cast<const Real *>(hmm::steps_messages<Real>(*p, workspace)), grad, log_partition,   \
                       alpha, norm, centre, method, state, edge, workspace, stream);                                   \
  }

#define HMM_DEFINE_LOW_RANK(suffix, Real)                                                                              \
  int hmm_cuda_low_rank_begin_##suffix(const hmm_cuda_low_rank *p, Real *alpha, Real *half, const Real *between,       \
                                       const Real *product, Real *message, void *held, void *workspace,                \
                                       void *stream) {                                                                 \
    if (!hmm::valid_pass(p)) return HMM_INVALID_ARGUMENT;                                                              \
    return hmm::low_rank_begin(*p, alpha, half, between, product, message, held, workspace, stream);                   \
  }                                                                                                                    \
  int hmm_cuda_low_rank_forward_##suffix(const hmm_cuda_low_rank *p, int64_t step, const void *held, void *stream) {   \
    if (!hmm::valid(p) || step < 0) return HMM_INVALID_ARGUMENT;                                                       \
    return hmm::low_rank_forward<Real>(*p, step, held, stream);                                                        \
  }                                                                                                                    \
  int hmm_cuda_low_rank_end_##suffix(const hmm_cuda_low_rank *p, Real *log_partition, Real *alpha, Real *half,         \
                                     int32_t *method, void *workspace, void *stream) {                                 \
    if (!hmm::valid_pass(p)) return HMM_INVALID_ARGUMENT;                                                              \
    return hmm::low_rank_end(*p, log_partition, alpha, half, method, workspace, stream);                               \
  }                                                                                                                    \
  int hmm_cuda_low_rank_back_begin_##suffix(const hmm_cuda_low_rank *p, const Real *grad, const Real *alpha,           \
                                            const int32_t *method, Real *state, Real *classes, Real *leaving,          \
                                            const Real *between, const Real *product, Real *message, void *held,       \
                                            void *workspace, void *stream) {                                           \
    if (!hmm::valid_pass(p)) return HMM_INVALID_ARGUMENT;                                                              \
    return hmm::low_rank_back_begin(*p, grad, alpha, method, state, classes, leaving, between, product, message, held, \
                                    workspace, stream);                                                                \
  }                                                                                                                    \
  int hmm_cuda_low_rank_backward_##suffix(const hmm_cuda_low_rank *p, int64_t step, const void *held, void *stream) {  \
    if (!hmm::valid(p) || step < 0) return HMM_INVALID_ARGUMENT;                                                       \
    return hmm::low_rank_backward<Real>(*p, step, held, stream);                                                       \
  }                                                                                                                    \
  int hmm_cuda_low_rank_back_end_##suffix(const hmm_cuda_low_rank *p, const Real *grad, const Real *log_partition,     \
                                          const int32_t *method, Real *state, Real *edge, Real *classes,               \
                                          Real *leaving, void *workspace, void *stream) {                              \
    if (!hmm::valid_pass(p)) return HMM_INVALID_ARGUMENT;                                                              \
    return hmm::low_rank_back_end(*p, grad, log_partition, method, state, edge, classes, leaving, workspace, stream);  \
  }

extern "C" {
int64_t hmm_cuda_workspace(const hmm_problem *p, int32_t real_bytes, int32_t pass) {
  if (!hmm::valid(p) || (real_bytes != 4 && real_bytes != 8)) return -1;
  const bool backward = pass == HMM_CUDA_BACKWARD;
  return int64_t(real_bytes == 4 ? hmm::Workspace<float>(*p, backward).bytes(*p)
                                 : hmm::Workspace<double>(*p, backward).bytes(*p));
}
HMM_DEFINE(f32, float)
HMM_DEFINE(f64, double)
HMM_DEFINE_STEPS(f32, float)
HMM_DEFINE_STEPS(f64, double)
HMM_DEFINE_LOW_RANK(f32, float)
HMM_DEFINE_LOW_RANK(f64, double)
int64_t hmm_cuda_low_rank_workspace(const hmm_cuda_low_rank *p, int32_t real_bytes, int32_t pass) {
  if (!hmm::valid(p) || (real_bytes != 4 && real_bytes != 8)) return -1;
  const bool backward = pass == HMM_CUDA_BACKWARD;
  return int64_t(real_bytes == 4 ? hmm::low_rank_workspace<float>(*p, backward)
                                 : hmm::low_rank_workspace<double>(*p, backward));
}
int hmm_cuda_in_steps(const hmm_problem *p, int32_t real_bytes) {
  return hmm::valid(p) && p->batch > 0 && (real_bytes == 4 ? hmm::in_steps<float>(*p) : hmm::in_steps<double>(*p));
}
int hmm_cuda_steps_advance(int64_t steps, void *held, void *stream) {
  return steps < 0 ? HMM_INVALID_ARGUMENT : hmm::steps_advance(steps, held, stream);
}
int hmm_cuda_create_stream(void **stream) { return hmm::create_stream(stream); }
}
