// The forward and the backward pass of a group by scaled probabilities (scaled_arcs.h has the recursions and costs), for one
// thread or several that take every step together.
#pragma once
#include <array>

#include "counts.h"
#include "scaled.h"

namespace {

// What one chunk of a product's columns adds: each sequence's part of the sum, and whether (entrywise) failed there.
struct alignas(64) Part {
  double total[kGroup];
  bool lost[kGroup];
};

// Those who take a group's steps together: here one thread that does everything; lockstep.h has the others. A walk is a
// sequence of phases, of chunks that neither read what another chunk of their phase writes nor depend on who does them.
class Alone {
 public:
  int chunks() const { return 1; }
  Part *parts() { return &part; }
  template <class Body> void together(Body body) { body(0); }

 private:
  Part part;
};

// Rows of scratch a group needs: per sequence one of weights and one of products, two more, and two per chunk.
constexpr int kSharedRows = 2 * kGroup + 2;
constexpr int group_rows(int chunks) { return kSharedRows + 2 * chunks; }

// The forward pass of a group. Chunks of products are columns, those of everything else are sequences.
template <class Real> struct ForwardWalk {
  const hmm_problem &p;
  const Arcs<Real> &arcs;
  const Group &group;
  Real *scratch, *alpha, *centre;
  Ends &ends;
  Part *parts;  // (chunks,)
  const int chunks;

  const int64_t N = p.states, padded = arcs.padded, stride = group.step * N;
  Real *const weights = scratch, *const idle = scratch + kGroup * padded, *const zeros = idle + padded;

  const std::array<Real *, kGroup> first = first_messages();

  std::array<Real *, kGroup> first_messages() const {
    std::array<Real *, kGroup> found = {};
    for (int m = 0; m < group.size; m++) found[m] = alpha + (group.index[m] * p.time + group.first[m]) * N;
    return found;
  }
  Real *message(int m, int64_t t) const { return first[m] + t * stride; }

  void begin(int m) {
    ends.total[m] = ends.taken[m] = ends.lost[m] = 0;
    for (int c = 0; c < chunks; c++) parts[c].total[m] = parts[c].lost[m] = 0;
  }

  // The weights of step t; at the first one, the first message too.
  HMM_INLINE void enter(int m, int64_t t, int chunk) {
    if (ends.lost[m]) return;
    const int64_t frame = group.frame(m, t), row = group.index[m] * p.time + frame;
    Real *const w = weights + m * padded, *const spare = scratch + (kSharedRows + 2 * chunk) * padded;
    if (t + kAhead < group.length[m]) {
      if (p.emission) prefetch<false>((const Real *)p.emission + row * N + kAhead * stride, N);
      prefetch<true>(message(m, t + kAhead), N);
    }
    const Sequence<Real> q(p, group.index[m]);
    ends.taken[m] += weigh<true>(q, arcs, frame, centre[row], w, spare);
    if (t == 0)
      first_message<Real>(q, arcs.mixing, group.step < 0, w, spare, message(m, 0), parts[0].total[m], ends.taken[m],
                          parts[0].lost[m]);
  }

  // This chunk of step t's messages, while there is a sequence that is not lost.
  void product(int64_t t, int chunk) {
    const int running = group.running(t);
    const int64_t at = t * stride;
    const Real *previous[kGroup], *w[kGroup];
    Real *out[kGroup];
    Part part;
    bool hope = false;
    for (int m = 0; m < running; m++) {
      previous[m] = first[m] + at - stride, out[m] = first[m] + at, w[m] = weights + m * padded;
      hope |= !(part.lost[m] = ends.lost[m]);
    }
    if (!hope) return;
    for (int m = running; m < kGroup; m++)  // these rows repeat the first, with weight 0, into `idle`
      previous[m] = previous[0], out[m] = idle, w[m] = zeros, part.lost[m] = false;
    const Panels<Real> panels = arcs.panels(group.step).chunk(chunk, chunks);
    const bool mixing = arcs.mixing;
    for_rows(running, [&](auto width) {
      forward_step<decltype(width)::value, Real>(panels, mixing, previous, w, out, part.total, part.lost);
    });
    parts[chunk] = part;
  }

  // Step t of a sequence, when all chunks of its product are there.
  HMM_INLINE void finish(int m, int64_t t) {
    if (ends.lost[m]) return;
    double total = 0;
    for (int c = 0; c < chunks; c++) total += parts[c].total[m], ends.lost[m] |= parts[c].lost[m];
    if (!(total >= arcs.least_sum)) ends.lost[m] = true;  // infeasible, lost or NaN: redo.h tells which
    else if (!stands(total))
      ends.taken[m] -= rescale(message(m, t), total, N, N) * kLn2;
    if (t == group.length[m] - 1) ends.total[m] = total;
  }
};

template <class Real, class Team>
void forward_group(const hmm_problem &p, const Arcs<Real> &arcs, const Group &group, Real *scratch, Real *alpha,
                   Real *centre, Ends &ends, Team &team) {
  const int64_t longest = group.size ? group.length[0] : 0;
  ForwardWalk<Real> walk = {p, arcs, group, scratch, alpha, centre, ends, team.parts(), team.chunks()};
  for (int64_t t = 0; t <= longest; t++) {
    team.together([&](int chunk) {
      for (int m = chunk; m < group.size; m += team.chunks()) {
        if (t == 0) walk.begin(m);
        else if (t <= group.length[m]) walk.finish(m, t - 1);
        if (t < group.length[m]) walk.enter(m, t, chunk);
      }
    });
    if (0 < t && t < longest) team.together([&](int chunk) { walk.product(t, chunk); });
  }
}

// log Z of sequences whose halves have met: log sum_ij a_{m-1}(i) A(i, j) b_m(j) and what was taken out. Adds to the first
// half's ends; where there is no second half they stand as they are.
template <class Real>
void join_halves(const hmm_problem &p, const Arcs<Real> &arcs, const Group &whole, const Real *alpha, Real *scratch,
                 Ends &first, const Ends &second) {
  const int64_t N = p.states, padded = arcs.padded;
  int halved = 0;
  while (halved < whole.size && whole.length[halved] > 1) halved++;
  if (!halved) return;
  const Real *u[kGroup];
  Real *out[kGroup];
  for (int m = 0; m < kGroup; m++) {
    const int n = m < halved ? m : 0;
    u[m] = alpha + (whole.index[n] * p.time + meeting(whole.length[n])) * N;
    out[m] = scratch + m * padded;
  }
  for_rows(halved, [&](auto width) { backward_step<decltype(width)::value, Real>(arcs.panels(-1), u, out); });
  const double least = std::exp2(kLeastJoinedBits<Real> + 2 * std::log2(double(N)));
  for (int m = 0; m < halved; m++) {
    first.total[m] = double(posterior_mass(u[m] - N, out[m], N));
    first.taken[m] += second.taken[m];
    first.lost[m] |= second.lost[m] || !(first.total[m] >= least);
  }
}

// The backward pass of a group, in chunks as the forward one.
template <class Real> struct BackwardWalk {
  const hmm_problem &p;
  const Arcs<Real> &arcs;
  const Group &group;
  Real *scratch;
  const Real *grad, *alpha, *centre;
  Real *state;
  Counts<Real> *counts;  // null: nothing is counted
  const int chunks;

  // `next` holds w * b of the step after; the idle rows of a step go to `idle`.
  const int64_t N = p.states, padded = arcs.padded;
  Real *const next = scratch, *const beta = next + kGroup * padded, *const idle = beta + kGroup * padded;

  // This chunk of step t's messages, before they are normalised.
  void product(int64_t t, int chunk) {
    const int entered = group.entered(t);
    if (!entered) return;
    const Real *u[kGroup];
    Real *out[kGroup];
    for (int m = 0; m < kGroup; m++) {
      u[m] = next + (m < entered ? m : 0) * padded;
      out[m] = m < entered ? beta + m * padded : idle;
      if (m < entered && t == group.length[m] - 1)  // of halves, which one thread walks alone
        std::memcpy(next + m * padded, alpha + (group.index[m] * p.time + group.frame(m, t + 1)) * N, N * sizeof(Real));
    }
    for_rows(entered, [&](auto width) {
      backward_step<decltype(width)::value, Real>(arcs.panels(-group.step).chunk(chunk, chunks), u, out);
    });
  }

  // Sequences that count an arc at step t. The arcs from one half to the other are counted by the first.
  int counted(int64_t t) const { return group.step > 0 ? group.entered(t) : group.running(t + 1); }

  // The posteriors of step t, and what the step before needs; what is counted goes to the slot.
  HMM_INLINE void posterior(int m, int64_t t, int64_t slot, int chunk) {
    const int64_t b = group.index[m], frame = group.frame(m, t), row = b * p.time + frame;
    Real *const spare = scratch + (kSharedRows + 2 * chunk) * padded, *const w = spare + padded;
    const Real *a = alpha + row * N;
    if (t >= kAhead) {
      const int64_t ahead = kAhead * group.step * N;
      prefetch<false>(a - ahead, N);
      if (p.emission) prefetch<false>((const Real *)p.emission + row * N - ahead, N);
      prefetch<true>(state + row * N - ahead, N);
    }
    Real *const y = beta + m * padded;
    if (m >= group.entered(t))
      for (int64_t j = 0; j < N; j++) y[j] = 1;
    const Real inverse = Real(1) / posterior_mass(a, y, N);
    if (counts && m < counted(t)) counts->put(slot, a, grad[b] * counts->grad_scale * inverse, next + m * padded);
    Real found = t ? centre[row] : Real(0);
    if (t) weigh<false>(Sequence<Real>(p, b), arcs, frame, found, w, spare);
    posterior_row<Real>(a, y, t ? w : nullptr, grad[b], inverse, N, state + row * N, next + m * padded);
  }
};

template <class Real, class Team>
void backward_group(const hmm_problem &p, const Arcs<Real> &arcs, const Group &group, Real *scratch, const Real *grad,
                    const Real *alpha, const Real *centre, Real *state, Counting<Real> &counting, Team &team) {
  BackwardWalk<Real> walk = {p, arcs, group, scratch, grad, alpha, centre, state, counting.sums, team.chunks()};
  for (int64_t t = (group.size ? group.length[0] : 0) - 1; t >= 0; t--) {
    const int running = group.running(t), counted = walk.counted(t);
    const bool room = counting.room(counted);
    team.together([&](int chunk) {
      walk.product(t, chunk);
      if (!room) counting.flush(chunk_of<Real>(p.states, chunk, team.chunks()));
    });
    if (!room) counting.flushed();
    team.together([&](int chunk) {
      for (int m = chunk; m < running; m += team.chunks()) walk.posterior(m, t, counting.filled + m, chunk);
    });
    counting.filled += counted;
  }
}

}  // namespace
