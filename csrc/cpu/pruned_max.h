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
// Measured on one core of an EPYC (Zen 3, AVX2), float, B = 8, T = 300 to 1000, medians of a dozen rounds, times over the forward
// pass's as chosen by the clock, for scores that are normal numbers (by full products mostly, whose instructions bound it) and
// for a trained model's like (stays, emissions ten times as far apart): N = 128 1.11 and 1.16;  256 1.19 and 1.07;  512 1.22 and
// .95;  1024 1.36 and .73;  2048 1.18 and .65. With a sequence's blocks in one go instead, so that arcs came from the third cache
// for each sequence: 1.16, 1.04, .87 and .81 for the last scores from 256 on.
// Tried, no faster: blocks of half the columns (N^2 / 16 numbers to compare), lists by a table of bytes' bits (better for N = 256,
// worse from 1024 on), arcs of the next block asked for ahead, a step before's L in place of the threshold (fewer arcs, but half
// of the blocks are looked through twice).
#pragma once
#include <algorithm>
#include <chrono>

#include "max_arcs.h"
#include "scaled.h"

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
  PrunedStep(const MaxArcs<Real> &all, int sequences)
      : arcs(all), leaders(sequences * all.padded), rest(sequences * all.padded), list(all.padded) {
    for (int m = 0; m < sequences; m++) threshold[m] = Real(-1);
  }
  bool allocated() const { return leaders.data && rest.data && list.data; }

  // Begins a step of all sequences; whether it is to be pruned. The first steps are, while the threshold is found.
  bool begin() {
    const bool cheaper = (steps <= kFirst && !excess) || cost[true] < cost[false];
    pruning = steps % kEvery == 0 ? !cheaper : cheaper;
    began = ticks();
    return pruning;
  }

  // out (padded) from delta (N), whose maximum is 0, of n sequences, of which live[k] is the number of the k-th. Blocks go by
  // one after the other, so that the arcs of one stay in the nearer caches while all sequences take theirs.
  void step(const int *live, int n, const Real *const *delta, Real *const *out) {
    int64_t leading[kGroup], behind[kGroup] = {};
    for (int k = 0; k < n; k++) leading[k] = split(k, delta[k], threshold[live[k]]);
    for (int64_t block = 0; block < arcs.blocks; block++)
      for (int k = 0; k < n; k++) {
        Best best(arcs, block);
        best.take(delta[k], leaders + k * arcs.padded, leading[k]);
        const int64_t more = above(best.least(), rest + k * arcs.padded, arcs.tops + block * arcs.padded);
        best.take(delta[k], list, more);
        best.store_to(out[k]);
        behind[k] += more;
      }
    for (int k = 0; k < n; k++) {
      const int64_t ahead = leading[k] * arcs.blocks;
      Real &bound = threshold[live[k]];
      const Real next = bound * (behind[k] > ahead ? kStep : 1 / kStep);
      if (next > kLowest && next < kHighest) bound = next;
      work += ahead + behind[k], whole += arcs.N * arcs.blocks;
    }
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
  template <class Lanes> HMM_INLINE int64_t listed(int32_t *to, Lanes lanes) {
    constexpr int W = kLanes<Real>;
    int64_t count = 0;
    for (int64_t i = 0; i < arcs.padded; i += 64) {
      uint64_t bits = 0;
      for (int k = 0; k < 64; k += W)
        if (i + k < arcs.padded) bits |= uint64_t(lanes(i + k)) << k;
      for (; bits; bits &= bits - 1) to[count++] = int32_t(i + __builtin_ctzll(bits));
    }
    return count;
  }
  // The k-th sequence's states above a bound go to its `leaders`, the others' delta to its `rest`.
  int64_t split(int k, const Real *delta, Real bound) {
    const Real ninf = kNegativeInfinity<Real>;
    Real *const others = rest + k * arcs.padded;
    return listed(leaders + k * arcs.padded, [&](int64_t i) {
      const Vec<Real> d = load_part(delta + i, arcs.N - i, ninf);
      store(others + i, d > bound ? splat(ninf) : d);
      return lanes_greater(d, splat(bound));
    });
  }
  // The states of `others` that may give a block more than it has.
  int64_t above(Real bound, const Real *others, const Real *top) {
    return listed(list, [&](int64_t i) { return lanes_greater(load(others + i) + load(top + i), splat(bound)); });
  }

  const MaxArcs<Real> &arcs;
  Scratch<int32_t> leaders;  // of each sequence
  Scratch<Real> rest;        // the others' delta, of each sequence
  Scratch<int32_t> list;
  Real threshold[kGroup];
  int64_t work = 0, whole = 0;  // arcs taken in this step, and all there are
  int64_t steps = 0;
  double cost[2] = {};  // of a step by the full product, and of a pruned one
  bool pruning = false, excess = false;
  uint64_t began = 0;
};

}  // namespace
