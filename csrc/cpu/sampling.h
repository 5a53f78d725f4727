// Posterior sampling by backward walks from the forward messages (forward filtering, backward sampling; Scott 2002).
//
//   z_{L-1} ~ alpha_{L-1},   z_{t-1} with probability proportional to alpha_{t-1}(i) exp(phi_t(i, z_t))
//
// Cost a frame and sample: N exps, 2 N numbers read. Limits: none on N or T.
#pragma once
#include "log_space.h"

namespace {

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
