// Viterbi algorithm (Rabiner 1989, section III.B) and posterior sampling.
//
//   delta_t(j) = max_i [delta_{t-1}(i) + phi_t(i, j)] + e_t(j), re-centred to maximum 0 at each step
//
// No back-pointers are stored: walking back, the best predecessor of one state is found again from delta, N additions a
// frame against N^2 of the sweep, which is then free of comparisons' indices. Cost a frame: N^2 additions and maxima
// (2/16 operations an arc), 4 N^2 bytes of arcs from cache or memory. Limits: none on N or T.
#pragma once
#include "log_space.h"

namespace {

template <int B, class Real>
HMM_INLINE void max_columns(const Real *arcs, const Real *delta, int64_t N, int64_t j0, Real *out) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  Vec<Real> m[B];
  for (int v = 0; v < B; v++) m[v] = splat(ninf);
  for (int64_t i = 0; i < N; i++)
    for (int v = 0; v < B; v++)
      m[v] = larger(m[v], load_part(arcs + i * N + j0 + v * W, N - j0 - v * W, ninf) + delta[i]);
  for (int v = 0; v < B; v++) store(out + j0 + v * W, m[v]);
}

template <class Real>
double viterbi_sequence(const Sequence<Real> &q, Real *delta, int64_t *states, Real *scratch /* 4 W round_up(N) */) {
  constexpr int W = kLanes<Real>;
  const int64_t N = q.states, L = q.length;
  const Real ninf = kNegativeInfinity<Real>;
  double offset = 0;
  if (L == 0) return 0;
  bool feasible = true;
  for (int64_t t = 0; t < L && feasible; t++) {
    Real top = 0;
    if (t == 0) {
      top = row_max<Real, Real>(q.initial, N);
      for (int64_t j = 0; j < N; j += W) store(scratch + j, load_part(q.initial + j, N - j, ninf) - top);
    } else {
      int64_t j = 0;
      for (; N - j > 3 * W; j += 4 * W) max_columns<4>(q.arcs(t), delta + (t - 1) * N, N, j, scratch);
      for (; j < N; j += W) max_columns<1>(q.arcs(t), delta + (t - 1) * N, N, j, scratch);
    }
    offset += double(top);
    feasible = centre_row<Real, Real>(scratch, q.emission ? q.frame(t) : nullptr, t == L - 1 ? q.final : nullptr, N,
                                      delta + t * N, offset);
  }
  if (!feasible) {
    for (int64_t t = 0; t < L; t++) states[t] = -1;
    return offset == offset ? -std::numeric_limits<double>::infinity() : offset;
  }
  int64_t best = 0;
  const Real *last = delta + (L - 1) * N;
  for (int64_t j = 1; j < N; j++)
    if (last[j] > last[best]) best = j;
  states[L - 1] = best;
  for (int64_t t = L - 1; t > 0; t--) {
    const Real *row = delta + (t - 1) * N, *column = q.arcs(t) + best;
    Real top = ninf;
    best = 0;
    for (int64_t i = 0; i < N; i++) {
      const Real x = row[i] + column[i * N];
      if (x > top) top = x, best = i;
    }
    states[t - 1] = best;
  }
  return offset;  // the maximum of the last delta is 0
}

// A state drawn with probability proportional to weight (N), by the inverse of the cumulative distribution.
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

// z_{L-1} ~ alpha_{L-1},  z_{t-1} ~ alpha_{t-1}(i) exp(phi_t(i, z_t)). columns: phi transposed (N, N), or null to gather.
template <class Real>
void sample_sequence(const Sequence<Real> &q, bool scaled, const Real *alpha, const Real *columns, const Real *uniform,
                     int64_t *states, Real *scratch /* 2 round_up(N) */) {
  constexpr int W = kLanes<Real>;
  const int64_t N = q.states, L = q.length;
  const Real ninf = kNegativeInfinity<Real>;
  Real *weight = scratch, *gathered = scratch + round_up(N, W);
  for (int64_t t = L - 1; t >= 0; t--) {
    const Real *arcs = nullptr;
    if (t < L - 1) {
      arcs = columns ? columns + states[t + 1] * N : gathered;
      if (!columns)
        for (int64_t i = 0; i < N; i++) gathered[i] = q.arcs(t + 1)[i * N + states[t + 1]];
    }
    const Real *a = alpha + t * N;
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
      Vec<Real> x = exp<Real>(score(i));
      store(weight + i, scaled ? x * load_part(a + i, N - i, Real(0)) : x);
    }
    states[t] = draw(weight, N, uniform[t]);
  }
}

}  // namespace
