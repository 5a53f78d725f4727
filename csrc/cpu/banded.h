// Forward-backward, Viterbi and sampling of chains that move along D diagonals, i -> i + k_d.
//
//   x_t(j)     = log sum_d exp(alpha_{t-1}(j - k_d) + phi_t(d, j - k_d)) + e_t(j) [+ f(j) at the last frame]
//   alpha_t(j) = x_t(j) - M_t,   M_t = max_j x_t(j);          log Z = log sum_j exp(alpha_{L-1}(j)) + sum_t M_t
//   p(z_{t-1} = i, z_t = i + k_d | x) = gamma_t(i + k_d) exp(alpha_{t-1}(i) + phi_t(d, i) + r_t(i + k_d)),
//   r_t(j)     = e_t(j) [+ f(j)] - M_t - alpha_t(j);          summed over d: gamma_{t-1}(i)
//
// (Rabiner 1989, eqs. 20, 27 and 37; Viterbi: max for log-sum-exp, section III.B, no back-pointers.) Exact for any scores
// and any pattern of -inf. Messages and all differences of scores are float64, since in a left-to-right chain the path
// that wins in the end may lie thousands of nats behind for a while; exps and logs are of the scores' type, since their
// arguments are differences near those that matter. A message takes the bytes of two float32, and the backward pass
// needs no second one.
//
// Cost a frame: D N exps forward and D N backward, N logs; about 6 float64 operations an arc in each; 4 D N bytes of
// diagonals (from cache if shared), 8 N of messages and 4 N of emissions, read or written. Bound by arithmetic: at 14
// vector operations an exp, 20 a log and 12 (float64, twice as many vectors) an arc, N = 200 and D = 2 need at least
// 0.15 us forward with 16 lanes and two ports. Measured (AVX-512 EPYC, one thread, float32, T = 3000): 0.37 us forward,
// 0.38 us backward with edges, 0.12 us Viterbi.
// Limits: none on N, T, D or the offsets.
#pragma once
#include <algorithm>

#include "log_space.h"
#include "parallel.h"
#include "viterbi.h"

namespace {

// Lanes v of base[at + v] for which 0 <= at + v < n, `fill` in the others; only the former are read.
template <class Acc, class In> HMM_INLINE Vec<Acc> load_between(const In *base, int64_t at, int64_t n, Acc fill) {
  constexpr int W = kLanes<Acc>;
  if (at >= 0) return load_as(base + at, n - at, fill);
  Vec<Acc> v = splat(fill);
  for (int64_t k = -at; k < W && at + k < n; k++) v[k] = Acc(base[at + k]);
  return v;
}

// Writes all lanes of float64 numbers, rounded to the type of p.
HMM_INLINE void store_as(double *p, Vec<double> v) { store(p, v); }
HMM_INLINE void store_as(float *p, Vec<double> v) {
  typedef float Half __attribute__((vector_size(HMM_VECTOR_BYTES / 2)));
  const Half h = __builtin_convertvector(v, Half);
  std::memcpy(p, &h, sizeof h);
}

// sum += v in float64, for the first n lanes.
template <class Real> HMM_INLINE void add_to(double *sum, int64_t n, Vec<Real> v) {
  constexpr int W = kLanes<double>;
  Real x[kLanes<Real>];
  std::memcpy(x, &v, sizeof v);
  for (int k = 0; k < kLanes<Real>; k += W) store_part(sum + k, n - k, load_part(sum + k, n - k, 0.) + load_as(x + k, W, 0.));
}

// The arcs of one frame along one diagonal: they leave states first..last-1.
template <class Real> struct Diagonal {
  const Real *scores;
  int64_t offset, first, last;

  // alpha(i) + phi(i) of the lanes from i on, -inf where no arc leaves.
  HMM_INLINE Vec<double> leaving(const double *alpha, int64_t i) const {
    const double ninf = kNegativeInfinity<double>;
    return load_between(alpha + first, i - first, last - first, ninf) + load_between(scores + first, i - first, last - first, ninf);
  }
};

template <class Real> struct BandedSequence : Sequence<Real> {
  int64_t D;
  const int64_t *offsets;

  BandedSequence(const hmm_banded &p, int64_t b) : Sequence<Real>(p.chain, b), D(p.diagonals), offsets(p.offsets) {}

  Diagonal<Real> diagonal(int64_t t, int64_t d) const {
    const int64_t N = this->states, k = std::clamp(offsets[d], -N, N);
    return {this->arcs(t) + d * N, k, k < 0 ? -k : 0, k < 0 ? N : N - k};
  }
  bool any_bad_arc(int64_t t) const {
    bool found = false;
    for (int64_t d = 0; d < D; d++) {
      const Diagonal<Real> arcs = diagonal(t, d);
      found |= any_bad(arcs.scores + arcs.first, arcs.last - arcs.first);
    }
    return found;
  }
  // e_t(j) + f(j) of the lanes from j on.
  HMM_INLINE Vec<double> entering(int64_t t, int64_t j) const {
    const double ninf = kNegativeInfinity<double>;
    Vec<double> e = load_as(this->frame(t) + j, this->states - j, ninf);
    if (this->final && t == this->length - 1) e += load_as(this->final + j, this->states - j, ninf);
    return e;
  }
};

// Rows of scratch: two of float64, D and two more of Real.
template <class Real> struct BandedRows {
  const int64_t padded;
  const Scratch<double> wide;
  const Scratch<Real> narrow;
  explicit BandedRows(const hmm_banded &p)
      : padded(round_up(p.chain.states, kLanes<float>)), wide(2 * padded), narrow((p.diagonals + 2) * padded) {}
  bool allocated() const { return wide.data && narrow.data; }
};

// top(j) = max_d [alpha(j - k_d) + phi_t(d, j - k_d)]; unless Max, lse(j) = log sum_d exp(the same - top(j)).
template <bool Max, class Real>
HMM_INLINE void banded_step(const BandedSequence<Real> &q, int64_t t, const double *alpha, int64_t padded, double *top, Real *lse) {
  const double ninf = kNegativeInfinity<double>;
  for (int64_t j = 0; j < q.states; j += kLanes<double>) {
    Vec<double> m = splat(ninf);
    for (int64_t d = 0; d < q.D; d++) {
      const Diagonal<Real> arcs = q.diagonal(t, d);
      m = larger(m, arcs.leaving(alpha, j - arcs.offset));
    }
    store(top + j, m);
    if (Max) continue;
    const Vec<double> origin = m == ninf ? Vec<double>{} : m;
    for (int64_t d = 0; d < q.D; d++) {
      const Diagonal<Real> arcs = q.diagonal(t, d);
      store_as(lse + d * padded + j, arcs.leaving(alpha, j - arcs.offset) - origin);
    }
  }
  for (int64_t j = 0; !Max && j < q.states; j += kLanes<Real>) {
    Vec<Real> sum = {};
    for (int64_t d = 0; d < q.D; d++) sum += exp<Real>(load(lse + d * padded + j));
    store(lse + j, log(sum == Real(0) ? splat(Real(1)) : sum));
  }
}

// alpha (L, N), or Viterbi's delta where Max; centre (L,), M_t, null to skip. Returns log Z, or the best path's score.
template <bool Max, class Real>
double forward_banded(const BandedSequence<Real> &q, double *alpha, double *centre, const BandedRows<Real> &rows) {
  const int64_t N = q.states, L = q.length;
  const double ninf = kNegativeInfinity<double>;
  double offset = 0, *top = rows.wide;
  Real *lse = rows.narrow;
  for (int64_t t = 0; t < L; t++) {
    double *row = alpha + t * N;
    if (t > 0) banded_step<Max>(q, t, row - N, rows.padded, top, lse);
    Vec<double> m = splat(ninf), bad = {};
    for (int64_t j = 0; j < N; j += kLanes<double>) {
      Vec<double> x = t > 0 ? load(top + j) : load_as(q.initial + j, N - j, ninf);
      if (!Max && t > 0) x += load_as(lse + j, N - j, 0.);
      x += q.entering(t, j);
      store_part(row + j, N - j, x);
      m = larger(m, x);
      bad += x - x != x - x && x != ninf ? splat(1.) : Vec<double>{};  // +inf or NaN
    }
    // A maximum forgets a NaN, and what came before it; a sum does not.
    if (Max && t > 0 && q.any_bad_arc(t)) bad += 1.;
    const double middle = sum_of<double>(bad) > 0 ? std::numeric_limits<double>::quiet_NaN() : max_of<double>(m);
    offset += middle;
    if (centre) centre[t] = middle;
    if (!(middle > ninf)) {
      clear(row, (L - t) * N);
      if (centre) clear(centre + t, L - t);
      return offset;
    }
    for (int64_t j = 0; j < N; j += kLanes<double>) store_part(row + j, N - j, load_part(row + j, N - j, ninf) - middle);
  }
  if (Max || L == 0) return offset;
  double total = 0;
  for (int64_t j = 0; j < N; j++) total += std::exp(alpha[(L - 1) * N + j]);
  return offset + std::log(total);
}

// Steps from gamma_t to the edge posteriors of frame t, D rows of N: grad times them into edge, null to skip, and added
// to sum, null to skip. previous(i) is their sum over d.
template <class Real>
HMM_INLINE void banded_posterior(const BandedSequence<Real> &q, int64_t t, const double *alpha, double centre, const Real *gamma,
                                 double grad, const BandedRows<Real> &rows, Real *previous, Real *edge, double *sum) {
  const int64_t N = q.states;
  const double ninf = kNegativeInfinity<double>;
  double *r = rows.wide;
  Real *score = rows.narrow + 2 * rows.padded;
  for (int64_t j = 0; j < N; j += kLanes<double>) {
    const Vec<double> a = load_part(alpha + N + j, N - j, ninf);
    store(r + j, a == ninf ? a : q.entering(t, j) - centre - a);
  }
  for (int64_t d = 0; d < q.D; d++) {
    const Diagonal<Real> arcs = q.diagonal(t, d);
    for (int64_t i = 0; i < N; i += kLanes<double>)
      store_as(score + d * rows.padded + i, arcs.leaving(alpha, i) + load_between(r, i + arcs.offset, N, ninf));
  }
  for (int64_t i = 0; i < N; i += kLanes<Real>) {
    Vec<Real> total = {};
    for (int64_t d = 0; d < q.D; d++) {
      const Vec<Real> g = load_between(gamma, i + q.diagonal(t, d).offset, N, Real(0));
      const Vec<Real> e = g * exp<Real>(load(score + d * rows.padded + i));
      total += e;
      if (edge) store_part(edge + d * N + i, N - i, e * Real(grad));
      if (sum) add_to<Real>(sum + d * N + i, N - i, e);
    }
    store(previous + i, total);
  }
}

// state (L, N) and edge (L-1, D, N) out, grad times posteriors; sum (D, N), those summed over time without grad, is
// added to. edge and sum: null to skip.
template <class Real>
void backward_banded(const BandedSequence<Real> &q, double grad, double log_partition, const double *alpha,
                     const double *centre, const BandedRows<Real> &rows, Real *state, Real *edge, double *sum) {
  const int64_t N = q.states, L = q.length, block = q.D * N;
  if (L == 0) return;
  if (log_partition - log_partition != 0 || grad == 0) {
    const Real fill = log_partition == log_partition ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
    std::fill(state, state + L * N, fill);
    if (edge) std::fill(edge, edge + (L - 1) * block, fill);
    if (sum && fill != fill) std::fill(sum, sum + block, double(fill));
    return;
  }
  Real *gamma = rows.narrow, *previous = gamma + rows.padded;
  for (int64_t j = 0; j < N; j++) previous[j] = Real(std::exp(alpha[(L - 1) * N + j]));
  for (int64_t t = L - 1;; t--) {
    // The mass of gamma is exact: normalising it here keeps rounding errors from adding up over time.
    double total = 0;
    for (int64_t j = 0; j < N; j++) total += double(previous[j]);
    const Real scale = Real(1 / total);
    for (int64_t j = 0; j < N; j++) {
      gamma[j] = previous[j] * scale;
      state[t * N + j] = Real(gamma[j] * grad);
    }
    if (t == 0) return;
    banded_posterior(q, t, alpha + (t - 1) * N, centre[t], gamma, grad, rows, previous,
                     edge ? edge + (t - 1) * block : nullptr, sum);
  }
}

// The best path back from delta: of D predecessors the best, of equal ones the smallest state.
template <class Real> void walk_back(const BandedSequence<Real> &q, const double *delta, int64_t *states) {
  const int64_t N = q.states, L = q.length;
  int64_t best = std::max_element(delta + (L - 1) * N, delta + L * N) - (delta + (L - 1) * N);
  for (int64_t t = L - 1;; t--) {
    states[t] = best;
    if (t == 0) return;
    double top = kNegativeInfinity<double>;
    const int64_t j = best;
    for (int64_t d = 0; d < q.D; d++) {
      const Diagonal<Real> arcs = q.diagonal(t, d);
      const int64_t i = j - arcs.offset;
      if (i < arcs.first || i >= arcs.last) continue;
      const double x = delta[(t - 1) * N + i] + double(arcs.scores[i]);
      if (x > top || (x == top && i < best)) top = x, best = i;
    }
  }
}

// z_{L-1} ~ exp(alpha_{L-1}),  z_{t-1} ~ exp(alpha_{t-1}(i) + phi_t(d, i)) over the D states i from which z_t is reached.
// weight: max(D, N).
template <class Real>
void sample_banded(const BandedSequence<Real> &q, const double *alpha, const Real *uniform, double *weight, int64_t *states) {
  const int64_t N = q.states, L = q.length;
  if (L == 0) return;
  for (int64_t j = 0; j < N; j++) weight[j] = std::exp(alpha[(L - 1) * N + j]);
  states[L - 1] = draw(weight, N, double(uniform[L - 1]));
  for (int64_t t = L - 1; t > 0; t--) {
    double top = kNegativeInfinity<double>;
    for (int64_t d = 0; d < q.D; d++) {
      const Diagonal<Real> arcs = q.diagonal(t, d);
      const int64_t i = states[t] - arcs.offset;
      weight[d] = i < arcs.first || i >= arcs.last ? kNegativeInfinity<double> : alpha[(t - 1) * N + i] + double(arcs.scores[i]);
      top = weight[d] > top ? weight[d] : top;
    }
    for (int64_t d = 0; d < q.D; d++) weight[d] = std::exp(weight[d] - top);
    states[t - 1] = states[t] - q.diagonal(t, draw(weight, q.D, double(uniform[t - 1]))).offset;
  }
}

template <class Real> struct BandedForward : Status {
  const hmm_banded &p;
  const int64_t *order;
  Real *log_partition;
  double *alpha, *centre;
  BandedForward(const hmm_banded &problem, const int64_t *sorted, Real *z, double *a, double *c)
      : p(problem), order(sorted), log_partition(z), alpha(a), centre(c) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.chain.states, T = p.chain.time;
    const BandedRows<Real> rows(p);
    if (!rows.allocated()) return out_of_memory();
    for (int64_t k = worker; k < p.chain.batch; k += workers) {
      const int64_t b = order[k], L = p.chain.lengths[b];
      const BandedSequence<Real> q(p, b);
      log_partition[b] = Real(forward_banded<false>(q, alpha + b * T * N, centre + b * T, rows));
      clear(alpha + (b * T + L) * N, (T - L) * N);  // past the end: the same bits every time
      clear(centre + b * T + L, T - L);
    }
  }
};

template <class Real> struct BandedBackward : Status {
  const hmm_banded &p;
  const int64_t *order;
  const Real *grad, *log_partition;
  const double *alpha, *centre;
  Real *state, *edge;
  double *partial = nullptr;  // (workers, D, N): each worker's share of a gradient summed over the batch
  BandedBackward(const hmm_banded &problem, const int64_t *sorted, const Real *g, const Real *z, const double *a,
                 const double *c, Real *s, Real *e)
      : p(problem), order(sorted), grad(g), log_partition(z), alpha(a), centre(c), state(s), edge(e) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.chain.states, T = p.chain.time, block = p.diagonals * N, steps = T > 0 ? T - 1 : 0;
    const bool varying = p.chain.time_varying;
    const BandedRows<Real> rows(p);
    const Scratch<double> sum(edge && !varying ? block : 0);
    if (!rows.allocated() || !sum.data) return out_of_memory();
    for (int64_t k = worker; k < p.chain.batch; k += workers) {
      const int64_t b = order[k], L = p.chain.lengths[b], used = L > 0 ? L - 1 : 0;
      Real *mine = edge && varying ? edge + b * steps * block : nullptr;
      const bool summed = edge && !varying;
      if (summed) clear(sum.data, block);
      backward_banded(BandedSequence<Real>(p, b), double(grad[b]), double(log_partition[b]), alpha + b * T * N,
                      centre + b * T, rows, state + b * T * N, mine, summed ? sum.data : nullptr);
      clear(state + (b * T + L) * N, (T - L) * N);
      if (mine) clear(mine + used * block, (steps - used) * block);
      for (int64_t n = 0; summed && n < block; n++) {
        const double x = sum[n] * double(grad[b]);
        if (partial) partial[worker * block + n] += x;
        else edge[b * block + n] = Real(x);
      }
    }
  }
};

template <class Real>
int banded_forward(const hmm_banded &p, const int64_t *order, Parallel parallel, Real *log_partition, double *alpha, double *centre) {
  BandedForward<Real> body(p, order, log_partition, alpha, centre);
  return run(parallel, p.chain.batch, p.chain.threads, body);
}

template <class Real>
int banded_backward(const hmm_banded &p, const int64_t *order, Parallel parallel, const Real *grad, const Real *log_partition,
                    const double *alpha, const double *centre, Real *state, Real *edge) {
  BandedBackward<Real> body(p, order, grad, log_partition, alpha, centre, state, edge);
  const bool shared = edge && !p.chain.time_varying && !p.chain.transition_batch_stride;
  const int64_t block = p.diagonals * p.chain.states, workers = std::clamp<int64_t>(p.chain.batch, 1, p.chain.threads);
  const Scratch<double> partial(shared ? workers * block : 0);
  if (!partial.data) return HMM_OUT_OF_MEMORY;
  if (shared) body.partial = partial;
  const int status = run(parallel, p.chain.batch, p.chain.threads, body);
  for (int64_t n = 0; shared && n < block; n++) {
    double total = 0;
    for (int64_t worker = 0; worker < workers; worker++) total += partial[worker * block + n];
    edge[n] = Real(total);
  }
  return status;
}

template <class Real> struct BandedViterbi : Status {
  const hmm_banded &p;
  Real *score;
  double *delta;
  int64_t *states;
  BandedViterbi(const hmm_banded &problem, Real *s, double *d, int64_t *z) : p(problem), score(s), delta(d), states(z) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.chain.states, T = p.chain.time;
    const BandedRows<Real> rows(p);
    if (!rows.allocated()) return out_of_memory();
    for (int64_t b = worker; b < p.chain.batch; b += workers) {
      const BandedSequence<Real> q(p, b);
      const double best = forward_banded<true>(q, delta + b * T * N, nullptr, rows);
      const bool feasible = best - best == 0;
      score[b] = Real(best);
      if (feasible && q.length > 0) walk_back(q, delta + b * T * N, states + b * T);
      std::fill(states + b * T + (feasible ? q.length : 0), states + (b + 1) * T, int64_t(-1));
    }
  }
};

template <class Real> int banded_viterbi(const hmm_banded &p, Parallel parallel, Real *score, double *delta, int64_t *states) {
  BandedViterbi<Real> body(p, score, delta, states);
  return run(parallel, p.chain.batch, p.chain.threads, body);
}

template <class Real> struct BandedSample : Status {
  const hmm_banded &p;
  int64_t samples;
  const Real *log_partition, *uniform;
  const double *alpha;
  int64_t *states;
  BandedSample(const hmm_banded &problem, int64_t s, const Real *z, const double *a, const Real *u, int64_t *out)
      : p(problem), samples(s), log_partition(z), uniform(u), alpha(a), states(out) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.chain.states, T = p.chain.time;
    const Scratch<double> weight(std::max(N, p.diagonals));
    if (!weight.data) return out_of_memory();
    for (int64_t b = worker; b < p.chain.batch; b += workers) {
      const BandedSequence<Real> q(p, b);
      const bool feasible = log_partition[b] - log_partition[b] == 0;
      for (int64_t s = 0; s < samples; s++) {
        const int64_t at = (s * p.chain.batch + b) * T;
        if (feasible) sample_banded(q, alpha + b * T * N, uniform + at, weight.data, states + at);
        std::fill(states + at + (feasible ? q.length : 0), states + at + T, int64_t(-1));
      }
    }
  }
};

template <class Real>
int banded_sample(const hmm_banded &p, Parallel parallel, int64_t samples, const Real *log_partition, const double *alpha,
                  const Real *uniform, int64_t *states) {
  BandedSample<Real> body(p, samples, log_partition, alpha, uniform, states);
  return run(parallel, p.chain.batch, p.chain.threads, body);
}

}  // namespace
