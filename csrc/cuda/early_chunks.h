// Chunks of p.chunk_frames frames, all at once, for transitions that vary over time: the walks of log_space.cu and
// log_space_back.cu, each of which begins p.warm_up frames before its own (backward, behind them) from messages that
// are the same for all states, and writes nothing until it comes to its own. scaled_chunks.h says why what it arrives
// with there is what it should be, or shows that it is not:
//
//   forward    |alpha(j) - alpha'(j)| <= 2^-s + 2^-(s + 1) |alpha(j)| for all j, of the last message alpha of the chunk
//              before and the one alpha' that the walk arrives with; both have their maximum, 0, taken out. Hence both
//              give every path that follows the same score, up to as much.
//   backward   sum_i |gamma(i) - gamma'(i)| <= 2^-s, of the posteriors of the next chunk's first frame
//
// with s = 20, or 49 in float64: 8 roundings of a number that is 1. A logarithm of 50 has roundings that are 64 times
// as large, which the second term allows for. What is not the same, in one chunk or another, is a sequence that is
// walked as all are without chunks; decided on the device.
//
// Cost: (P - 1) p.warm_up frames more, of P chunks, and as many arcs read.
#pragma once
#include "kernels.h"
#include "walks.h"

namespace hmm {

// Of a pass, in its workspace; all null without such chunks. P chunks a sequence.
template <class Real> struct EarlyChunks {
  double *taken = nullptr;  // (B, P): forward, what the walks took out of their own frames
  Real *arrived = nullptr;  // (B, P, 2, N): what they arrive with, and what they need before
  Real *left = nullptr;  // (B, P, N): backward, posteriors of their first frames
  int32_t *done = nullptr;  // (B,): 1 for a sequence that is done so

  static bool asked_for(const hmm_problem &p) {
    return p.time_varying && p.chunk_frames > 0 && p.warm_up > 0 && p.time > p.chunk_frames &&
           (p.time - 1) / p.chunk_frames < 65535;
  }
  static size_t bytes(const hmm_problem &p) {
    if (!asked_for(p)) return 0;
    const size_t all = size_t(p.batch * chunks_of(p));
    return all * (sizeof(double) + 3 * sizeof(Real) * size_t(p.states)) + sizeof(int32_t) * size_t(p.batch);
  }
  EarlyChunks(const hmm_problem &p, void *room) {
    if (!asked_for(p)) return;
    const int64_t all = p.batch * chunks_of(p), N = p.states;
    taken = static_cast<double *>(room), arrived = reinterpret_cast<Real *>(taken + all);
    left = arrived + 2 * all * N, done = reinterpret_cast<int32_t *>(left + all * N);
  }
};

// What can be done in chunks, which `done` says: log_partition and method (HMM_LOG_SPACE), too; backward, of the
// sequences whose method is that.
template <class Real>
int early_forward(const hmm_problem &p, const EarlyChunks<Real> &chunks, Real *log_partition, Real *alpha, Real *norm,
                  Real *centre, int32_t *method, void *stream);
template <class Real>
int early_backward(const hmm_problem &p, const EarlyChunks<Real> &chunks, const Real *grad, const Real *log_partition,
                   const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state,
                   Real *edge, void *stream);

}  // namespace hmm
