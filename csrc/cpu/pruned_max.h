// A step of the Viterbi algorithm without the arcs that cannot win, for transitions shared over time.
//
//   out(j) = max_i [delta(i) + phi(i, j)],   top(i, K) = max_{j in K} phi(i, j) for every block K of columns
//
// States above a threshold go first. What they give to a block, L = min_{j in K} out(j), is at most every out(j) of it; so a
// state i with delta(i) + top(i, K) <= L changes nothing there (rounding is monotone, so this holds of rounded sums), and the
// result is the full product's to the last bit. The threshold looks for the cheapest step: it falls where more states are
// taken after the first ones than with them, and rises where fewer are.
//
// Cost a frame: for each state and block a sum and a comparison, N^2 / 32 numbers for float with 8 lanes, and an addition and a
// maximum for the arcs that are left, which depends on the scores. The full product of several sequences (max_step of viterbi.h)
// reads arcs once for all of them. Which is cheaper depends on that, on the caches that hold the arcs and on what else the machine
// does; so both are timed, the one that is not in use at one step in 64. What is found is the same.
// Measured on one core of an EPYC (Zen 3, AVX2), float, B = 8, T = 1000, us a frame and sequence pruned / by full products, least
// of a dozen rounds and more, for scores that are normal numbers and for a trained model's like (stays, emissions ten times as far
// apart): N = 128 .64 / .64 and .38 / .64;  256 2.2 / 2.1 and 1.0 / 2.1;  512 7.0 / 8.2 and 2.4 / 8.3;  1024 21 / 29 and 6.3 / 29.
// With other work beside it, T = 300, times over the forward pass's, pruned where a third of the arcs is left at most / by full
// products / by the clock, for the same scores: N = 1024 1.62 / 1.39 / 1.37 and .60 / 1.36 / .59; 2048, whose arcs come from the
// third cache or from memory, 1.79 / 1.12 / 1.24 and .22 / 1.16 / .24.
#pragma once
#include <algorithm>
#include <chrono>

#include "max_arcs.h"

namespace {

// The time, in units of its own: some ns a call count beside a step of one sequence.
inline uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

template <class Real> class PrunedStep {
 public:
  PrunedStep(const MaxArcs<Real> &all, int sequences) : arcs(all), rest(all.padded), least(all.blocks), list(all.padded) {
    for (int m = 0; m < sequences; m++) threshold[m] = Real(-1);
  }
  bool allocated() const { return rest.data && least.data && list.data; }

  // Begins a step of all sequences; whether it is to be pruned. The first steps are, while the threshold is found.
  bool begin() {
    const bool cheaper = (steps <= kFirst && !excess) || cost[true] < cost[false];
    pruning = steps % kEvery == 0 ? !cheaper : cheaper;
    began = ticks();
    return pruning;
  }

  // out (padded) from delta (N), whose maximum is 0, of the m-th sequence.
  void step(int m, const Real *delta, Real *out) {
    const int64_t taken = split(delta, threshold[m]);
    int64_t behind = 0;
    for (int64_t k = 0; k < arcs.blocks; k++) {
      Best best(arcs, k);
      best.take(delta, list, taken);
      best.store_to(out);
      least[k] = best.least();
    }
    for (int64_t k = 0; k < arcs.blocks; k++) {
      const int64_t more = above(least[k], arcs.tops + k * arcs.padded);
      if (more == 0) continue;
      Best best(arcs, k, out);
      best.take(delta, list, more);
      best.store_to(out);
      behind += more;
    }
    const int64_t ahead = taken * arcs.blocks;
    const Real next = threshold[m] * (behind > ahead ? kStep : 1 / kStep);
    if (next > kLowest && next < kHighest) threshold[m] = next;
    work += ahead + behind, whole += arcs.N * arcs.blocks;
  }

  // Ends it.
  void finish() {
    const double took = double(ticks() - began);
    double &mean = cost[pruning];
    if (steps % kEvery == 0 || mean == 0) mean = took;
    else mean += (std::min(took, 2 * mean) - mean) / 4;  // a step that the system interrupts says little
    excess |= 3 * work > whole;
    work = whole = 0;
    steps++;
  }

 private:
  static constexpr Real kStep = Real(1.125), kLowest = Real(-1e9), kHighest = Real(-1e-6);
  static constexpr int64_t kFirst = 8, kEvery = 64;

  // The maxima of one block's columns.
  struct Best {
    static constexpr int V = kBlockVectors, W = kLanes<Real>;
    const Real *columns[V];  // of packed arcs; where the last block is cut short, its last vector stands in for others
    int64_t at[V], N;
    Vec<Real> acc[V];

    HMM_INLINE Best(const MaxArcs<Real> &arcs, int64_t block) : N(arcs.N) {
      for (int v = 0; v < V; v++) {
        const int64_t j = block * V * W + v * W;
        at[v] = j < arcs.padded ? j : arcs.padded - W;
        columns[v] = arcs.from(at[v]);
        acc[v] = splat(kNegativeInfinity<Real>);
      }
    }
    HMM_INLINE Best(const MaxArcs<Real> &arcs, int64_t block, const Real *so_far) : Best(arcs, block) {
      for (int v = 0; v < V; v++) acc[v] = load(so_far + at[v]);
    }
    HMM_INLINE Vec<Real> score(const Real *delta, int64_t i, int v) const {
      return sum_beside_max(load(columns[v] + i * kPanel<Real>), splat(delta[i]));
    }
    // Two states at a time, so that fewer maxima wait for each other.
    HMM_INLINE void take(const Real *delta, const int32_t *states, int64_t count) {
      int64_t k = 0;
      for (; k + 2 <= count; k += 2)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          acc[v] = larger(acc[v], larger(score(delta, states[k], v), score(delta, states[k + 1], v)));
      if (k < count)
        for (int v = 0; v < V; v++) acc[v] = larger(acc[v], score(delta, states[k], v));
    }
    HMM_INLINE Real least() const {
      Vec<Real> low = splat(std::numeric_limits<Real>::infinity());
      for (int v = 0; v < V; v++) {
        Vec<Real> x = acc[v];
        for (int n = 0; at[v] + W > N && n < W; n++)
          if (at[v] + n >= N) x[n] = low[n];
        low = x < low ? x : low;
      }
      return -max_of<Real>(-low);
    }
    HMM_INLINE void store_to(Real *out) const {
      for (int v = 0; v < V; v++) store(out + at[v], acc[v]);
    }
  };

  // 64 states' bits at a time, since each loop over bits ends in a branch that nobody can foretell.
  template <class Lanes> HMM_INLINE int64_t listed(Lanes lanes) {
    constexpr int W = kLanes<Real>;
    int64_t count = 0;
    for (int64_t i = 0; i < arcs.padded; i += 64) {
      uint64_t bits = 0;
      for (int k = 0; k < 64; k += W)
        if (i + k < arcs.padded) bits |= uint64_t(lanes(i + k)) << k;
      for (; bits; bits &= bits - 1) list[count++] = int32_t(i + __builtin_ctzll(bits));
    }
    return count;
  }
  // States above a bound go to the list, the others' delta to `rest`.
  int64_t split(const Real *delta, Real bound) {
    const Real ninf = kNegativeInfinity<Real>;
    return listed([&](int64_t i) {
      const Vec<Real> d = load_part(delta + i, arcs.N - i, ninf);
      store(rest + i, d > bound ? splat(ninf) : d);
      return lanes_greater(d, splat(bound));
    });
  }
  // The states of `rest` that may give a block more than it has.
  int64_t above(Real bound, const Real *top) {
    return listed([&](int64_t i) { return lanes_greater(load(rest + i) + load(top + i), splat(bound)); });
  }

  const MaxArcs<Real> &arcs;
  Scratch<Real> rest, least;  // least: L of each block
  Scratch<int32_t> list;
  Real threshold[kGroup];
  int64_t work = 0, whole = 0;  // arcs taken in this step, and all there are
  int64_t steps = 0;
  double cost[2] = {};  // of a step by the full product, and of a pruned one
  bool pruning = false, excess = false;
  uint64_t began = 0;
};

}  // namespace
