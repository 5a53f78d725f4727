// Posterior sampling by backward walks from the forward messages (forward filtering, backward sampling; Scott 2002).
//
//   z_{L-1} ~ alpha_{L-1},   z_{t-1} with probability proportional to alpha_{t-1}(i) exp(phi_t(i, z_t))
//
// Where messages are scaled and arcs shared over time, the transposed arcs are exponentiated once a call, as
// exp(phi(i, j) - max_i phi(i, j)): a weight is a product then. No allowed arc is flushed: messages are scaled
// only where arcs lie less than 100 bits below their column's maximum, and what a product flushes, the forward pass,
// whose certificate says that nothing relevant was lost (scaled_arcs.h), flushed as well.
// Cost a frame and sample: N products and sums, 2 N numbers read, N / lanes sums across a vector; N exps where messages
// are logarithms or too few frames are walked to repay the table. Samples of one sequence walk side by side, so that
// one's chain of dependent steps hides behind the others'. Measured on one core of an EPYC (Zen 5), float, B = 8, 10
// samples or more, a frame and sample: 32 ns for N = 50 (forward pass: 60), 35 for 128, 82 for 512, 190 for 1024.
// The floor, two loads a cycle, is 1 to 15 ns; most goes into the sums across vectors, the search within one, and
// columns that come from the second or third level of cache.
// Limits: none on N or T.
#pragma once
#include "log_space.h"

namespace {

constexpr int64_t kWalks = 8;  // samples that walk side by side

// Does a table of columns repay its N^2 transpositions and exps? A frame without it gathers one column from N cache
// lines, which costs about as much as three columns of the table (N = 1024: 3.2 us against 1.0).
inline bool worth_columns(const hmm_problem &p, int64_t frames) {
  return !p.time_varying && p.time > 1 && 3 * frames >= p.states;
}

// Arcs transposed, (N, padded): scores padded by -inf, or exp(score - its column's maximum) padded by 0.
template <class Real> struct Columns {
  const int64_t padded;
  Scratch<Real> data;

  Columns(const Real *scores, int64_t N, bool exponentials) : padded(round_up(N, kLanes<Real>)), data(N * padded) {
    constexpr int64_t kBlock = 8;  // rows at once: fewer than the ways of a cache whose sets they may share
    const Real ninf = kNegativeInfinity<Real>;
    if (!data.data) return;
    for (int64_t i0 = 0; i0 < N; i0 += kBlock)
      for (int64_t j = 0; j < N; j++)
        for (int64_t i = i0; i < i0 + kBlock && i < N; i++) data[j * padded + i] = scores[i * N + j];
    for (int64_t j = 0; j < N; j++) {
      Real *const column = data + j * padded;
      for (int64_t i = N; i < padded; i++) column[i] = ninf;
      if (!exponentials) continue;
      const Real top = row_max<Real, Real>(column, N);
      for (int64_t i = 0; i < padded; i += kLanes<Real>) store(column + i, exp<Real>(load(column + i) - top));
    }
  }
};

// A state drawn with probability proportional to weight (N), by the inverse of the cumulative distribution: for short
// lists, and others that are not padded.
template <class Real> HMM_INLINE int64_t draw(const Real *weight, int64_t N, Real uniform) {
  double total = 0;
  for (int64_t i = 0; i < N; i++) total += double(weight[i]);
  double left = double(uniform) * total;
  int64_t last = 0;
  for (int64_t i = 0; i < N; i++) {
    if (!(weight[i] > 0)) continue;
    last = i;
    left -= double(weight[i]);
    if (left < 0) break;
  }
  return last;
}

// The same where weight is padded by 0 to whole vectors: the vector of states first, then the state within it. One of
// weight 0 is never drawn, since it does not raise the sums that are compared. Where rounding leaves nothing to draw,
// the last state of positive weight is.
template <class Real>
HMM_INLINE int64_t draw_padded(const Real *weight, int64_t N, Real uniform, double *sums /* one a vector */) {
  constexpr int W = kLanes<Real>;
  const int64_t vectors = (N + W - 1) / W;
  double total = 0;
  for (int64_t k = 0; k < vectors; k++) sums[k] = total += double(sum_of<Real>(load(weight + k * W)));
  const double target = double(uniform) * total;
  int64_t k = 0;
  for (int64_t n = 0; n < vectors; n++) k += sums[n] <= target;  // without a branch, which would be guessed wrong
  if (k == vectors) k--;
  const Real left = Real(target - (k ? sums[k - 1] : 0));
  Real sum = 0;
  int64_t i = k * W;
  for (int v = 0; v < W; v++) {
    sum += weight[k * W + v];
    i += sum <= left;
  }
  if (i == (k + 1) * W)
    do i--;
    while (i > 0 && !(weight[i] > 0));
  return i;
}

// Samples of one sequence. columns: exponentials where messages are scaled, scores elsewhere; null to gather from the
// arcs.
template <class Real> struct Walks {
  const Sequence<Real> &q;
  const bool scaled;
  const Real *const alpha;
  const Columns<Real> *const columns;
  Real *const weight, *const gathered;  // round_up(N, lanes) each
  double *const sums;

  // weight(i) of z_t = i, given the state after it.
  void weigh(int64_t t, int64_t next) {
    constexpr int W = kLanes<Real>;
    const int64_t N = q.states;
    const Real ninf = kNegativeInfinity<Real>, *a = alpha + t * N, *arcs = nullptr;
    if (t < q.length - 1) {
      arcs = columns ? columns->data + next * columns->padded : gathered;
      if (!columns)
        for (int64_t i = 0; i < N; i++) gathered[i] = q.arcs(t + 1)[i * N + next];
    }
    if (scaled && (columns || !arcs)) {
      for (int64_t i = 0; i < N; i += W) {
        const Vec<Real> x = load_part(a + i, N - i, Real(0));
        store(weight + i, arcs ? x * load(arcs + i) : x);
      }
      return;
    }
    Real top = arcs ? row_max<Real, Real>(arcs, N) : Real(0);
    auto score = [&](int64_t i) {
      Vec<Real> s = arcs ? load_part(arcs + i, N - i, ninf) - top : Vec<Real>{};
      return scaled ? s : s + load_part(a + i, N - i, ninf);
    };
    if (!scaled) {  // log messages: the sum's own maximum keeps the weights from vanishing
      Vec<Real> m = splat(ninf);
      for (int64_t i = 0; i < N; i += W) m = larger(m, score(i));
      top += max_of<Real>(m) == ninf ? Real(0) : max_of<Real>(m);
      if (!arcs) top = 0;
    }
    for (int64_t i = 0; i < N; i += W) {
      const Vec<Real> x = exp<Real>(score(i));
      store(weight + i, scaled ? x * load_part(a + i, N - i, Real(0)) : x);
    }
  }

  // uniform, states: of the first sample; those of the next ones are `stride` further.
  void run(int64_t samples, int64_t stride, const Real *uniform, int64_t *states) {
    for (int64_t first = 0; first < samples; first += kWalks)
      for (int64_t t = q.length - 1; t >= 0; t--)
        for (int64_t s = first; s < first + kWalks && s < samples; s++) {
          int64_t *const path = states + s * stride + t;
          weigh(t, t < q.length - 1 ? path[1] : 0);
          path[0] = draw_padded(weight, q.states, uniform[s * stride + t], sums);
        }
  }
};

}  // namespace
