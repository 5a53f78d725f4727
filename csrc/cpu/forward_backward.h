// Forward and backward over a batch: which sequences go together is in grouping.h, the recursions in scaled.h (with
// time-varying transitions log_space.h), what happens to those that were lost in redo.h.
#pragma once
#include <optional>

#include "grouping.h"
#include "lockstep.h"
#include "log_space.h"
#include "parallel.h"
#include "redo.h"

namespace {

// What the halves of a group end with, and how many of them have.
struct Meeting {
  Ends ends[2];
  int arrived;
};

template <class Real> struct Forward : Status {
  const hmm_problem &p;
  Grouping grouping;
  const Arcs<Real> *shared;
  Places<Real> places;
  Meeting *meetings;  // one a group
  Real *log_partition, *alpha, *norm, *centre;
  int32_t *method;

  Forward(const hmm_problem &problem, const Grouping &g)
      : p(problem), grouping(g), places(g.workers, g.chunks, problem.states) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    for (int64_t b = worker; b < p.batch; b += workers) {
      clear_rest(alpha, b, p.states);
      clear_rest(centre, b, 1);
    }
    if (p.time_varying) return log_space(worker, workers);
    if (grouping.chunks > 1) {
      Place<Real> &place = places[grouping.team(worker)];
      Member member(place.lockstep, grouping.chunk(worker));
      grouping.share(worker, [&](const Group &whole, int64_t k, int half) {
        walk(*shared, whole, meetings[k], half, place.rows, member);
        return true;
      });
      return;
    }
    Alone alone;
    Scratch<Real> rows(group_rows(1) * round_up(p.states, kPanel<Real>));
    if (!rows.data) return out_of_memory();
    const bool done = grouping.share(worker, [&](const Group &whole, int64_t k, int half) {
      if (shared) {
        walk(*shared, whole, meetings[k], half, rows, alone);
        return true;
      }
      const Arcs<Real> own(Sequence<Real>(p, whole.index[0]).transition, p.states, p.time, false);
      if (own.allocated()) walk(own, whole, meetings[k], half, rows, alone);
      return own.allocated();
    });
    if (!done) out_of_memory();
  }

  // What lies past a sequence's end is 0, so that equal inputs give equal outputs, bit for bit.
  void clear_rest(Real *x, int64_t b, int64_t width) {
    clear(x + (b * p.time + p.lengths[b]) * width, (p.time - p.lengths[b]) * width);
  }

  // Walks a group, or a half of it.
  template <class Team>
  void walk(const Arcs<Real> &arcs, const Group &whole, Meeting &meeting, int half, Real *rows, Team &team) {
    if (arcs.usable) {
      const Group part = grouping.halves == 2 ? whole.half(half == 1) : whole;
      forward_group(p, arcs, part, rows, alpha, centre, meeting.ends[half], team);
    }
    team.together([&](int chunk) {
      if (chunk == 0) conclude(arcs, whole, meeting, rows);
    });
  }

  // The half that arrives last joins the two.
  void conclude(const Arcs<Real> &arcs, const Group &whole, Meeting &meeting, Real *rows) {
    if (__atomic_add_fetch(&meeting.arrived, 1, __ATOMIC_ACQ_REL) < grouping.halves) return;
    Ends &ends = meeting.ends[0];
    if (arcs.usable && grouping.halves == 2) join_halves(p, arcs, whole, alpha, rows, ends, meeting.ends[1]);
    for (int m = 0; m < whole.size; m++) {
      const int64_t b = whole.index[m];
      const bool lost = !arcs.usable || ends.lost[m];
      method[b] = lost ? HMM_REDONE : grouping.halves == 2 ? HMM_BOTH_ENDS : HMM_SCALED;
      if (!lost) log_partition[b] = whole.length[m] ? Real(ends.taken[m] + std::log(ends.total[m])) : Real(0);
    }
  }

  void log_space(int worker, int workers) {
    Scratch<Real> rows(2 * round_up(p.states, 4 * kLanes<Real>));
    if (!rows.data) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = grouping.order[k], at = b * p.time * p.states;
      method[b] = HMM_LOG_SPACE;
      clear_rest(norm, b, p.states);
      log_partition[b] =
          Real(forward_log_space<Real, Real>(Sequence<Real>(p, b), alpha + at, norm + at, centre + b * p.time, rows));
    }
  }
};

// The sequences that were lost, again: shared out anew, since those of one group may all be.
template <class Real> struct ForwardAgain : Status {
  const hmm_problem &p;
  const int64_t *lost;  // (count,)
  int64_t count;
  Real *log_partition, *alpha, *centre;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Redo<Real> redo(p);
    for (int64_t k = worker; k < count; k += workers) {
      const int64_t b = lost[k];
      double z;
      if (!redo.forward(b, z)) return out_of_memory();
      log_partition[b] = Real(z);
      clear(alpha + b * p.time * p.states, p.lengths[b] * p.states);  // of no use, but the same bits every time
      clear(centre + b * p.time, p.lengths[b]);
    }
  }
};

template <class Real> struct Backward : Status {
  const hmm_problem &p;
  Grouping grouping;
  const Arcs<Real> *shared = nullptr;
  Places<Real> places;
  const Real *grad, *log_partition, *alpha, *norm, *centre;
  const int32_t *method;
  Real *state, *edge;
  Real *partial = nullptr;  // (shares, N, N): of a gradient summed over the batch, the first share being `edge`

  Backward(const hmm_problem &problem, const Grouping &g)
      : p(problem), grouping(g), places(g.workers, g.chunks, problem.states) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states;
    for (int64_t b = worker; b < p.batch; b += workers) {
      const int64_t from = shared && grad[b] == 0 ? 0 : p.lengths[b];
      clear(state + (b * p.time + from) * N, (p.time - from) * N);
    }
    if (p.time_varying) return log_space(worker, workers);
    if (grouping.chunks > 1) {
      Place<Real> &place = places[grouping.team(worker)];
      Member member(place.lockstep, grouping.chunk(worker));
      Counting<Real> counting = {place.counts ? &*place.counts : nullptr};
      groups(worker, 0, place.rows, counting, member);
      return counting.finish(*shared, 1, share(grouping.team(worker)), false, member);
    }
    Scratch<Real> rows(group_rows(1) * round_up(N, kPanel<Real>));
    Alone alone;
    if (!rows.data) return out_of_memory();
    if (shared) {
      Real *mine = edge ? share(worker) : nullptr;
      Counts<Real> counts(mine ? N : 0, grad, p.batch);
      if (!counts.allocated()) return out_of_memory();
      if (mine) clear(mine, N * N);
      for (int half = 0; half < grouping.halves; half++) {
        Counting<Real> counting = {mine ? &counts : nullptr};
        groups(worker, half, rows, counting, alone);
        counting.finish(*shared, half ? -1 : 1, mine, true, alone);
      }
      return;
    }
    Redo<Real> redo(p);
    for (int64_t b = worker; b < p.batch; b += workers) {
      Real *mine = edge ? edge + b * N * N : nullptr;
      if (mine) clear(mine, N * N);
      if (method[b] == HMM_REDONE) {
        if (!redo.backward(b, grad[b], state + b * p.time * N, mine)) return out_of_memory();
        continue;
      }
      const Arcs<Real> own(Sequence<Real>(p, b).transition, N, p.time, true);
      Group one;
      one.add(b, 0, p.lengths[b], false);
      Counts<Real> counts(mine ? N : 0, grad + b, 1);
      if (!own.allocated() || !counts.allocated()) return out_of_memory();
      Counting<Real> counting = {mine ? &counts : nullptr};
      backward_group(p, own, one, (Real *)rows, grad, alpha, centre, state, counting, alone);
      counting.finish(own, 1, mine, true, alone);
    }
  }

  Real *share(int64_t k) const { return k ? partial + (k - 1) * p.states * p.states : edge; }

  // This worker's groups, or their first or second halves: the sequences that stand as they are.
  template <class Team> void groups(int worker, int half, Real *rows, Counting<Real> &counting, Team &team) {
    grouping.share(worker, [&](const Group &whole, int64_t, int which) {
      if (which != half) return true;
      Group scaled;
      for (int m = 0; m < whole.size; m++) {
        const int64_t b = whole.index[m];
        if (method[b] != HMM_REDONE && grad[b] != 0) scaled.add(b, 0, p.lengths[b], false);
      }
      if (grouping.halves == 2) scaled = scaled.half(half == 1);
      backward_group(p, *shared, scaled, rows, grad, alpha, centre, state, counting, team);
      return true;
    });
  }

  void log_space(int worker, int workers) {
    const int64_t N = p.states, arcs = p.time > 0 ? (p.time - 1) * N * N : 0;
    Scratch<Real> rows(3 * round_up(N, 4 * kLanes<Real>));
    if (!rows.data) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = grouping.order[k], at = b * p.time * N;
      const Sequence<Real> q(p, b);
      Real *mine = edge ? edge + b * arcs : nullptr;
      backward_log_space(q, double(grad[b]), double(log_partition[b]), alpha + at, norm + at, centre + b * p.time,
                         state + at, mine, N * N, (Real *)rows);
      const int64_t used = (q.length > 0 ? q.length - 1 : 0) * N * N;
      if (mine) clear(mine + used, arcs - used);
    }
  }
};

// The sequences that were lost, again, where they share a matrix.
template <class Real> struct BackwardAgain : Status {
  const hmm_problem &p;
  const int64_t *lost;  // (count,)
  int64_t count;
  const Real *grad;
  Real *state, *partial;  // partial (workers, N, N), null to skip

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Redo<Real> redo(p);
    Real *mine = partial ? partial + worker * p.states * p.states : nullptr;
    if (mine) clear(mine, p.states * p.states);
    for (int64_t k = worker; k < count; k += workers)
      if (!redo.backward(lost[k], grad[lost[k]], state + lost[k] * p.time * p.states, mine)) return out_of_memory();
  }
};

// total (numbers) += the shares (count, numbers), in their order.
template <class Real> struct Sum : Status {
  const Real *shares;
  int64_t count, numbers;
  Real *total;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    for (int64_t k = 0; k < count; k++)
      for (int64_t n = numbers * worker / workers; n < numbers * (worker + 1) / workers; n++) total[n] += shares[k * numbers + n];
  }
};

template <class Real>
int add_shares(const hmm_problem &p, Parallel parallel, const Real *shares, int64_t count, Real *total) {
  Sum<Real> sum = {{}, shares, count, p.states * p.states, total};
  return count ? run(parallel, sum.numbers / (1 << 16) + 1, p.threads, sum) : HMM_OK;
}

// One matrix for all sequences and frames.
inline bool one_matrix(const hmm_problem &p) { return !p.time_varying && (p.batch == 1 || !p.transition_batch_stride); }

// Fewer full groups than threads: these must share groups.
inline bool few(const hmm_problem &p) { return one_matrix(p) && p.threads > 1 && p.batch < 7 * int64_t(p.threads); }

// Into how many chunks the steps are cut.
template <class Real> int step_chunks(const hmm_problem &p) {
  const int64_t most = (p.states + kChunkColumns<Real> - 1) / kChunkColumns<Real>;
  return p.sharing != HMM_BY_STEPS || !few(p) ? 1 : int(most < p.threads ? most : p.threads);
}

template <class Real>
int forward(const hmm_problem &p, const int64_t *order, Parallel parallel, Real *log_partition, Real *alpha, Real *norm,
            Real *centre, int32_t *method) {
  if (p.batch == 0) return HMM_OK;
  const bool one = one_matrix(p);
  Forward<Real> body(p, Grouping(p, order, one, p.sharing == HMM_BY_ENDS && few(p), step_chunks<Real>(p)));
  body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre, body.method = method;
  const Scratch<Meeting> meetings(p.batch);
  const FlushToZero flush;
  std::optional<Arcs<Real>> shared;
  int status = HMM_OK;
  if (one) {
    shared.emplace(p.states, body.grouping.halves == 2);
    status = pack(p, parallel, body.grouping.halves == 2, *shared);
  }
  if (status != HMM_OK || !meetings.data || !body.places.allocated()) return HMM_OUT_OF_MEMORY;
  body.shared = one ? &*shared : nullptr, body.meetings = meetings;
  status = run(parallel, body.grouping.workers, p.threads, body);
  if (status != HMM_OK || p.time_varying) return status;
  const Scratch<int64_t> lost(p.batch);
  if (!lost.data) return HMM_OUT_OF_MEMORY;
  ForwardAgain<Real> again{{}, p, lost, 0, log_partition, alpha, centre};
  for (int64_t k = 0; k < p.batch; k++)
    if (method[order[k]] == HMM_REDONE) lost[again.count++] = order[k];
  return again.count ? run(parallel, again.count, p.threads, again) : HMM_OK;
}

template <class Real>
int backward(const hmm_problem &p, const int64_t *order, Parallel parallel, const Real *grad, const Real *log_partition,
             const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge) {
  const int64_t N = p.states;
  if (p.batch == 0) {
    if (edge && !p.time_varying && !p.transition_batch_stride) clear(edge, N * N);
    return HMM_OK;
  }
  const bool one = one_matrix(p);
  bool both_ends = false;
  for (int64_t b = 0; b < p.batch; b++) both_ends |= method[b] == HMM_BOTH_ENDS;
  Backward<Real> body(p, Grouping(p, order, one, both_ends, both_ends ? 1 : step_chunks<Real>(p)));
  body.grad = grad, body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre;
  body.method = method, body.state = state, body.edge = edge;
  const int workers = body.grouping.workers, shares = workers / body.grouping.chunks;
  if (!one) return run(parallel, workers, p.threads, body);
  const FlushToZero flush;
  Arcs<Real> shared(N, true);
  int status = pack(p, parallel, true, shared);
  const Scratch<Real> partial(edge ? (shares - 1) * N * N : 0, false);
  const Scratch<int64_t> lost(p.batch);
  for (Place<Real> &place : body.places)
    if (edge) place.counts.emplace(N, grad, p.batch);
  if (status != HMM_OK || !partial.data || !lost.data || !body.places.allocated()) return HMM_OUT_OF_MEMORY;
  body.shared = &shared, body.partial = partial;
  status = run(parallel, workers, p.threads, body);
  if (status == HMM_OK && edge) status = add_shares(p, parallel, (const Real *)partial, shares - 1, edge);
  BackwardAgain<Real> again{{}, p, lost, 0, grad, state, nullptr};
  for (int64_t k = 0; k < p.batch; k++)
    if (method[order[k]] == HMM_REDONE && grad[order[k]] != 0) lost[again.count++] = order[k];
  if (status != HMM_OK || !again.count) return status;
  const int64_t redoing = again.count < p.threads ? again.count : p.threads;
  const Scratch<Real> more(edge ? redoing * N * N : 0, false);
  if (!more.data) return HMM_OUT_OF_MEMORY;
  again.partial = edge ? more.data : nullptr;
  status = run(parallel, redoing, p.threads, again);
  return status == HMM_OK && edge ? add_shares(p, parallel, (const Real *)more, redoing, edge) : status;
}

}  // namespace
