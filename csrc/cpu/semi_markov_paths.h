// The best segmentation of a semi-Markov chain, and segmentations drawn from the posterior.
//
// Viterbi: the recursions at the head of semi_markov.h with maxima in place of log-sums, in the same ring, N^2 + N D
// additions and maxima a frame. No back-pointers are stored: both walk back over the messages, N + D scores a segment,
//
//   z_k       from  end_t(i) + phi(i, z_{k+1})                                  t: the frame where segment k ends
//   d_k       from  start_{t-d+1}(j) + durations(j, d) + the window's emissions - the frames' maxima and centres
//
// taking the largest (ties: the smallest state, then the shortest duration) or one drawn by its weight.
//
// Cost a frame of Viterbi: 8 (N^2 + 2 N D) bytes, N rounded up to whole vectors, which for N = 50, D = 30 are 46 KB, more
// than the first cache holds: 0.41 us at 32 bytes a cycle and 3.5 GHz, where the additions and maxima alone take 0.15 us.
// Measured on one core of an EPYC (Zen 3): 0.75 us at least, .54 to .86 of the forward pass.
// Limits: none on N, T or D.
#pragma once
#include "semi_markov.h"
#include "sampling.h"

namespace {
namespace semi_markov {

// most[t]: the largest score of each frame.
template <class In> void frame_maxima(const View<In> &q, double *most) {
  for (int64_t t = 0; t < q.length; t++) most[t] = row_max<In, double>(q.frame(t), q.states);
}

// The highest score; -inf where nothing is feasible, NaN where a score is NaN or +inf. arcs: the transitions' scores,
// (N, padded). most: of frame_maxima.
template <class In>
double best_messages(const View<In> &q, const double *arcs, const Durations<In> &durations, Window &w, const double *most,
                     const Messages &out, double *rows /* 2 padded */) {
  const int64_t N = q.states, L = q.length, padded = w.padded;
  double *start = rows, *end = rows + padded, offset = 0;
  if (L == 0) return 0;
  bool wrong = any_bad(q.initial, N) || (q.final && any_bad(q.final, N)) || durations.first_bad <= L ||
               (L > 1 && any_bad(q.transition, N * N));
  w.empty();
  for (int64_t t = 0; t < L; t++) {
    if (t == 0) widen(q.initial, N, padded, start);
    else over_arcs<MaxPlus>(end, arcs, N, padded, start);
    wrong |= w.enter<false>(t % w.D, start, q.frame(t), N, most[t]);
    over_window<MaxPlus>(w.score, durations.score + durations.row(t % w.D), w.D, padded, end);
    for (int64_t j = 0; j < padded; j += W) store(end + j, load(end + j) + load(w.base + j));
    out.centre[t] = centre_message(end, padded);
    w.shift(out.centre[t]);
    offset += most[t] + out.centre[t];
    std::memcpy(out.start + t * N, start, N * sizeof(double));
    std::memcpy(out.end + t * N, end, N * sizeof(double));
  }
  if (wrong) return std::numeric_limits<double>::quiet_NaN();
  double best = kNinf;
  for (int64_t j = 0; j < N; j++) best = std::fmax(best, end[j] + (q.final ? double(q.final[j]) : 0.));
  return offset + best;
}

// Walks back over the messages of a feasible sequence; choose(t, which, scores, n) picks one of n scores, for the state
// (which = 0) and the duration (1) of the segment that ends at t. most: of frame_maxima. states, starts: (L,) out.
// scratch: max(N, D).
template <class In, class Choose>
void walk(const View<In> &q, int64_t longest, const double *most, const Messages &in, int64_t *states, uint8_t *starts,
          double *scratch, Choose choose) {
  const int64_t N = q.states;
  clear(starts, q.length);
  for (int64_t t = q.length - 1, next = -1; t >= 0;) {
    for (int64_t i = 0; i < N; i++)
      scratch[i] = in.end[t * N + i] + (next >= 0 ? double(q.transition[i * N + next]) : q.final ? double(q.final[i]) : 0.);
    const int64_t j = choose(t, 0, scratch, N), durations = longest < t + 1 ? longest : t + 1;
    double window = 0;
    for (int64_t d = 1; d <= durations; d++) {
      window += double(q.frame(t - d + 1)[j]) - most[t - d + 1];
      scratch[d - 1] = in.start[(t - d + 1) * N + j] + double(q.durations[j * q.most + d - 1]) + window;
      if (t >= d) window -= in.centre[t - d];
    }
    const int64_t begin = t - choose(t, 1, scratch, durations);
    for (int64_t s = begin; s <= t; s++) states[s] = j;
    starts[begin] = 1;
    t = begin - 1, next = j;
  }
}

inline int64_t choose_best(int64_t, int, const double *scores, int64_t n) {
  int64_t best = 0;
  for (int64_t k = 1; k < n; k++)
    if (scores[k] > scores[best]) best = k;
  return best;
}

// By the inverse of the cumulative distribution at uniform (L, 2).
struct ChooseDrawn {
  const double *uniform;
  int64_t operator()(int64_t t, int which, double *scores, int64_t n) const {
    const double top = scores[choose_best(t, which, scores, n)];
    for (int64_t k = 0; k < n; k++) scores[k] = std::exp(scores[k] - top);
    return draw(scores, n, uniform[2 * t + which]);
  }
};

}  // namespace semi_markov
}  // namespace
