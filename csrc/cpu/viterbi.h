// Viterbi algorithm (Rabiner 1989, section III.B).
//
//   delta_t(j) = max_i [delta_{t-1}(i) + phi_t(i, j)] + e_t(j), re-centred to maximum 0 at each step
//
// No back-pointers are stored: walking back, the best predecessor of one state is found again from delta, N additions a
// frame against N^2 of the sweep, which is then free of comparisons' indices. Ties go to the smallest state.
//
// Where arcs are shared over time several sequences go through a step together, a max-plus product (M x N) by (N x N)
// whose right side is packed once, and the walk back reads the arcs' transpose row by row. Cost a frame: N^2 additions
// and N^2 maxima (2/16 vector operations an arc), 4 N bytes of delta written and read; the arcs come from cache, 4 N^2 / M
// bytes a frame. From 128 states on, arcs that cannot win are left out (pruned_max.h) where that proves cheaper. An addition
// and a maximum share two ports on AMD's Zen 5; the addition goes to the multiplier instead (sum_beside_max), so that a
// step's floor is that of as many fused multiply-adds, 1.95 us a frame for N = 512 at 4.2 GHz (2 ports, 16 lanes).
// On a Zen 3 both pipes of additions and both of products are then busy at once, as they never quite are: an arc of 8 rows
// takes 0.201 ns at best, 0.170 as a product without a maximum; no other tile, nor additions by the adder, came closer.
// Measured on one core of an EPYC (Zen 5), float, B = 8, T = 1000: 0.140 ns a vector of arcs where 0.119 is the floor,
// since four arithmetic operations a cycle leave little room for loads; 60 ns a frame for N = 50, 28 of them the product,
// 195 ns for N = 128 (142), 2.7 us for N = 512 (2.3).
// Where arcs vary over time, a step is a sweep over 4 N^2 bytes that come from memory, which bounds it.
// Limits: none on N or T.
#pragma once
#include "log_space.h"
#include "max_arcs.h"
#include "pruned_max.h"
#include "scaled.h"

namespace {

// acc[m][v] = max_k (x[m][k] + packed[k][v]), for B vectors of packed columns.
template <int M, int B, class Real>
HMM_INLINE void max_product(const Real *const *x, const Real *packed, int64_t K, Vec<Real> (&acc)[M][B]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) acc[m][v] = splat(kNegativeInfinity<Real>);
  const Real *row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) row[m] = x[m];
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++) {
    Vec<Real> a[B];
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) a[v] = packed_vector(packed, K, k, v);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Vec<Real> s = splat(row[m][k]);
#pragma GCC unroll 16
      for (int v = 0; v < B; v++) acc[m][v] = larger(acc[m][v], sum_beside_max(a[v], s));
    }
  }
}

// out[m](j) = max_i (previous[m](i) + phi(i, j)) for M sequences.
template <int M, class Real>
HMM_APART void max_step(const MaxArcs<Real> &arcs, const Real *const *previous, Real *const *out) {
  product_step<M, Real>({0, arcs.N}, out, [&](auto &sums, int m, int64_t j) __attribute__((always_inline)) {
    max_product(previous + m, arcs.from(j), arcs.N, sums);
  });
}

// The same for one sequence and arcs as they came, (N, N). Tells where one is NaN or +inf: maxima forget a NaN, and what
// came before it.
template <int B, class Real>
HMM_INLINE Int<Real> max_columns(const Real *arcs, const Real *delta, int64_t N, int64_t j0, Real *out) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  Vec<Real> m[B];
  Int<Real> wrong[B] = {};
  for (int v = 0; v < B; v++) m[v] = splat(ninf);
  for (int64_t i = 0; i < N; i++)
    for (int v = 0; v < B; v++) {
      const Vec<Real> x = load_part(arcs + i * N + j0 + v * W, N - j0 - v * W, ninf);
      m[v] = larger(m[v], x + delta[i]);
      wrong[v] |= is_bad<Real>(x);
    }
  for (int v = 0; v < B; v++) store(out + j0 + v * W, m[v]), wrong[0] |= wrong[v];
  return wrong[0];
}
template <class Real> bool max_step(const Real *arcs, const Real *delta, int64_t N, Real *out) {
  constexpr int W = kLanes<Real>;
  Int<Real> wrong = {};
  int64_t j = 0;
  for (; N - j > 3 * W; j += 4 * W) wrong |= max_columns<4>(arcs, delta, N, j, out);
  for (; j < N; j += W) wrong |= max_columns<1>(arcs, delta, N, j, out);
  return any<Real>(wrong);
}

// The smallest i whose row(i) + into(i) is the maximum. into is padded to whole vectors.
template <class Real> HMM_INLINE int64_t best_state(const Real *row, const Real *into, int64_t N) {
  constexpr int W = kLanes<Real>;
  Vec<Real> top = splat(kNegativeInfinity<Real>);
  Int<Real> at = {}, index;
  for (int v = 0; v < W; v++) index[v] = v;
  for (int64_t i = 0; i < N; i += W, index += W) {
    const Vec<Real> s = load_part(row + i, N - i, kNegativeInfinity<Real>) + load(into + i);
    at = s > top ? index : at;
    top = larger(top, s);
  }
  return min_of<Real>(top == max_of<Real>(top) ? at : splat_integer<Real>(std::numeric_limits<int32_t>::max()));
}

// Rows of scratch a group needs: one of products a sequence, one for idle products, one of zeros.
constexpr int kViterbiRows = kGroup + 2;

// arcs: null where transitions vary over time; the group has one sequence then. pruned: null where arcs have no bounds.
template <class Real>
void viterbi_group(const hmm_problem &p, const MaxArcs<Real> *arcs, PrunedStep<Real> *pruned, const Group &group,
                   Real *scratch, Real *score, Real *delta, int64_t *states) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  const int64_t N = p.states, padded = round_up(N, kPanel<Real>), longest = group.size ? group.length[0] : 0;
  Real *const next = scratch, *const idle = next + kGroup * padded, *const into = idle + padded;
  double offset[kGroup] = {};
  bool lost[kGroup] = {};  // no path is feasible, or some score is NaN
  Sequence<Real> sequence[kGroup];
  Real *first[kGroup];  // rows of delta
  for (int m = 0; m < group.size; m++)
    sequence[m] = Sequence<Real>(p, group.index[m]), first[m] = delta + group.index[m] * p.time * N;
  for (int64_t t = 0; t < longest; t++) {
    int live[kGroup], n = 0;
    for (int m = 0; m < group.running(t); m++)
      if (!lost[m]) live[n++] = m;
    if (n == 0) break;
    const Real *previous[kGroup];
    Real *out[kGroup];
    for (int k = 0; k < kGroup; k++) {  // rows past the live ones repeat the first
      previous[k] = first[live[k < n ? k : 0]] + (t - (t > 0)) * N;
      out[k] = k < n ? next + k * padded : idle;
    }
    if (t == 0)
      for (int k = 0; k < n; k++) {
        const Sequence<Real> &q = sequence[live[k]];
        const Real top = row_max<Real, Real>(q.initial, N);
        for (int64_t j = 0; j < N; j += W) store(out[k] + j, load_part(q.initial + j, N - j, ninf) - top);
        offset[live[k]] = double(top);
      }
    else if (!arcs) {
      if (max_step(sequence[0].arcs(t), previous[0], N, out[0])) offset[0] = std::numeric_limits<double>::quiet_NaN();
    }
    else {
      if (pruned && pruned->begin())
        pruned->step(live, n, previous, out);
      else
        for_rows(n, [&](auto width) { max_step<decltype(width)::value>(*arcs, previous, out); });
      if (pruned) pruned->finish();
    }
    for (int k = 0; k < n; k++) {
      const int m = live[k];
      const Sequence<Real> &q = sequence[m];
      if (t + kAhead < q.length && p.emission) prefetch<false>(q.frame(t + kAhead), N);
      if (t > 0 && arcs && arcs->invalid) offset[m] = std::numeric_limits<double>::quiet_NaN();
      lost[m] = !centre_row<Real, Real>(out[k], q.emission ? q.frame(t) : nullptr, t == q.length - 1 ? q.final : nullptr,
                                        N, first[m] + t * N, offset[m]);
    }
  }
  for (int m = 0; m < group.size; m++) {  // the maximum of the last delta is 0
    lost[m] |= offset[m] != offset[m];
    score[group.index[m]] = Real(lost[m] && offset[m] == offset[m] ? ninf : offset[m]);
    for (int64_t t = lost[m] ? 0 : group.length[m]; t < p.time; t++) states[group.index[m] * p.time + t] = -1;
  }
  for (int64_t t = longest - 1; t >= 0; t--)
    for (int m = 0; m < group.running(t); m++) {
      if (lost[m]) continue;
      int64_t *const path = states + group.index[m] * p.time + t;
      const Sequence<Real> &q = sequence[m];
      const Real *const row = first[m] + t * N;
      const Real *column = into;
      if (t == q.length - 1) clear(into, padded);
      else if (arcs) column = arcs->columns + path[1] * padded;
      else
        for (int64_t i = 0; i < N; i++) into[i] = q.arcs(t + 1)[i * N + path[1]];
      if (t >= kAhead) prefetch<false>(row - kAhead * N, N);
      path[0] = best_state<Real>(row, column, N);
    }
}

}  // namespace
