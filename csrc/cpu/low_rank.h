// The two sweeps over time of a chain whose arcs go through R classes, by scaled probabilities (Rabiner 1989, section
// V.A, with a hidden class between two states: Chiu et al. 2021). L (N, R) and R (R, N) come as probabilities;
// what makes the result exact, and what is done with sequences that are lost, is told in
// hmm_speech/hmm/low_rank_ops.py.
//
//   u_t = a_{t-1} L,         a_t = 2^k_t (u_t R) * w_t,       sum_j a_t(j) in [2^18, 2^31)
//   v_t = R (w_t * b_t),     b_{t-1} = L v_t / G_{t-1},       G such that sum_i a_t(i) b_t(i) = 1;    gamma_t = a_t * b_t
//
// Up to 8 sequences go through a half step together: a product (8 x N) by (N x R), then (8 x R) by (R x N), each over
// columns packed once a call. Cost a frame and sequence: 4 N R flops and N exps either way (the weights w_t are made
// again backward); 4 (2 N + R) bytes forward, 4 (3 N) backward, 4 (N + R) more where counts are wanted, which the
// caller gets as two products over all frames (4 N R flops). Factors: 8 N R bytes a step, from the second cache at N =
// 1024, R = 64.
// Floor on one core (AMD EPYC, Zen 5, AVX-512, 234 GFLOP/s), N = 1024, R = 64, B = 8, T = 300: 2.7 ms of arithmetic
// and 0.6 of memory (20 MB at 36 GB/s) a sweep. Measured while other work ran beside: forward 5.0 ms (127 GFLOP/s),
// backward 6.1, 7.5 with what the counts need; the counts, in torch, 7.5 more for 2.7 of arithmetic.
// Limits: none on N, R or T.
#pragma once
#include <algorithm>
#include <optional>

#include "grouping.h"
#include "parallel.h"

namespace {

// Both factors packed for one direction, and what `weigh` asks of a chain.
template <class Real> struct TwoFactors {
  int64_t N, R;
  Scratch<Real> into, out_of, shift;
  static constexpr double top = 0;  // the caller adds max c
  bool wide;

  // Sequence b's. Forward: L and R. Backward: R and L, transposed.
  TwoFactors(const hmm_low_rank &p, int64_t b, bool backward)
      : N(p.chain.states), R(p.rank), into(N * round_up(R, kPanel<Real>)), out_of(R * round_up(N, kPanel<Real>)),
        shift(round_up(N, kPanel<Real>)), wide(p.wide) {
    if (!allocated()) return;
    const Real *rows = Sequence<Real>(p.chain, b).transition, *first = backward ? rows + R * N : rows;
    pack_columns(first);
    pack_rows(backward ? rows : rows + R * N);
    const Real *c = (const Real *)p.shift + b * p.shift_batch_stride;
    std::copy(c, c + N, shift.data);
  }
  bool allocated() const { return into.data && out_of.data && shift.data; }
  Panels<Real> states_to_classes() const { return {into, N, R}; }
  Panels<Real> classes_to_states() const { return {out_of, R, N}; }

 private:
  // x (R, N): its transpose, (N, R), by squares of vectors.
  void pack_columns(const Real *x) {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    Vec<Real> square[W];
    for (int64_t r = 0; r < R; r += W)
      for (int64_t i = 0; i < N; i += W) {
        for (int v = 0; v < W; v++) square[v] = r + v < R ? load_part(x + (r + v) * N + i, N - i, Real(0)) : Vec<Real>{};
        transpose<Real>(square);
        for (int v = 0; v < W && i + v < N; v++) store(into + r / P * P * N + (i + v) * P + r % P, square[v]);
      }
  }
  void pack_rows(const Real *x) {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    for (int64_t j = 0; j < N; j += W)
      for (int64_t r = 0; r < R; r++) store(out_of + j / P * P * R + r * P + j % P, load_part(x + r * N + j, N - j, Real(0)));
  }
};

// Scratch of one worker: rows of states and of classes for every sequence of a group, and a few to spare.
template <class Real> struct LowRankRows {
  static constexpr int kSpare = 4;
  int64_t states, classes;  // a row's length
  Scratch<Real> x, y, spare, between;
  explicit LowRankRows(const hmm_low_rank &p)
      : states(round_up(p.chain.states, kPanel<Real>)), classes(round_up(p.rank, kPanel<Real>)), x(kGroup * states),
        y(kGroup * states), spare(kSpare * std::max(states, classes)), between(kGroup * classes) {}
  bool allocated() const { return x.data && y.data && spare.data && between.data; }
  Real *more(int k) const { return spare + k * std::max(states, classes); }
};

template <class Real>
void low_rank_forward_group(const hmm_low_rank &p, const TwoFactors<Real> &factors, const Group &group,
                            const LowRankRows<Real> &rows, Real *alpha, Real *half, Ends &ends) {
  const int64_t N = factors.N, R = factors.R, T = p.chain.time;
  const Panels<Real> into = factors.states_to_classes(), out_of = factors.classes_to_states();
  const Real *zeros = rows.more(0), *previous[kGroup], *classes[kGroup], *w[kGroup], *one[kGroup];
  Real *idle = rows.more(1), *spare = rows.more(2), *ones = rows.more(3), *out[kGroup], *between[kGroup];
  double total[kGroup], unused[kGroup];
  bool *flag = ends.lost;
  ends = {};
  std::fill(ones, ones + R, Real(1));
  for (int64_t t = 0; t < group.length[0]; t++) {
    const int running = group.running(t);
    if (std::all_of(flag, flag + running, [](bool lost) { return lost; })) break;
    for (int m = 0; m < kGroup; m++) {  // the rows past the running ones repeat the first, with weight 0, into `idle`
      const int64_t row = group.index[m < running ? m : 0] * T + t;
      previous[m] = alpha + (row - 1) * N;
      out[m] = m < running ? alpha + row * N : idle;
      between[m] = m < running ? half + row * R : idle;
      classes[m] = half + row * R;
      w[m] = m < running ? rows.x + m * rows.states : zeros;
      one[m] = m < running ? ones : zeros;
    }
    for (int m = 0; m < running; m++) {
      const int64_t ahead = t + kAhead < group.length[m] ? kAhead * N : 0;
      prefetch<false>((const Real *)p.chain.emission + (group.index[m] * T + t) * N + ahead, N);
      prefetch<true>(out[m] + ahead, N);
      const Sequence<Real> q(p.chain, group.index[m]);
      Real centre;
      ends.taken[m] += weigh<true>(q, factors, t, centre, rows.x + m * rows.states, spare);
      if (t == 0) {
        first_message<Real>(q, p.mixing, false, w[m], spare, out[m], total[m], ends.taken[m], flag[m]);
        clear(between[m], R);
      }
    }
    if (t > 0)
      for_rows(running, [&](auto width) {
        constexpr int M = decltype(width)::value;
        forward_step<M, Real>(into, p.mixing, previous, one, between, unused, flag);
        forward_step<M, Real>(out_of, p.mixing, classes, w, out, total, flag);
      });
    for (int m = 0; m < running; m++) {
      if (!(total[m] >= p.least)) flag[m] = true;  // infeasible, lost or NaN: the caller finds out which
      else if (!stands(total[m]))
        ends.taken[m] -= rescale(out[m], total[m], N, N * R) * kLn2;
      if (t == group.length[m] - 1) ends.total[m] = total[m];
    }
  }
}

// y = x * scale for n numbers; x is padded to whole vectors.
template <class Real> HMM_INLINE void scaled_row(const Real *x, Real scale, int64_t n, Real *y) {
  for (int64_t j = 0; j < n; j += kLanes<Real>) store_part(y + j, n - j, load(x + j) * scale);
}

template <class Real> struct LowRankPosteriors {
  Real *state, *classes, *leaving;  // the last two null to skip

  // All 0 from frame `begin` of sequence b on; `leaving` before frame 1, too.
  void clear_from(const hmm_low_rank &p, int64_t b, int64_t begin) const {
    const int64_t N = p.chain.states, R = p.rank, T = p.chain.time;
    clear(state + (b * T + begin) * N, (T - begin) * N);
    if (!classes) return;
    clear(classes + (b * T + begin) * R, (T - begin) * R);
    clear(leaving + (b * T + begin) * N, (T - begin) * N);
    if (begin) clear(leaving + b * T * N, N);
  }
};

template <class Real>
void low_rank_backward_group(const hmm_low_rank &p, const TwoFactors<Real> &factors, const Group &group,
                             const LowRankRows<Real> &rows, const Real *grad, const Real *alpha,
                             const LowRankPosteriors<Real> &found) {
  const int64_t N = factors.N, R = factors.R, T = p.chain.time;
  const Panels<Real> into = factors.states_to_classes(), out_of = factors.classes_to_states();
  Real *w = rows.more(0), *spare = rows.more(1), *idle = rows.more(2), *idle_classes = rows.more(3);
  for (int64_t t = group.length[0] - 1; t >= 0; t--) {
    const int running = group.running(t), entered = group.running(t + 1);
    const Real *next[kGroup], *v[kGroup];
    Real *beta[kGroup], *between[kGroup];
    for (int m = 0; m < kGroup; m++) {
      next[m] = rows.x + (m < entered ? m : 0) * rows.states;
      beta[m] = m < entered ? rows.y + m * rows.states : idle;
      between[m] = m < entered ? rows.between + m * rows.classes : idle_classes;
      v[m] = rows.between + (m < entered ? m : 0) * rows.classes;
    }
    if (entered)
      for_rows(entered, [&](auto width) {
        constexpr int M = decltype(width)::value;
        backward_step<M, Real>(into, next, between);
        backward_step<M, Real>(out_of, v, beta);
      });
    for (int m = 0; m < running; m++) {
      const int64_t b = group.index[m], row = b * T + t, ahead = t >= kAhead ? kAhead * N : 0;
      const Real *a = alpha + row * N;
      prefetch<false>(a - ahead, N);
      prefetch<false>((const Real *)p.chain.emission + row * N - ahead, N);
      prefetch<true>(found.state + row * N - ahead, N);
      Real *const y = rows.y + m * rows.states, *const product = rows.x + m * rows.states;
      if (m >= entered) std::fill(y, y + N, Real(1));
      const Real inverse = Real(1) / posterior_mass(a, y, N);
      if (found.classes && m < entered) {
        scaled_row(v[m], inverse, R, found.classes + row * R);
        scaled_row(product, inverse, N, found.leaving + (row + 1) * N);
      } else if (found.classes) clear(found.classes + row * R, R);
      Real centre;
      if (t) weigh<true>(Sequence<Real>(p.chain, b), factors, t, centre, w, spare);
      posterior_row<Real>(a, y, t ? w : nullptr, grad[b], inverse, N, found.state + row * N, product);
    }
  }
}

// Calls walk(factors, group, rows) for this worker's groups; false where memory ran out.
template <class Real, class Walk>
bool low_rank_groups(const hmm_low_rank &p, const Grouping &grouping, const TwoFactors<Real> *shared, bool backward,
                     int worker, Walk walk) {
  const LowRankRows<Real> rows(p);
  return rows.allocated() && grouping.share(worker, [&](const Group &group, int64_t, int) {
    if (shared) return walk(*shared, group, rows), true;
    const TwoFactors<Real> own(p, group.index[0], backward);
    if (own.allocated()) walk(own, group, rows);
    return own.allocated();
  });
}

template <class Real> struct LowRankForward : Status {
  const hmm_low_rank &p;
  Grouping grouping;
  const TwoFactors<Real> *shared = nullptr;
  double *log_partition;
  Real *alpha, *half;
  int32_t *method;
  LowRankForward(const hmm_low_rank &problem, const Grouping &g) : p(problem), grouping(g) {}

  void operator()(int worker, int) {
    const FlushToZero flush;
    const int64_t N = p.chain.states, T = p.chain.time;
    const auto walk = [&](const TwoFactors<Real> &factors, const Group &group, const LowRankRows<Real> &rows) {
      Ends ends;
      low_rank_forward_group(p, factors, group, rows, alpha, half, ends);
      for (int m = 0; m < group.size; m++) {
        const int64_t b = group.index[m], L = ends.lost[m] ? 0 : group.length[m];
        method[b] = ends.lost[m] ? HMM_REDONE : HMM_SCALED;
        log_partition[b] = L ? ends.taken[m] + std::log(ends.total[m]) : 0;
        clear(alpha + (b * T + L) * N, (T - L) * N);
        clear(half + (b * T + L) * p.rank, (T - L) * p.rank);
      }
    };
    if (!low_rank_groups<Real>(p, grouping, shared, false, worker, walk)) out_of_memory();
  }
};

template <class Real> struct LowRankBackward : Status {
  const hmm_low_rank &p;
  Grouping grouping;
  const TwoFactors<Real> *shared = nullptr;
  const Real *grad, *alpha;
  const int32_t *method;
  LowRankPosteriors<Real> found;
  LowRankBackward(const hmm_low_rank &problem, const Grouping &g) : p(problem), grouping(g) {}

  void operator()(int worker, int) {
    const FlushToZero flush;
    const auto walk = [&](const TwoFactors<Real> &factors, const Group &group, const LowRankRows<Real> &rows) {
      Group kept;
      for (int m = 0; m < group.size; m++) {
        const int64_t b = group.index[m];
        const bool wanted = method[b] == HMM_SCALED && grad[b] != 0;
        found.clear_from(p, b, wanted ? group.length[m] : 0);
        if (wanted) kept.add(b, 0, group.length[m], false);
      }
      if (kept.size) low_rank_backward_group(p, factors, kept, rows, grad, alpha, found);
    };
    if (!low_rank_groups<Real>(p, grouping, shared, true, worker, walk)) out_of_memory();
  }
};

// Runs a body over groups of sequences, those of shared factors together; these are packed once.
template <class Body, class Real>
int run_low_rank(const hmm_low_rank &p, Parallel parallel, bool backward, Body &body, const TwoFactors<Real> *&shared) {
  if (!p.chain.batch) return HMM_OK;
  const FlushToZero flush;
  std::optional<TwoFactors<Real>> both;
  if (!p.chain.transition_batch_stride) {
    both.emplace(p, 0, backward);
    if (!both->allocated()) return HMM_OUT_OF_MEMORY;
    shared = &*both;
  }
  return run(parallel, body.grouping.workers, p.chain.threads, body);
}

template <class Real>
int low_rank_forward(const hmm_low_rank &p, const int64_t *order, Parallel parallel, double *log_partition, Real *alpha,
                     Real *half, int32_t *method) {
  LowRankForward<Real> body(p, Grouping(p.chain, order, !p.chain.transition_batch_stride, false));
  body.log_partition = log_partition, body.alpha = alpha, body.half = half, body.method = method;
  return run_low_rank(p, parallel, false, body, body.shared);
}

template <class Real>
int low_rank_backward(const hmm_low_rank &p, const int64_t *order, Parallel parallel, const Real *grad, const Real *alpha,
                      const int32_t *method, Real *state, Real *classes, Real *leaving) {
  LowRankBackward<Real> body(p, Grouping(p.chain, order, !p.chain.transition_batch_stride, false));
  body.grad = grad, body.alpha = alpha, body.method = method, body.found = {state, classes, leaving};
  return run_low_rank(p, parallel, true, body, body.shared);
}

}  // namespace
