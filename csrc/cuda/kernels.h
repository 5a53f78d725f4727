// What the .cu files of this folder offer to interface.cu, for Real = float and double. All return a status of hmm_speech.h
// and take pointers to device memory; `stream` is a cudaStream_t.
#pragma once
#include "hmm_speech.h"

namespace hmm {

// Messages of hmm_cuda_forward in log space, for any transition. Where `lost_only`, for the sequences whose method is
// HMM_REDONE; their method, and without `lost_only` every sequence's, becomes HMM_LOG_SPACE.
template <class Real>
int log_space_forward(const hmm_problem &p, bool lost_only, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                      int32_t *method, void *stream);

// Posteriors of the sequences whose method is HMM_LOG_SPACE. edge, null to skip: where p.time_varying is 1, (B, T-1, N, N),
// written; else (groups, N, N), to which the sums over time of `group` consecutive sequences each are added, in order.
template <class Real>
int log_space_backward(const hmm_problem &p, int group, const Real *grad, const Real *log_partition, const Real *alpha,
                       const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge, void *stream);

// Scaled probabilities, for transitions that do not vary over time. scaled_group: sequences that go through a step together,
// 0 where the device or N is not fit for it and all is done in log space; a CUDA error comes back as a status through `status`.
// Forward sets method to HMM_SCALED, or HMM_REDONE where the result is not certified. Backward does the sequences of
// HMM_SCALED, and sets edge (groups, N, N), null to skip, to the sums over time and the sequences of each group.
template <class Real> int scaled_group(const hmm_problem &p, int *status);
template <class Real> size_t scaled_workspace(const hmm_problem &p);  // bytes: the arcs, ready for use
template <class Real>
int scaled_forward(const hmm_problem &p, int group, Real *log_partition, Real *alpha, Real *centre, int32_t *method,
                   void *workspace, void *stream);
template <class Real>
int scaled_backward(const hmm_problem &p, int group, const Real *grad, const Real *alpha, const Real *centre,
                    const int32_t *method, Real *state, Real *edge, void *workspace, void *stream);

// edge (N, N) = the sum over the first axis of partial (groups, N, N), in order.
template <class Real> int sum_groups(int64_t groups, int64_t arcs, const Real *partial, Real *edge, void *stream);

template <class Real> int viterbi(const hmm_problem &p, Real *score, int16_t *pointers, int64_t *states, void *stream);

template <class Real>
int sample(const hmm_problem &p, int64_t samples, const Real *log_partition, const Real *alpha, const int32_t *method,
           const Real *uniform, int64_t *states, void *stream);

}  // namespace hmm
