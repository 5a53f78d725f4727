// How posteriors change with the scores: the Hessian of log Z, times a vector v, for the second backward pass. In log space.
//
// Let V(z) be the sum of v over what a path z uses (v_t(j) at its states, u(i, j) at its arcs). The derivative of a
// posterior along v is a covariance, p(f | x) (E[V | f, x] - E[V | x]) (an expectation semiring: Eisner 2002; Li and
// Eisner 2009), and E[V | z_t, x] splits into what precedes t and what follows it:
//
//   a_t(j)     = v_t(j) + sum_i p(z_{t-1} = i | z_t = j, x_0..t) (a_{t-1}(i) + u_t(i, j))
//   b_{t-1}(i) = sum_j p(z_t = j | z_{t-1} = i, x) (u_t(i, j) + v_t(j) + b_t(j))
//   state_t(i)   = gamma_t(i) (a_t(i) + b_t(i) - mean)
//   edge_t(i, j) = xi_t(i, j) (a_{t-1}(i) + u_t(i, j) + v_t(j) + b_t(j) - mean),   each mean under its posterior
//
// Means are taken frame by frame, so that constants in a_t and b_t cancel: both are re-centred at each step, and rounding
// does not grow with the sum of v over T frames.
//
// Cost a step, N^2 arcs: three sweeps with one exp each (the forward pass again, a, and b with xi), about 60 vector
// operations for 16 arcs; 4 N^2 bytes of arcs a sweep, from cache where they are shared. Memory: 3 L N numbers a worker, and
// N^2 for xi. Limits: none on N or T. At 60 / 16 operations an arc and two a cycle, 20 M arcs (B=8, N=50, T=1000) take 38 M
// cycles, some 10 ms; measured 17.6 ms on one core (AMD EPYC, AVX-512): columns 50 to 63 are idle lanes, 1.3 of the factor.
#pragma once
#include "log_space.h"
#include "parallel.h"

namespace {

// The vector v: state (L, N), and edge (N, N) moving by edge_stride a frame, or null for 0.
template <class Real> struct Direction {
  const Real *state, *edge;
  int64_t edge_stride;
  const Real *arcs(int64_t t) const { return edge ? edge + (t - 1) * edge_stride : nullptr; }
};

// Subtracts x at the largest weight from x: a constant that cancels later.
template <class Real> HMM_INLINE void recentre(Real *x, const Real *weight, int64_t N) {
  int64_t best = 0;
  for (int64_t j = 1; j < N; j++)
    if (weight[j] > weight[best]) best = j;
  const Real middle = x[best];
  for (int64_t j = 0; j < N; j++) x[j] -= middle;
}

// a: (L, N) out, as above. safe: N padded to whole vectors, scratch; sum the same.
template <class Real>
void tangent_forward(const Sequence<Real> &q, const Direction<Real> &v, const Real *alpha, const Real *norm,
                     const Real *centre, Real *a, Real *safe, Real *sum) {
  constexpr int W = kLanes<Real>;
  const int64_t N = q.states;
  for (int64_t j = 0; j < N; j++) a[j] = alpha[j] == kNegativeInfinity<Real> ? Real(0) : v.state[j];
  recentre(a, alpha, N);
  for (int64_t t = 1; t < q.length; t++) {
    const Real *before = a + (t - 1) * N, *from = alpha + (t - 1) * N, *row = norm + t * N, *arcs = q.arcs(t), *u = v.arcs(t);
    for (int64_t j = 0; j < N; j++) safe[j] = row[j] == kNegativeInfinity<Real> ? std::numeric_limits<Real>::max() / 4 : row[j];
    for (int64_t j = 0; j < N; j += W) {
      Vec<Real> total = {};
      const Vec<Real> n = load(safe + j);
      for (int64_t i = 0; i < N; i++) {
        const Vec<Real> score = ((load_part(arcs + i * N + j, N - j, kNegativeInfinity<Real>) - centre[t]) - n) + from[i];
        Vec<Real> x = splat(before[i]);
        if (u) x += load_part(u + i * N + j, N - j, Real(0));
        total += exp<Real>(score) * x;
      }
      store(sum + j, total);
    }
    Real *now = a + t * N;
    for (int64_t j = 0; j < N; j++)
      now[j] = alpha[t * N + j] == kNegativeInfinity<Real> ? Real(0) : sum[j] + v.state[t * N + j];
    recentre(now, alpha + t * N, N);
  }
}

// xi(i, j) into the rows of xi (padded), its row sums into previous, and sum_j xi(i, j) (u(i, j) + after(j)) into mass.
template <class Real>
HMM_INLINE void tangent_step(const Real *arcs, const Real *u, const Real *alpha, const Real *norm, Real C, const Real *gamma,
                             const Real *after, int64_t N, int64_t padded, Real *xi, Real *previous, Real *mass) {
  constexpr int W = kLanes<Real>;
  for (int64_t i = 0; i < N; i++) {
    Vec<Real> total = {}, weighted = {};
    for (int64_t j = 0; j < N; j += W) {
      const Vec<Real> arc = load_part(arcs + i * N + j, N - j, kNegativeInfinity<Real>);
      const Vec<Real> e = load(gamma + j) * exp<Real>(((arc - C) - load(norm + j)) + alpha[i]);
      Vec<Real> x = load(after + j);
      if (u) x += load_part(u + i * N + j, N - j, Real(0));
      store(xi + i * padded + j, e);
      total += e;
      weighted += e * x;
    }
    previous[i] = sum_of<Real>(total);
    mass[i] = sum_of<Real>(weighted);
  }
}

// edge(i, j) = or += grad xi(i, j) (before(i) + u(i, j) + after(j)).
template <bool Add, class Real>
HMM_INLINE void tangent_edges(const Real *xi, const Real *u, const Real *before, const Real *after, Real grad, int64_t N,
                              int64_t padded, Real *edge) {
  constexpr int W = kLanes<Real>;
  for (int64_t i = 0; i < N; i++)
    for (int64_t j = 0; j < N; j += W) {
      Vec<Real> x = load(after + j) + before[i];
      if (u) x += load_part(u + i * N + j, N - j, Real(0));
      x = load(xi + i * padded + j) * x * grad;
      Real *out = edge + i * N + j;
      if constexpr (Add) x += load_part(out, N - j, Real(0));
      store_part(out, N - j, x);
    }
}

// Rows of N padded to whole vectors that a worker needs besides alpha, norm, a (L, N each), centre (L) and xi.
constexpr int kTangentRows = 7;

// state (L, N) is written; edge (null to skip) is written with a stride of N^2 a frame, or added to with stride 0.
// Returns E[V], to be summed over sequences by who asked.
template <class Real>
double tangent_sequence(const Sequence<Real> &q, const Direction<Real> &v, Real grad, double log_partition, const Real *alpha,
                        const Real *norm, const Real *centre, const Real *a, Real *state, Real *edge, int64_t edge_stride,
                        Real *xi, Real *rows) {
  const int64_t N = q.states, L = q.length, padded = round_up(N, 4 * kLanes<Real>);
  Real *gamma = rows, *safe = rows + padded, *after = rows + 2 * padded, *b = rows + 3 * padded, *mass = rows + 4 * padded,
       *before = rows + 5 * padded, *previous = rows + 6 * padded;
  clear(rows, kTangentRows * padded);
  double expected = 0;
  for (int64_t j = 0; j < N; j++) gamma[j] = std::exp(alpha[(L - 1) * N + j]);
  for (int64_t t = L - 1;; t--) {
    double total = 0, mean = 0;
    for (int64_t j = 0; j < N; j++) total += double(gamma[j]);
    for (int64_t j = 0; j < N; j++) gamma[j] = Real(double(gamma[j]) / total);
    for (int64_t j = 0; j < N; j++)
      if (gamma[j] > 0) {
        expected += double(gamma[j]) * double(v.state[t * N + j]);
        mean += double(gamma[j]) * (double(a[t * N + j]) + double(b[j]));
      }
    for (int64_t j = 0; j < N; j++)
      state[t * N + j] = gamma[j] > 0 ? grad * gamma[j] * Real(double(a[t * N + j]) + double(b[j]) - mean) : Real(0);
    if (t == 0) return expected;
    const Real *u = v.arcs(t);
    for (int64_t j = 0; j < N; j++) {
      safe[j] = gamma[j] > 0 ? norm[t * N + j] : std::numeric_limits<Real>::max() / 4;
      after[j] = gamma[j] > 0 ? v.state[t * N + j] + b[j] : Real(0);
    }
    tangent_step(q.arcs(t), u, alpha + (t - 1) * N, safe, centre[t], gamma, after, N, padded, xi, previous, mass);
    std::memcpy(gamma, previous, N * sizeof(Real));
    double arcs_mass = 0, arcs_mean = 0;
    for (int64_t i = 0; i < N; i++) {
      b[i] = gamma[i] > 0 ? mass[i] / gamma[i] : Real(0);
      if (gamma[i] > 0) arcs_mass += double(gamma[i]), arcs_mean += double(gamma[i]) * double(a[(t - 1) * N + i]) + double(mass[i]);
    }
    if (u)
      for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
          const Real x = xi[i * padded + j];
          if (x > 0) expected += double(x) * double(u[i * N + j]) / arcs_mass;
        }
    if (edge) {
      Real *out = edge + (t - 1) * edge_stride;
      const Real share = Real(double(grad) / arcs_mass);
      for (int64_t i = 0; i < N; i++) before[i] = gamma[i] > 0 ? Real(double(a[(t - 1) * N + i]) - arcs_mean / arcs_mass) : Real(0);
      if (edge_stride) tangent_edges<false>(xi, u, before, after, share, N, padded, out);
      else tangent_edges<true>(xi, u, before, after, share, N, padded, out);
    }
    recentre(b, gamma, N);
  }
}

template <class Real> struct Tangent : Status {
  const hmm_problem &p;
  const Real *grad, *direction_state, *direction_edge;
  Real *expected, *state, *edge;
  Real *partial;  // (workers, N, N) where the edges of all sequences share one block
  explicit Tangent(const hmm_problem &problem) : p(problem) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states, T = p.time, padded = round_up(N, 4 * kLanes<Real>);
    const bool shared = !p.time_varying && !p.transition_batch_stride;
    Scratch<Real> messages(3 * T * N + T), xi(N * padded), rows(kTangentRows * padded);
    if (!messages.data || !xi.data || !rows.data) return out_of_memory();
    Real *alpha = messages, *norm = alpha + T * N, *a = norm + T * N, *centre = a + T * N;
    for (int64_t b = worker; b < p.batch; b += workers) {
      const Sequence<Real> q(p, b);
      const int64_t block = p.time_varying ? (T > 1 ? (T - 1) * N * N : 0) : N * N, stride = p.time_varying ? N * N : 0;
      const int64_t at = shared ? 0 : b * block;
      const Direction<Real> v{direction_state + b * T * N, direction_edge ? direction_edge + at : nullptr, stride};
      Real *mine = !edge ? nullptr : shared ? partial + worker * N * N : edge + at, *out = state + b * T * N;
      clear(out, T * N);
      if (mine && !shared) clear(mine, block);
      expected[b] = 0;
      if (q.length == 0) continue;
      const double z = forward_log_space<Real, Real>(q, alpha, norm, centre, rows);
      if (z == -std::numeric_limits<double>::infinity()) continue;
      if (!std::isfinite(z)) {
        expected[b] = std::numeric_limits<Real>::quiet_NaN();
        for (int64_t k = 0; k < q.length * N; k++) out[k] = expected[b];
        for (int64_t k = 0; mine && k < (p.time_varying ? (q.length - 1) * N * N : N * N); k++) mine[k] = expected[b];
        continue;
      }
      tangent_forward(q, v, (const Real *)alpha, (const Real *)norm, (const Real *)centre, a, (Real *)rows, (Real *)rows + padded);
      expected[b] = Real(tangent_sequence(q, v, grad[b], z, (const Real *)alpha, (const Real *)norm, (const Real *)centre,
                                          (const Real *)a, out, mine, stride, (Real *)xi, (Real *)rows));
    }
  }
};

template <class Real>
int tangent(const hmm_problem &p, Parallel parallel, const Real *grad, const Real *direction_state, const Real *direction_edge,
            Real *expected, Real *state, Real *edge) {
  const int64_t N = p.states, workers = p.batch < p.threads ? p.batch : p.threads;
  const bool shared = !p.time_varying && !p.transition_batch_stride;
  const Scratch<Real> partial(edge && shared ? workers * N * N : 0);
  if (!partial.data) return HMM_OUT_OF_MEMORY;
  Tangent<Real> body(p);
  body.grad = grad, body.direction_state = direction_state, body.direction_edge = direction_edge;
  body.expected = expected, body.state = state, body.edge = edge, body.partial = partial;
  const int status = p.batch ? run(parallel, p.batch, p.threads, body) : int(HMM_OK);
  if (edge && shared) clear(edge, N * N);
  for (int64_t k = 0; edge && shared && k < workers * N * N; k++) edge[k % (N * N)] += partial[k];
  return status;
}

}  // namespace
