// Log space over the K slots of each frame, in float64: forward-backward of what scaled probabilities could not certify
// (the recursions are those of log_space.h), and Viterbi and sampling of chains of which K of the N states emit a frame
// (viterbi.h). Forward-backward and sampling gather blocks of scores frame by frame, K^2 reads; Viterbi reads them in place
// between two runs: K^2 additions, maxima, comparisons and choices a frame. It keeps where each slot came from, K numbers a
// frame: a walk back over scores would read K lines a frame again, each from another page (1.4 times as slow at K = 10).
// For 83,000 frames of K = 10 on one core of an EPYC (Zen 3, AVX2) it takes .6 to .8 of what the forward pass does.
// Limits: none on N, T or K.
#pragma once
#include "active_blocks.h"
#include "sampling.h"

namespace {

// The messages of one sequence, and what reads its scores slot by slot.
template <class Real> struct ActiveLog {
  const ActiveSequence<Real> q;
  const int64_t K, padded;
  Scratch<double> alpha, norm, centre, rows;
  Scratch<Real> block, slots;
  double log_partition = 0;

  explicit ActiveLog(const ActiveSequence<Real> &sequence)
      : q(sequence), K(q.slots), padded(round_up(K, 4 * kLanes<double>)), alpha(q.length * K), norm(q.length * K),
        centre(q.length), rows(3 * padded), block(K * K), slots(3 * K) {
    if (allocated()) log_partition = forward();
  }
  bool allocated() const { return alpha.data && norm.data && centre.data && rows.data && block.data && slots.data; }

  // Scores of the arcs from frame t-1 to frame t, (K, K).
  const Real *arcs(const Frame<Real> &from, const Frame<Real> &to) {
    gather_block(q.transition, q.states, from, to, kNegativeInfinity<Real>, (Real *)block, K, K);
    return block;
  }

  // As backward_log_space: state (L, K) is written, counts (N, N), null to skip, are added to.
  bool backward(double grad, Real *state, Real *counts) {
    const int64_t L = q.length;
    const bool nan = log_partition != log_partition || log_partition == std::numeric_limits<double>::infinity();
    Scratch<double> edges(counts ? K * K : 0);
    if (!edges.data) return false;
    if (grad == 0 || nan || log_partition == -std::numeric_limits<double>::infinity()) {
      const double fill = nan ? std::numeric_limits<double>::quiet_NaN() : 0;
      for (int64_t k = 0; k < L * K; k++) state[k] = Real(fill);
      for (int64_t k = 0; counts && k < K * K; k++) edges[k] = fill;
      for (int64_t t = 1; nan && counts && t < L; t++) count(q.frame(t - 1), q.frame(t), edges, 1, counts);
      return true;
    }
    double *gamma = rows, *safe = gamma + padded, *previous = safe + padded;
    clear(gamma, padded);
    clear(safe, padded);
    for (int64_t j = 0; L > 0 && j < K; j++) previous[j] = std::exp(alpha[(L - 1) * K + j]);
    for (int64_t t = L - 1; t >= 0; t--) {
      double total = 0;
      for (int64_t j = 0; j < K; j++) total += previous[j];
      for (int64_t j = 0; j < K; j++) state[t * K + j] = Real((gamma[j] = previous[j] / total) * grad);
      if (t == 0) break;
      const Frame<Real> from = q.frame(t - 1), to = q.frame(t);
      for (int64_t j = 0; j < K; j++) safe[j] = gamma[j] == 0 ? std::numeric_limits<double>::max() / 4 : norm[t * K + j];
      posterior_step<false>(arcs(from, to), alpha + (t - 1) * K, (const double *)safe, centre[t], (const double *)gamma, K,
                            previous, counts ? (double *)edges : nullptr);
      if (counts) count(from, to, edges, grad, counts);
    }
    return true;
  }

 private:
  // counts(i, j) += grad edges(i, j) for the states of two frames.
  void count(const Frame<Real> &from, const Frame<Real> &to, const double *edges, double grad, Real *counts) const {
    for (int64_t i = 0; i < from.count; i++)
      for (int64_t j = 0; from.id[i] >= 0 && j < to.count; j++)
        if (to.id[j] >= 0) counts[from.id[i] * q.states + to.id[j]] += Real(edges[i * K + j] * grad);
  }

  // As forward_log_space.
  double forward() {
    constexpr int W = kLanes<double>;
    constexpr double ninf = kNegativeInfinity<double>;
    double offset = 0, *maximum = rows, *sum = maximum + padded;
    Frame<Real> from;
    for (int64_t t = 0; t < q.length; t++) {
      const Frame<Real> to = q.frame(t);
      Real *const score = slots, *const ends = score + K;
      double *row = norm + t * K;
      gather_scores(to, K, score);
      if (t == 0) {
        gather_row(q.initial, to, K, kNegativeInfinity<Real>, ends);
        centre[0] = row_max<Real, double>(ends, K);
        for (int64_t j = 0; j < K; j++) row[j] = double(ends[j]) - centre[0];
      } else {
        log_sum_step(arcs(from, to), alpha + (t - 1) * K, K, maximum, sum);
        centre[t] = row_max<double, double>(maximum, K);
        for (int64_t j = 0; j < K; j += W) {
          const Vec<double> c = load(maximum + j), s = load(sum + j);
          store_part(row + j, K - j, s == 0. ? c : (c - centre[t]) + log(s == 0. ? splat(1.) : s));
        }
      }
      const bool end = q.final && t == q.length - 1;
      if (end) gather_row(q.final, to, K, kNegativeInfinity<Real>, ends);
      offset += centre[t];
      if (!centre_row<Real, double>(row, score, end ? ends : nullptr, K, alpha + t * K, offset))
        return offset == offset ? ninf : offset;
      from = to;
    }
    double total = 0;
    for (int64_t j = 0; q.length > 0 && j < K; j++) total += std::exp(alpha[(q.length - 1) * K + j]);
    return q.length > 0 ? offset + std::log(total) : 0;
  }
};

// out(j) = max_i [delta(i) + phi(i, j)] and back(j) = the first i that attains it, for B vectors of columns from j, of which
// those of `used` count and the others are -inf. Returns where one of phi is NaN or +inf: maxima forget a NaN, and what came
// before it. back is kept in the bits of numbers.
template <int B, class Real>
HMM_INLINE Int<Real> max_slots(const Real *arcs, int64_t pitch, const Real *delta, int64_t rows, int64_t j, const Real *used,
                               Real *out, Real *back) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  Vec<Real> best[B];
  Int<Real> at[B] = {}, bad[B] = {}, index = {}, wrong = {};
  for (int v = 0; v < B; v++) best[v] = splat(ninf);
  const Real *row = arcs + j;
  for (int64_t i = 0; i < rows; i++, row += pitch, index += 1)
    for (int v = 0; v < B; v++) {
      const Vec<Real> x = load(row + v * W), s = x + splat(delta[i]);
      at[v] = s > best[v] ? index : at[v];
      best[v] = larger(best[v], s);
      bad[v] |= is_bad<Real>(x);
    }
  for (int v = 0; v < B; v++) {
    const Int<Real> counts = load(used + j + v * W) > Real(0);
    wrong |= bad[v] & counts;
    store(out + j + v * W, counts ? best[v] : splat(ninf));
    store(back + j + v * W, (Vec<Real>)at[v]);
  }
  return wrong;
}

// Rows of Viterbi's scratch, padded to whole vectors, and blocks of arcs of which whole vectors can be read.
template <class Real> struct ActivePaths {
  const int64_t width;
  Scratch<Real> score, ends, row, used, delta, back, block;
  int64_t count = -1;  // of `used`: ones, and zeros past it

  explicit ActivePaths(int64_t K)
      : width(round_up(K, kLanes<Real>)), score(width), ends(width), row(width), used(width), delta(width), back(width),
        block(K * width) {}
  bool allocated() const {
    return score.data && ends.data && row.data && used.data && delta.data && back.data && block.data;
  }

  // row(j) = max_i [delta(i) + phi(i, j)], back(j) its slot i; of several that of the smallest state. Whether a score is NaN
  // or +inf. Between two runs phi is read in place.
  bool step(const ActiveSequence<Real> &q, const Frame<Real> &from, const Frame<Real> &to) {
    constexpr int W = kLanes<Real>;
    const int64_t N = q.states;
    // Past the last columns of a matrix's last row there may be nothing to read.
    const bool in_place = from.run && to.run && (from.id[0] + from.count - 1) * N + to.id[0] + width <= N * N;
    if (!in_place) gather_block(q.transition, N, from, to, kNegativeInfinity<Real>, (Real *)block, from.count, width);
    const Real *arcs = in_place ? q.transition + from.id[0] * N + to.id[0] : (const Real *)block;
    const int64_t pitch = in_place ? N : width;
    if (count != to.count)
      for (int64_t j = 0; j < width; j++) used[j] = Real(j < to.count);
    count = to.count;
    Int<Real> wrong = {};
    int64_t j = 0;
    for (; j + 2 * W <= width; j += 2 * W) wrong |= max_slots<2, Real>(arcs, pitch, delta, from.count, j, used, row, back);
    if (j < width) wrong |= max_slots<1, Real>(arcs, pitch, delta, from.count, j, used, row, back);
    if (!from.run && !ascending(from) && tied(from)) break_ties(from, to);
    return any<Real>(wrong);
  }

  // back(j).
  static int64_t came_from(const Real *back, int64_t j) {
    Index slot;
    std::memcpy(&slot, back + j, sizeof slot);
    return slot;
  }

 private:
  using Index = std::remove_reference_t<decltype(Int<Real>{}[0])>;

  // Whether slots are in the order of their states, as those of a run are: then the first of several maxima is right.
  static bool ascending(const Frame<Real> &f) {
    bool all = true;
    for (int64_t k = 1; k < f.count; k++) all &= uint64_t(f.id[k - 1]) <= uint64_t(f.id[k]);  // what pads may come last
    return all;
  }

  // Whether several slots attain a maximum, which is rare.
  bool tied(const Frame<Real> &from) const {
    Int<Real> several = {};
    for (int64_t j = 0; j < width; j += kLanes<Real>) {
      const Vec<Real> best = load(row + j);
      Int<Real> n = {};
      for (int64_t i = 0; i < from.count; i++) n -= load(block + i * width + j) + splat(delta[i]) == best;
      several |= (n > 1) & (best > kNegativeInfinity<Real>);
    }
    return any<Real>(several);
  }

  void break_ties(const Frame<Real> &from, const Frame<Real> &to) {
    for (int64_t j = 0; j < to.count; j++) {
      Index best = Index(came_from(back, j));
      for (int64_t i = best + 1; i < from.count; i++)
        if (from.id[i] >= 0 && from.id[i] < from.id[best] && block[i * width + j] + delta[i] == row[j]) best = Index(i);
      std::memcpy(back + j, &best, sizeof best);
    }
  }
};

// The best of K scores; ties go to the smallest state. The maximum comes first, which takes no branch.
template <class Real> int64_t best_slot(const Real *score, const Frame<Real> &f) {
  Real top = score[0];
  for (int64_t j = 1; j < f.count; j++) top = score[j] > top ? score[j] : top;
  int64_t best = 0;
  while (score[best] != top) best++;
  for (int64_t j = best + 1; j < f.count && !f.run; j++)
    if (score[j] == top && f.id[j] < f.id[best]) best = j;
  return best;
}

// The score of the best path and its states (L). back (L, K) is workspace: where row t > 0 came from.
template <class Real>
double viterbi_active(const ActiveSequence<Real> &q, ActivePaths<Real> &rows, Real *back, int64_t *states) {
  const int64_t K = q.slots, L = q.length, width = rows.width;
  const Real ninf = kNegativeInfinity<Real>;
  Real *const score = rows.score, *const ends = rows.ends, *const row = rows.row, *const delta = rows.delta;
  double offset = 0;
  bool feasible = true;
  Frame<Real> from, to, next = L > 0 ? q.frame(0) : Frame<Real>{};
  for (int64_t t = 0; t < L && feasible; t++, from = to) {
    to = next;
    prefetch_frame<Real>(q, t + kStreamed, nullptr, back);
    if (t + 1 < L) {
      next = q.frame(t + 1);
      prefetch_window<false>(q.transition, q.states, to, next);
    }
    if (to.run)
      for (int64_t j = 0; j < width; j += kLanes<Real>) store(score + j, load_part(to.score + j, to.count - j, ninf));
    else gather_scores(to, width, score);
    Real top = 0;
    if (t == 0) {
      gather_row(q.initial, to, width, ninf, row);
      top = row_max<Real, Real>(row, width);
      for (int64_t j = 0; j < width; j++) row[j] -= top;
    } else {
      if (rows.step(q, from, to)) offset = std::numeric_limits<double>::quiet_NaN();
      for (int64_t j = 0; j < width; j += kLanes<Real>) store_part(back + t * K + j, K - j, load(rows.back + j));
    }
    const bool end = q.final && t == L - 1;
    if (end) gather_row(q.final, to, width, ninf, ends);
    offset += double(top);
    feasible = centre_row<Real, Real>(row, score, end ? ends : nullptr, width, delta, offset) && offset == offset;
  }
  if (!feasible) {
    for (int64_t t = 0; t < L; t++) states[t] = -1;
    return offset == offset ? -std::numeric_limits<double>::infinity() : offset;
  }
  if (L == 0) return 0;
  int64_t slot = best_slot((const Real *)delta, to);
  for (int64_t t = L - 1; t >= 0; t--) {
    states[t] = q.id[t * K + slot];
    if (t > 0) slot = rows.came_from(back + t * K, slot);
  }
  return offset;  // the maximum of the last delta is 0
}

// z_{L-1} ~ alpha_{L-1},  z_{t-1} ~ alpha_{t-1}(i) exp(phi(i, z_t)); alpha: messages, or their logs. scratch: 2 K + 64.
template <class Real>
void sample_active(const ActiveSequence<Real> &q, bool scaled, const Real *alpha, const Real *uniform, int64_t *states,
                   Real *scratch) {
  constexpr int W = kLanes<Real>;
  const int64_t K = q.slots;
  const Real ninf = kNegativeInfinity<Real>;
  for (int64_t t = q.length - 1; t >= 0; t--) {
    const Frame<Real> f = q.frame(t);
    const Real *a = alpha + t * K;
    for (int64_t i = 0; i < K; i++) {
      const bool used = i < f.count && f.id[i] >= 0 && (!scaled || a[i] > 0);
      scratch[i] = !used ? ninf : t < q.length - 1 ? q.transition[f.id[i] * q.states + states[t + 1]] : Real(0);
      if (used && !scaled) scratch[i] += a[i];
    }
    const Real top = row_max<Real, Real>(scratch, K);
    for (int64_t i = 0; i < K; i += W) {
      const Vec<Real> x = exp<Real>(load_part(scratch + i, K - i, ninf) - top);
      store_part(scratch + i, K - i, scaled ? x * load_part(a + i, K - i, Real(0)) : x);
    }
    states[t] = f.id[draw((const Real *)scratch, K, uniform[t])];
  }
}

}  // namespace
