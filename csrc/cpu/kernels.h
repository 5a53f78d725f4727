// What a translation unit compiled for one instruction set offers to dispatch.cpp.
#pragma once
#include "hmm_speech.h"

// Runs body(context, worker, workers) for worker = 0..workers-1, on one thread each.
typedef void (*Parallel)(int workers, void (*body)(void *, int, int), void *context);

template <class Real> struct BandedKernels {
  int (*forward)(const hmm_banded &, const int64_t *order, Parallel, Real *log_partition, double *alpha, double *centre);
  int (*backward)(const hmm_banded &, const int64_t *order, Parallel, const Real *grad, const Real *log_partition,
                  const double *alpha, const double *centre, Real *state, Real *edge);
  int (*viterbi)(const hmm_banded &, Parallel, Real *score, double *delta, int64_t *states);
  int (*sample)(const hmm_banded &, Parallel, int64_t samples, const Real *log_partition, const double *alpha,
                const Real *uniform, int64_t *states);
};

template <class Real> struct LowRankKernels {
  int (*forward)(const hmm_low_rank &, const int64_t *order, Parallel, double *log_partition, Real *alpha, Real *half,
                 int32_t *method);
  int (*backward)(const hmm_low_rank &, const int64_t *order, Parallel, const Real *grad, const Real *alpha,
                  const int32_t *method, Real *state, Real *classes, Real *leaving);
};

template <class Real> struct Kernels {
  int (*forward)(const hmm_problem &, const int64_t *order, Parallel, Real *log_partition, Real *alpha, Real *norm, Real *centre,
                 int32_t *method);
  int (*backward)(const hmm_problem &, const int64_t *order, Parallel, const Real *grad, const Real *log_partition,
                  const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge);
  int (*viterbi)(const hmm_problem &, const int64_t *order, Parallel, Real *score, Real *delta, int64_t *states);
  int (*topk)(const hmm_problem &, const int64_t *order, Parallel, int64_t k, Real *score, int64_t *states);
  int (*sample)(const hmm_problem &, Parallel, int64_t samples, const Real *log_partition, const Real *alpha,
                const int32_t *method, const Real *uniform, int64_t *states);
  int (*tangent)(const hmm_problem &, Parallel, const Real *grad, const Real *direction_state, const Real *direction_edge,
                 Real *expected, Real *state, Real *edge);
  BandedKernels<Real> banded;
  LowRankKernels<Real> low_rank;
};

template <class Real> struct SemiMarkovKernels {
  int (*forward)(const hmm_semi_markov &, const int64_t *order, Parallel, Real *log_partition, double *messages, double *centre);
  int (*backward)(const hmm_semi_markov &, const int64_t *order, Parallel, const Real *grad, const Real *log_partition,
                  const double *messages, const double *centre, Real *state, Real *starts, Real *arcs, Real *durations);
  int (*viterbi)(const hmm_semi_markov &, const int64_t *order, Parallel, Real *score, double *messages, double *centre,
                 int64_t *states, uint8_t *starts);
  int (*sample)(const hmm_semi_markov &, Parallel, int64_t samples, const Real *log_partition, const double *messages,
                const double *centre, const double *uniform, int64_t *states, uint8_t *starts);
};

template <class Real> struct ActiveKernels {
  int (*forward)(const hmm_active_problem &, const int64_t *order, Parallel, Real *log_partition, Real *alpha, int32_t *method);
  int (*backward)(const hmm_active_problem &, const int64_t *order, Parallel, const Real *grad, const Real *alpha,
                  const int32_t *method, Real *state, Real *edge, int64_t edge_batch_stride);
  int (*viterbi)(const hmm_active_problem &, const int64_t *order, Parallel, Real *score, Real *delta, int64_t *states);
  int (*sample)(const hmm_active_problem &, const int64_t *order, Parallel, int64_t samples, const Real *log_partition,
                const Real *alpha, const int32_t *method, const Real *uniform, int64_t *states);
};

struct InstructionSet {
  const char *name;
  Kernels<float> f32;
  Kernels<double> f64;
  SemiMarkovKernels<float> semi_markov_f32;
  SemiMarkovKernels<double> semi_markov_f64;
  ActiveKernels<float> active_f32;
  ActiveKernels<double> active_f64;
};

extern const InstructionSet hmm_portable, hmm_avx2, hmm_avx512;  // of the latter, those that are built
