/* hmm_speech: the whole C interface.
 *
 * Scores are natural-log potentials of any sign and scale; -infinity forbids. A path z has the score
 *     initial[z_0] + sum_t emission[t, z_t] + sum_{t>0} transition[t-1, z_{t-1}, z_t] + final[z_{L-1}]
 * over the first L = lengths[b] frames of sequence b; frames past L are never read.
 *
 * Arrays are row-major; a score array's last two axes (transition) or last axis (the others) are contiguous, and its
 * leading axes have the strides given here, in elements, 0 to share one block over the batch or over time.
 * Every buffer belongs to the caller and none may overlap. Functions ending in _f32 take float, those in _f64 double.
 * They return HMM_OK or a status below, never throw, and write nothing but their outputs.
 */
#ifndef HMM_SPEECH_H
#define HMM_SPEECH_H

#include <stdint.h>

#define HMM_ABI_VERSION 7
#define HMM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* From HMM_CUDA_ERROR on: HMM_CUDA_ERROR + the code of an error of CUDA. */
enum hmm_status { HMM_OK = 0, HMM_INVALID_ARGUMENT = 1, HMM_OUT_OF_MEMORY = 2, HMM_CUDA_ERROR = 1000 };

/* How a sequence was computed: by scaled probabilities, certified exact; again in float64, since they could not be
 * certified (csrc/cpu/scaled_arcs.h, redo.h); in log space, as time-varying transitions are; from both ends at once, by
 * scaled probabilities, on a GPU also in log space; or, on a GPU, in log space and chunks of frames, all at once. */
enum hmm_method { HMM_SCALED = 0, HMM_REDONE = 1, HMM_LOG_SPACE = 2, HMM_BOTH_ENDS = 3, HMM_CHUNKS = 4 };

/* How threads share the sequences where there are fewer groups of 8 than threads and one matrix for all (otherwise it is
 * not read): each has some of them; two walk the same ones from both ends (hmm_forward; hmm_backward follows the method);
 * or all take each step of the same ones together (hmm_forward and hmm_backward), which pays for large N. */
enum hmm_sharing { HMM_BY_SEQUENCES = 0, HMM_BY_ENDS = 1, HMM_BY_STEPS = 2 };

typedef struct hmm_problem {
  int64_t batch, time, states;  /* B, T, N */
  const void *initial;          /* (B, N) */
  int64_t initial_batch_stride; /* N, or 0 */
  const void *transition;       /* (B, T-1, N, N): [b, t, i, j] scores i at t -> j at t+1 */
  int64_t transition_batch_stride;
  int64_t transition_time_stride;
  const void *emission;   /* (B, T, N) contiguous, or NULL for none */
  const int64_t *lengths; /* (B,), 0..T */
  const void *final;      /* (B, N), or NULL for none */
  int64_t final_batch_stride;
  int32_t time_varying; /* 1: transitions (or the gradient asked for) have a time axis; log space throughout */
  int32_t threads;      /* at least 1 */
  int32_t sharing;      /* enum hmm_sharing */
  int32_t chunk_frames; /* of a chunk, 0 for none: on a GPU, the same in hmm_cuda_forward and hmm_cuda_backward */
  int32_t warm_up;      /* frames that a chunk begins early (csrc/cuda/scaled_chunks.h, early_chunks.h); where time_varying is
                           0, no chunks without it */
} hmm_problem;

/* Forward algorithm.
 *   log_partition (B,), alpha (B, T, N), norm (B, T, N), centre (B, T), method (B,) out.
 * HMM_SCALED: alpha is proportional to p(z_t | x_0..t), its sum in [2^18, 2^31), and centre is the frame's largest
 * score. HMM_BOTH_ENDS: so it is for the first (L + 1) / 2 frames; in the others alpha is proportional to
 * p(x_t..L-1 | z_t). HMM_REDONE: both hold zeros. HMM_LOG_SPACE: alpha holds log messages whose maximum is 0, and
 * norm + centre is the log-sum over the previous state, before emission. Where time_varying is 0, norm is not used and
 * may be NULL.
 */
HMM_API int hmm_forward_f32(const hmm_problem *, float *log_partition, float *alpha, float *norm, float *centre, int32_t *method);
HMM_API int hmm_forward_f64(const hmm_problem *, double *log_partition, double *alpha, double *norm, double *centre, int32_t *method);

/* Posteriors times grad (B,), the gradient of sum_b grad[b] log_partition[b], from the forward pass's outputs.
 *   state (B, T, N) out: grad[b] p(z_t = i | x), 0 past the end.
 *   edge out, NULL to skip: grad[b] p(z_t = i, z_t+1 = j | x), (B, T-1, N, N) where time_varying is 1, else summed
 *   over time, (B, N, N), and where transition_batch_stride is 0 over the batch too, (N, N).
 */
HMM_API int hmm_backward_f32(const hmm_problem *, const float *grad, const float *log_partition, const float *alpha,
                     const float *norm, const float *centre, const int32_t *method, float *state, float *edge);
HMM_API int hmm_backward_f64(const hmm_problem *, const double *grad, const double *log_partition, const double *alpha,
                     const double *norm, const double *centre, const int32_t *method, double *state, double *edge);

/* Viterbi algorithm. score (B,), delta (B, T, N) (workspace), states (B, T) out: -1 past the end and throughout where
 * no path is feasible. Ties go to the smallest state. */
HMM_API int hmm_viterbi_f32(const hmm_problem *, float *score, float *delta, int64_t *states);
HMM_API int hmm_viterbi_f64(const hmm_problem *, double *score, double *delta, int64_t *states);

/* The k best paths, best first: score (k, B) and states (k, B, T) out, -inf and -1 where there are fewer paths and past
 * the end. No path comes twice; which of several with equal scores are taken, and in which order, is the same every time.
 * 1 <= k, and k N below 2^31; a thread takes T N k bytes while it works, twice that for k N over 256 and four times for
 * k N over 65536. */
HMM_API int hmm_topk_f32(const hmm_problem *, int64_t k, float *score, int64_t *states);
HMM_API int hmm_topk_f64(const hmm_problem *, int64_t k, double *score, int64_t *states);

/* Posterior samples by inverse-CDF backward walks, from the outputs of a forward pass not HMM_BY_ENDS or in chunks.
 *   uniform (S, B, T) in [0, 1); states (S, B, T) out, -1 past the end and where no path is feasible. */
HMM_API int hmm_sample_f32(const hmm_problem *, int64_t samples, const float *log_partition, const float *alpha,
                   const int32_t *method, const float *uniform, int64_t *states);
HMM_API int hmm_sample_f64(const hmm_problem *, int64_t samples, const double *log_partition, const double *alpha,
                   const int32_t *method, const double *uniform, int64_t *states);

/* The derivative of the posteriors along a direction, from the scores alone: for the second backward pass.
 *   direction_state (B, T, N), direction_edge as the edge of hmm_backward or NULL for zeros; grad (B,).
 *   expected (B,) out: sum_k posterior_k direction_k, what the direction's sum over a path is on average.
 *   state (B, T, N), edge (NULL to skip, as in hmm_backward) out: grad[b] times the derivative of each posterior. */
HMM_API int hmm_tangent_f32(const hmm_problem *, const float *grad, const float *direction_state, const float *direction_edge,
                    float *expected, float *state, float *edge);
HMM_API int hmm_tangent_f64(const hmm_problem *, const double *grad, const double *direction_state,
                    const double *direction_edge, double *expected, double *state, double *edge);

/* Semi-Markov chains. A segmentation covers the L frames by segments of a state z_k and a duration d_k, 1..D; its score is
 *     initial[z_1] + sum_k (durations[z_k, d_k - 1] + its frames' emission[t, z_k]) + sum_{k>1} transition[z_{k-1}, z_k]
 *     + final[z_K]                                                                                                     */
typedef struct hmm_semi_markov {
  int64_t batch, time, states, max_duration; /* B, T, N, D >= 1 */
  const void *initial;                       /* (B, N), as in hmm_problem */
  int64_t initial_batch_stride;
  const void *transition; /* (B, N, N) */
  int64_t transition_batch_stride;
  const void *emission;  /* (B, T, N) contiguous */
  const void *durations; /* (B, N, D) */
  int64_t durations_batch_stride;
  const int64_t *lengths;
  const void *final;
  int64_t final_batch_stride;
  int32_t threads;
} hmm_semi_markov;

/* Forward pass. log_partition (B,), messages (2, B, T, N), centre (B, T) out; the last two NULL to skip. messages hold
 * log start_t(j) and log end_t(j) of csrc/cpu/semi_markov.h, less centres; they are of use to the functions below. */
HMM_API int hmm_semi_markov_forward_f32(const hmm_semi_markov *, float *log_partition, double *messages, double *centre);
HMM_API int hmm_semi_markov_forward_f64(const hmm_semi_markov *, double *log_partition, double *messages, double *centre);

/* Posteriors times grad (B,), from the forward pass's outputs.
 *   state (B, T, N) out: p(z_t = j); starts (B, T, N) out, NULL to skip: p(a segment of j starts at t); 0 past the end.
 *   arcs, durations out, NULL to skip: expected counts, (B, N, N) and (B, N, D), or summed over the batch where the
 *   scores' batch stride is 0. */
HMM_API int hmm_semi_markov_backward_f32(const hmm_semi_markov *, const float *grad, const float *log_partition,
                    const double *messages, const double *centre, float *state, float *starts, float *arcs, float *durations);
HMM_API int hmm_semi_markov_backward_f64(const hmm_semi_markov *, const double *grad, const double *log_partition,
                    const double *messages, const double *centre, double *state, double *starts, double *arcs,
                    double *durations);

/* The best segmentation. score (B,), states (B, T) and starts (B, T), 1 where a segment starts, out; messages and centre
 * as above (workspace). Ties go to the smallest state, then the shortest duration. -1 and 0 past the end and where
 * nothing is feasible. */
HMM_API int hmm_semi_markov_viterbi_f32(const hmm_semi_markov *, float *score, double *messages, double *centre,
                    int64_t *states, uint8_t *starts);
HMM_API int hmm_semi_markov_viterbi_f64(const hmm_semi_markov *, double *score, double *messages, double *centre,
                    int64_t *states, uint8_t *starts);

/* Segmentations drawn from the posterior, from the forward pass's outputs. uniform (S, B, T, 2) in [0, 1); states and
 * starts (S, B, T) out. */
HMM_API int hmm_semi_markov_sample_f32(const hmm_semi_markov *, int64_t samples, const float *log_partition,
                    const double *messages, const double *centre, const double *uniform, int64_t *states, uint8_t *starts);
HMM_API int hmm_semi_markov_sample_f64(const hmm_semi_markov *, int64_t samples, const double *log_partition,
                    const double *messages, const double *centre, const double *uniform, int64_t *states, uint8_t *starts);

/* Chains of which K of the N states can emit a frame. Frame t of sequence b has the states active[b, t, :], each at most
 * once, in any order, and negative where a slot pads; the emission there is never read. */
typedef struct hmm_active_problem {
  int64_t batch, time, states, slots; /* B, T, N, K */
  const void *initial;                /* (B, N) */
  int64_t initial_batch_stride;       /* N, or 0 */
  const void *transition;             /* (B, N, N): [b, i, j] scores i -> j at every frame */
  int64_t transition_batch_stride;    /* 0 to share one */
  const int64_t *active;              /* (B, T, K) contiguous, 0..N-1, or negative */
  const void *emission;               /* (B, T, K) contiguous: the score of the frame under active[b, t, k] */
  const int64_t *lengths;             /* (B,), 0..T */
  const void *final;                  /* (B, N), or NULL for none */
  int64_t final_batch_stride;
  int32_t threads; /* at least 1 */
} hmm_active_problem;

/* As the functions without `active` in their names, over slots (csrc/cpu/active.h).
 *   alpha, state (B, T, K), 0 where a slot pads and past the end; back (B, T, K), workspace; method HMM_SCALED or
 *   HMM_REDONE.
 *   edge, NULL to skip: (N, N), summed over the batch, where edge_batch_stride is 0 (and transition_batch_stride too), else
 *   (B, N, N). states: (B, T) and (S, B, T), of 0..N-1. Ties of Viterbi go to the smallest state. */
HMM_API int hmm_active_forward_f32(const hmm_active_problem *, float *log_partition, float *alpha, int32_t *method);
HMM_API int hmm_active_forward_f64(const hmm_active_problem *, double *log_partition, double *alpha, int32_t *method);
HMM_API int hmm_active_backward_f32(const hmm_active_problem *, const float *grad, const float *alpha, const int32_t *method,
                                    float *state, float *edge, int64_t edge_batch_stride);
HMM_API int hmm_active_backward_f64(const hmm_active_problem *, const double *grad, const double *alpha, const int32_t *method,
                                    double *state, double *edge, int64_t edge_batch_stride);
HMM_API int hmm_active_viterbi_f32(const hmm_active_problem *, float *score, float *back, int64_t *states);
HMM_API int hmm_active_viterbi_f64(const hmm_active_problem *, double *score, double *back, int64_t *states);
HMM_API int hmm_active_sample_f32(const hmm_active_problem *, int64_t samples, const float *log_partition, const float *alpha,
                                  const int32_t *method, const float *uniform, int64_t *states);
HMM_API int hmm_active_sample_f64(const hmm_active_problem *, int64_t samples, const double *log_partition, const double *alpha,
                                  const int32_t *method, const double *uniform, int64_t *states);

/* Chains that move along a few diagonals (csrc/cpu/banded.h). The functions do as those above. alpha (B, T, N): log
 * messages whose maximum is 0, and centre (B, T): what was taken out of each; float64 for float scores too, as is
 * viterbi's workspace delta (B, T, N). edge: (B, T-1, D, N) where chain.time_varying is 1, else (B, D, N), or (D, N)
 * where chain.transition_batch_stride is 0; 0 where an arc's target is no state. */
typedef struct hmm_banded {
  hmm_problem chain;      /* transition (B, T-1, D, N): [b, t, d, i] scores i at t -> i + offsets[d] at t+1; read only
                           * where that is one of 0..N-1. emission is not NULL */
  int64_t diagonals;      /* D, at least 1 */
  const int64_t *offsets; /* (D,), all different, of any sign */
} hmm_banded;

HMM_API int hmm_banded_forward_f32(const hmm_banded *, float *log_partition, double *alpha, double *centre);
HMM_API int hmm_banded_forward_f64(const hmm_banded *, double *log_partition, double *alpha, double *centre);
HMM_API int hmm_banded_backward_f32(const hmm_banded *, const float *grad, const float *log_partition, const double *alpha,
                                    const double *centre, float *state, float *edge);
HMM_API int hmm_banded_backward_f64(const hmm_banded *, const double *grad, const double *log_partition,
                                    const double *alpha, const double *centre, double *state, double *edge);
HMM_API int hmm_banded_viterbi_f32(const hmm_banded *, float *score, double *delta, int64_t *states);
HMM_API int hmm_banded_viterbi_f64(const hmm_banded *, double *score, double *delta, int64_t *states);
HMM_API int hmm_banded_sample_f32(const hmm_banded *, int64_t samples, const float *log_partition, const double *alpha,
                                  const float *uniform, int64_t *states);
HMM_API int hmm_banded_sample_f64(const hmm_banded *, int64_t samples, const double *log_partition, const double *alpha,
                                  const double *uniform, int64_t *states);

/* Chains through two factors, by scaled probabilities (csrc/cpu/low_rank.h). An arc's probability is
 * sum_r L(i, r) R(r, j), all of them at most 1, times exp(c_j), which is left to the emissions. */
typedef struct hmm_low_rank {
  hmm_problem chain; /* transition (B, 2 R, N): probabilities, R rows of L transposed, then those of R; the stride between
                      * sequences may be 0. emission is not NULL; time_varying and sharing are not read */
  int64_t rank;      /* R, at least 1 */
  const void *shift; /* (B, N): what is added to emissions from frame 1 on; 0 is their maximum */
  int64_t shift_batch_stride;
  double least;      /* a sequence whose scaled sum falls below this is lost */
  int32_t mixing;    /* 1: that is all that is asked; 0: no entry that can be reached may be lost, either */
  int32_t wide;      /* 1: shifts may cancel emissions; their sums' rounding is made good */
} hmm_low_rank;

/* Forward sweep: log_partition (B,), alpha (B, T, N): messages, half (B, T, R): those of the classes between frame t-1 and
 * t, method (B,): HMM_SCALED, or HMM_REDONE for a sequence that was lost: its outputs are 0. All 0 past the end.
 * Backward sweep, from these: state (B, T, N): grad[b] p(z_t | x). classes (B, T, R) and leaving (B, T, N), NULL to skip:
 * L(i, r) sum_t alpha[t, i] classes[t, r] are the uses of L, R(r, j) sum_t half[t, r] leaving[t, j] those of R. All 0 past
 * the end, where method is not HMM_SCALED, and where grad is 0. */
HMM_API int hmm_low_rank_forward_f32(const hmm_low_rank *, double *log_partition, float *alpha, float *half, int32_t *method);
HMM_API int hmm_low_rank_forward_f64(const hmm_low_rank *, double *log_partition, double *alpha, double *half, int32_t *method);
HMM_API int hmm_low_rank_backward_f32(const hmm_low_rank *, const float *grad, const float *alpha, const int32_t *method,
                                      float *state, float *classes, float *leaving);
HMM_API int hmm_low_rank_backward_f64(const hmm_low_rank *, const double *grad, const double *alpha, const int32_t *method,
                                      double *state, double *classes, double *leaving);

/* The same on a GPU, in libraries that were built with nvcc only: the pointers are to memory of the current device, also
 * `lengths`; work is put on `stream` (a cudaStream_t) and not waited for, so that values of lengths are not checked.
 * N is at most HMM_CUDA_MOST_STATES, where time_varying is 1 HMM_CUDA_MOST_STATES_VARYING: more is HMM_INVALID_ARGUMENT. alpha, norm and centre are as above, but norm (B, T, N) is always needed, and HMM_REDONE is
 * in log space: alpha + norm, as float64, are log messages whose maximum is 0 to centre's rounding, and centre is what was taken
 * out of a frame. transition_time_stride is 0 where time_varying is. Forward, sharing is HMM_BY_ENDS for half as many
 * steps one after the other (HMM_BOTH_ENDS), or HMM_BY_SEQUENCES, as samples need it; threads are not looked at. Where
 * time_varying is 1, HMM_BOTH_ENDS is HMM_LOG_SPACE for the first (L + 1) / 2 frames; in the others alpha holds log
 * messages from the end, maximum 0, and norm + centre the log-sum over the next state, and of frames 0 and L-1 centre
 * holds what the halves meet with (csrc/cuda/log_space.cu). Where chunk_frames is more than 0, sequences of more frames may
 * be done in chunks of as many. Where warm_up is too, that is HMM_LOG_SPACE; else (csrc/cuda/transfer.cu; float only, N up to
 * 64) HMM_CHUNKS, which is HMM_LOG_SPACE, but that alpha of a chunk's last frame has the log messages from behind it added,
 * and its maximum is 0 then. `workspace` is hmm_cuda_workspace() bytes, from whose start on nothing is kept between calls. */
#define HMM_CUDA_MOST_STATES 8192
#define HMM_CUDA_MOST_STATES_VARYING 4096 /* where time_varying is 1 */
enum hmm_cuda_pass { HMM_CUDA_FORWARD = 0, HMM_CUDA_BACKWARD = 1 };
HMM_API int64_t hmm_cuda_workspace(const hmm_problem *, int32_t real_bytes, int32_t pass);
HMM_API int hmm_cuda_forward_f32(const hmm_problem *, float *log_partition, float *alpha, float *norm, float *centre,
                                 int32_t *method, void *workspace, void *stream);
HMM_API int hmm_cuda_forward_f64(const hmm_problem *, double *log_partition, double *alpha, double *norm, double *centre,
                                 int32_t *method, void *workspace, void *stream);
HMM_API int hmm_cuda_backward_f32(const hmm_problem *, const float *grad, const float *log_partition, const float *alpha,
                                  const float *norm, const float *centre, const int32_t *method, float *state, float *edge,
                                  void *workspace, void *stream);
HMM_API int hmm_cuda_backward_f64(const hmm_problem *, const double *grad, const double *log_partition, const double *alpha,
                                  const double *norm, const double *centre, const int32_t *method, double *state,
                                  double *edge, void *workspace, void *stream);
/* The same, with a matrix product a step that the caller does with the library of their choice, in full precision: for one
 * matrix of transitions and many states. Where hmm_cuda_in_steps says 1, hmm_cuda_forward works too, more slowly.
 *   forward:  begin; for s = 0 .. S-1: product = message A where s > 0, steps_forward(s); end.
 *   backward: back_begin; for s = 0 .. S-1: product = message A^T where s > 0 or by ends, steps_backward(s); back_end.
 * product, message (B, N); A (N, N) is what the workspace begins with; S = T. Where sharing is HMM_BY_ENDS, in both passes, S =
 * (T+1)/2, and product and message are (2, B, N), of which the second one is multiplied by the other of A and A^T.
 * held: HMM_CUDA_WALK_BYTES, aligned to 16, which begin and back_begin write and steps read; of the problem, steps look at
 * batch and sharing alone. So what steps_forward(0) to (K-1) and steps_advance(K) launch, with products before every step,
 * may be captured once and replayed S / K times, rounded up: a product too many, and steps past S, change nothing. */
#define HMM_CUDA_WALK_BYTES 512
HMM_API int hmm_cuda_in_steps(const hmm_problem *, int32_t real_bytes);
HMM_API int hmm_cuda_steps_advance(int64_t steps, void *held, void *stream);
HMM_API int hmm_cuda_steps_begin_f32(const hmm_problem *, float *alpha, float *norm, float *centre, const float *product,
                                       float *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_forward_f32(const hmm_problem *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_steps_end_f32(const hmm_problem *, float *log_partition, float *alpha, float *norm, float *centre,
                                   int32_t *method, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_back_begin_f32(const hmm_problem *, const float *grad, const float *alpha, const float *norm,
                                          const float *centre, const int32_t *method, float *state, const float *product,
                                          float *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_backward_f32(const hmm_problem *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_steps_back_end_f32(const hmm_problem *, const float *grad, const float *log_partition,
                                        const float *alpha, const float *norm, const float *centre, const int32_t *method,
                                        float *state, float *edge, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_begin_f64(const hmm_problem *, double *alpha, double *norm, double *centre, const double *product,
                                       double *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_forward_f64(const hmm_problem *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_steps_end_f64(const hmm_problem *, double *log_partition, double *alpha, double *norm, double *centre,
                                   int32_t *method, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_back_begin_f64(const hmm_problem *, const double *grad, const double *alpha, const double *norm,
                                          const double *centre, const int32_t *method, double *state, const double *product,
                                          double *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_steps_backward_f64(const hmm_problem *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_steps_back_end_f64(const hmm_problem *, const double *grad, const double *log_partition,
                                        const double *alpha, const double *norm, const double *centre, const int32_t *method,
                                        double *state, double *edge, void *workspace, void *stream);
/* Chains through two factors on a GPU, with the two products of a step by the caller: the sweeps of hmm_low_rank, with the
 * same outputs, and what is lost done again in log space, through the factors. All pointers are to the device.
 *   forward:  begin; for s = 0 .. T-1: between = message L, product = between R where s > 0, forward(s); end.
 *   backward: back_begin; for s = 0 .. T-1: between = message R^T, product = between L^T where s > 0, backward(s); back_end.
 * between (B, R), product and message (B, N); held and hmm_cuda_steps_advance: as above. end gives log Z, also of what is
 * done again, whose method is HMM_REDONE and whose alpha and half are 0. back_begin's outputs are those of
 * hmm_low_rank_backward; of what is done again, classes and leaving are 0 until back_end, which writes its posteriors to
 * state and adds grad times its counts to edge (B, 2 R, N), (2 R, N) where transition_batch_stride is 0, NULL to skip;
 * behind it, classes and leaving hold nothing. workspace: the same one for the calls of a pass. */
typedef struct hmm_cuda_low_rank {
  hmm_problem chain; /* as in hmm_low_rank; batch and time at least 1 */
  int64_t rank;
  const void *scores; /* of the factors, as chain.transition */
  const void *shift;  /* as in hmm_low_rank */
  int64_t shift_batch_stride;
  const double *top; /* (B,), or its stride 0: what the shifts lack, which log Z gets for every frame from 1 on */
  int64_t top_batch_stride;
  const double *demands; /* (2,): `least`, and `mixing`, of hmm_low_rank */
} hmm_cuda_low_rank;
HMM_API int64_t hmm_cuda_low_rank_workspace(const hmm_cuda_low_rank *, int32_t real_bytes, int32_t pass);
HMM_API int hmm_cuda_low_rank_begin_f32(const hmm_cuda_low_rank *, float *alpha, float *half, const float *between,
                                          const float *product, float *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_forward_f32(const hmm_cuda_low_rank *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_low_rank_end_f32(const hmm_cuda_low_rank *, float *log_partition, float *alpha, float *half, int32_t *method,
                                        void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_back_begin_f32(const hmm_cuda_low_rank *, const float *grad, const float *alpha,
                                               const int32_t *method, float *state, float *classes, float *leaving,
                                               const float *between, const float *product, float *message, void *held,
                                               void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_backward_f32(const hmm_cuda_low_rank *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_low_rank_back_end_f32(const hmm_cuda_low_rank *, const float *grad, const float *log_partition,
                                             const int32_t *method, float *state, float *edge, float *classes, float *leaving,
                                             void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_begin_f64(const hmm_cuda_low_rank *, double *alpha, double *half, const double *between,
                                          const double *product, double *message, void *held, void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_forward_f64(const hmm_cuda_low_rank *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_low_rank_end_f64(const hmm_cuda_low_rank *, double *log_partition, double *alpha, double *half, int32_t *method,
                                        void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_back_begin_f64(const hmm_cuda_low_rank *, const double *grad, const double *alpha,
                                               const int32_t *method, double *state, double *classes, double *leaving,
                                               const double *between, const double *product, double *message, void *held,
                                               void *workspace, void *stream);
HMM_API int hmm_cuda_low_rank_backward_f64(const hmm_cuda_low_rank *, int64_t s, const void *held, void *stream);
HMM_API int hmm_cuda_low_rank_back_end_f64(const hmm_cuda_low_rank *, const double *grad, const double *log_partition,
                                             const int32_t *method, double *state, double *edge, double *classes, double *leaving,
                                             void *workspace, void *stream);
/* A stream of the current device, for captures, that lives as long as the process. */
HMM_API int hmm_cuda_create_stream(void **stream);
/* delta (B, 2, N), pointers (B, T, N): workspace. */
HMM_API int hmm_cuda_viterbi_f32(const hmm_problem *, float *score, float *delta, int16_t *pointers, int64_t *states, void *stream);
HMM_API int hmm_cuda_viterbi_f64(const hmm_problem *, double *score, double *delta, int16_t *pointers, int64_t *states, void *stream);
HMM_API int hmm_cuda_sample_f32(const hmm_problem *, int64_t samples, const float *log_partition, const float *alpha,
                                const float *norm, const int32_t *method, const float *uniform, int64_t *states, void *stream);
HMM_API int hmm_cuda_sample_f64(const hmm_problem *, int64_t samples, const double *log_partition, const double *alpha,
                                const double *norm, const int32_t *method, const double *uniform, int64_t *states, void *stream);

HMM_API int hmm_abi_version(void);
HMM_API const char *hmm_instruction_set(void);    /* "avx512", "avx2" or "portable": what the running CPU got */
HMM_API const char *hmm_status_message(int status);

#ifdef __cplusplus
}
#endif
#endif
