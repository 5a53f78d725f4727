// What the .cu files of this folder offer to interface.cu, for Real = float and double. All return a status of
// hmm_speech.h and take pointers to device memory; `stream` is a cudaStream_t.
#pragma once
#include <stddef.h>

#include "hmm_speech.h"

namespace hmm {

// In log space, for transitions that vary over time (log_space.cu, log_space_back.cu): method becomes HMM_LOG_SPACE, or
// where p.sharing is HMM_BY_ENDS HMM_BOTH_ENDS, and where p.chunk_frames asks for chunks HMM_CHUNKS, unless a sequence
// cannot be done so; or, where p.warm_up does not either, HMM_LOG_SPACE of those that are done so. Backward follows it.
// edge: (B, T-1, N, N) or null. The workspace is of log_space_workspace(p, backward) bytes.
template <class Real> size_t log_space_workspace(const hmm_problem &p, bool backward);
template <class Real>
int log_space_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                      void *workspace, void *stream);
template <class Real>
int log_space_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                       const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge,
                       void *workspace, void *stream);

// In log space with messages in float64, for transitions that do not (redo.cu): of the sequences whose method is
// HMM_REDONE, or of all, whose method becomes that. redo_counts adds to the blocks that `counts` sets, from the
// posteriors times grad.
template <class Real>
int redo_forward(const hmm_problem &p, bool all, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                 int32_t *method, void *stream);
template <class Real>
int redo_backward(const hmm_problem &p, const Real *grad, const Real *log_partition, const Real *alpha,
                  const Real *norm, const Real *centre, const int32_t *method, Real *state, void *stream);
template <class Real>
int redo_counts(const hmm_problem &p, const Real *alpha, const Real *norm, const Real *centre, const int32_t *method,
                const Real *state, Real *edge, void *stream);

// Arcs and weights for a scaled sweep (prepare.cu): w (B, T, N) from the emissions and their centres (B, T), which are
// found or given. The workspace begins with the arcs.
template <class Real>
int prepare(const hmm_problem &p, bool find_centres, Real *centre, Real *w, void *workspace, void *stream);

// What the walks of a forward pass end in (join.cu): log Z, method, and 1 / Z of the scaled messages in norm[b, 0, 0].
// Of all sequences, or of those that are not done, where `done` is not null.
struct Carried;
template <class Real>
int join(const hmm_problem &p, const Carried *carried, Real *log_partition, const Real *alpha, Real *norm,
         const Real *centre, int32_t *method, const int32_t *done, void *workspace, void *stream);

// Counts of a scaled sweep (counts.cu): count_blocks(p) blocks (N, N) whose sum is that of all sequences, or one block
// for each sequence where transition_batch_stride is not 0. u: (B, T, N), as the sweeps leave it.
int64_t count_blocks(const hmm_problem &p);
int64_t frames_a_block(const hmm_problem &p);
template <class Real>
int counts(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *u,
           const int32_t *method, Real *edge, void *workspace, void *stream);

// Scaled probabilities (scaled.cu), for transitions that do not vary over time and N of at most scaled_states<Real>().
// Forward sets method to HMM_SCALED, where p.sharing is HMM_BY_ENDS to HMM_BOTH_ENDS, or to HMM_REDONE where the result
// is not certified; where p.chunk_frames asks for chunks (scaled_chunks.h), to HMM_SCALED of those done so. Backward
// does those that are not HMM_REDONE and leaves scaled_messages, what `counts` takes as u, in the workspace of
// scaled_workspace(p, backward) bytes.
template <class Real> int64_t scaled_states();
template <class Real> size_t scaled_workspace(const hmm_problem &p, bool backward);
template <class Real> Real *scaled_messages(const hmm_problem &p, void *workspace);
template <class Real>
int scaled_forward(const hmm_problem &p, Real *log_partition, Real *alpha, Real *norm, Real *centre, int32_t *method,
                   void *workspace, void *stream);
template <class Real>
int scaled_backward(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *centre,
                    const int32_t *method, Real *state, void *workspace, void *stream);

// Its walks for more states than its registers hold arcs of (wide.cu), float32, up to kWideStates: in place of the
// kernels there, from what `prepare` leaves, with wide_bytes(p) for the arcs as they are needed.
constexpr int64_t kWideStates = 256;
size_t wide_bytes(const hmm_problem &p);
template <class Real> struct ScaledChunks;
int wide_forward(const hmm_problem &p, bool in_chunks, void *workspace, float *packed, const float *w, float *alpha,
                 float *norm, Carried *carried, const ScaledChunks<float> &chunks, void *stream);
int wide_backward(const hmm_problem &p, bool in_chunks, void *workspace, float *packed, const float *grad,
                  const float *alpha, const float *norm, const int32_t *method, const float *w, float *counted,
                  float *state, const ScaledChunks<float> &chunks, void *stream);

// The same a step at a time, between matrix products of the caller's (steps.cu), for one matrix of transitions. product
// and message: (B, N), where p.sharing is HMM_BY_ENDS (2, B, N); the workspace begins with the arcs, (N, N). held
// (walked.h): steps read it, and of p the batch and sharing alone.
template <class Real> size_t steps_workspace(const hmm_problem &p, bool backward);
template <class Real> Real *steps_messages(const hmm_problem &p, void *workspace);
template <class Real>
int steps_begin(const hmm_problem &p, Real *alpha, Real *norm, Real *centre, const Real *product, Real *message,
                void *held, void *workspace, void *stream);
template <class Real> int steps_forward(const hmm_problem &p, int64_t step, const void *held, void *stream);
template <class Real>
int steps_end(const hmm_problem &p, Real *log_partition, const Real *alpha, Real *norm, const Real *centre,
              int32_t *method, void *workspace, void *stream);
template <class Real>
int steps_back_begin(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *centre,
                     const int32_t *method, Real *state, const Real *product, Real *message, void *held,
                     void *workspace, void *stream);
template <class Real> int steps_backward(const hmm_problem &p, int64_t step, const void *held, void *stream);
int steps_advance(int64_t steps, void *held, void *stream);  // `first` of any walk

// Chains through two factors (low_rank.cu): the same with products through R classes. between: (B, R), product and
// message: (B, N). `end` and `back_end` launch what is done again in log space (low_rank_redo.cu).
template <class Real> size_t low_rank_workspace(const hmm_cuda_low_rank &p, bool backward);
template <class Real>
int low_rank_begin(const hmm_cuda_low_rank &p, Real *alpha, Real *half, const Real *between, const Real *product,
                   Real *message, void *held, void *workspace, void *stream);
template <class Real>
int low_rank_forward(const hmm_cuda_low_rank &p, int64_t step, const void *held, void *stream);
template <class Real>
int low_rank_end(const hmm_cuda_low_rank &p, Real *log_partition, Real *alpha, Real *half, int32_t *method,
                 void *workspace, void *stream);
template <class Real>
int low_rank_redo(const hmm_cuda_low_rank &p, Real *log_partition, const int32_t *method, void *workspace,
                  void *stream);
template <class Real>
int low_rank_back_begin(const hmm_cuda_low_rank &p, const Real *grad, const Real *alpha, const int32_t *method,
                        Real *state, Real *classes, Real *leaving, const Real *between, const Real *product,
                        Real *message, void *held, void *workspace, void *stream);
template <class Real>
int low_rank_backward(const hmm_cuda_low_rank &p, int64_t step, const void *held, void *stream);
template <class Real>
int low_rank_back_end(const hmm_cuda_low_rank &p, const Real *grad, const Real *log_partition, const int32_t *method,
                      Real *state, Real *edge, Real *classes, Real *leaving, void *workspace, void *stream);

template <class Real>
int viterbi(const hmm_problem &p, Real *score, Real *delta, int16_t *pointers, int64_t *states, void *stream);

template <class Real>
int sample(const hmm_problem &p, int64_t samples, const Real *log_partition, const Real *alpha, const Real *norm,
           const int32_t *method, const Real *uniform, int64_t *states, void *stream);

}  // namespace hmm
