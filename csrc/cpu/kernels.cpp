// Spreads the kernels over sequences and threads. Compiled once for each instruction set, HMM_TARGET naming the table;
// everything else has internal linkage, so that the linker cannot mix code of different instruction sets.
#include "kernels.h"

#include "active_kernels.h"
#include "banded.h"
#include "grouping.h"
#include "low_rank.h"
#include "parallel.h"
#include "redo.h"
#include "sampling.h"
#include "semi_markov_batch.h"
#include "tangent.h"
#include "topk.h"
#include "viterbi.h"

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
  Meeting *meetings;  // one a group
  Real *log_partition, *alpha, *norm, *centre;
  int32_t *method;

  Forward(const hmm_problem &problem, const Grouping &g) : p(problem), grouping(g) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    for (int64_t b = worker; b < p.batch; b += workers) {
      clear_rest(alpha, b, p.states);
      clear_rest(centre, b, 1);
    }
    if (p.time_varying) return log_space(worker, workers);
    Scratch<Real> rows(kGroupRows * round_up(p.states, kPanel<Real>));
    if (!rows.data) return out_of_memory();
    const bool done = grouping.share(worker, [&](const Group &whole, int64_t k, int half) {
      if (shared) {
        walk(*shared, whole, meetings[k], half, rows);
        return true;
      }
      const Arcs<Real> own(Sequence<Real>(p, whole.index[0]).transition, p.states, p.time, false);
      if (own.allocated()) walk(own, whole, meetings[k], half, rows);
      return own.allocated();
    });
    if (!done) out_of_memory();
  }

  // What lies past a sequence's end is 0, so that equal inputs give equal outputs, bit for bit.
  void clear_rest(Real *x, int64_t b, int64_t width) {
    clear(x + (b * p.time + p.lengths[b]) * width, (p.time - p.lengths[b]) * width);
  }

  // Walks a group, or a half of it; the half that arrives last joins the two.
  void walk(const Arcs<Real> &arcs, const Group &whole, Meeting &meeting, int half, Real *rows) {
    Ends &ends = meeting.ends[0];
    if (arcs.usable) {
      const Group part = grouping.halves == 2 ? whole.half(half == 1) : whole;
      forward_group(p, arcs, part, rows, alpha, centre, meeting.ends[half]);
    }
    if (__atomic_add_fetch(&meeting.arrived, 1, __ATOMIC_ACQ_REL) < grouping.halves) return;
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
  const Arcs<Real> *shared;
  const Real *grad, *log_partition, *alpha, *norm, *centre;
  const int32_t *method;
  Real *state, *edge;
  Real *partial;  // (workers, N, N): each worker's share of a gradient summed over the batch

  Backward(const hmm_problem &problem, const Grouping &g) : p(problem), grouping(g) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states;
    for (int64_t b = worker; b < p.batch; b += workers)
      clear(state + (b * p.time + p.lengths[b]) * N, (p.time - p.lengths[b]) * N);
    if (p.time_varying) return log_space(worker, workers);
    Scratch<Real> rows((2 * kGroup + 3) * round_up(N, kPanel<Real>));
    if (!rows.data) return out_of_memory();
    Redo<Real> redo(p);
    if (shared) {
      Real *mine = edge ? partial + worker * N * N : nullptr;
      for (int half = 0; half < grouping.halves; half++)
        if (!groups(worker, half, rows, mine, redo)) return out_of_memory();
      return;
    }
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
      backward_group(p, own, one, (Real *)rows, grad, alpha, centre, state, mine ? &counts : nullptr);
      if (mine) counts.finish(own, 1, mine);
    }
  }

  // This worker's groups, or their first or second halves.
  bool groups(int worker, int half, Real *rows, Real *mine, Redo<Real> &redo) {
    std::optional<Counts<Real>> counts;
    const bool done = grouping.share(worker, [&](const Group &whole, int64_t, int share) {
      if (share != half) return true;
      if (mine && !counts) counts.emplace(p.states, grad, p.batch);
      if (mine && !counts->allocated()) return false;
      Group scaled;
      for (int m = 0; m < whole.size; m++) {
        const int64_t b = whole.index[m];
        const bool elsewhere = half != m % grouping.halves;  // each half does every other sequence that must be done whole
        if (method[b] == HMM_REDONE) {
          if (!elsewhere && !redo.backward(b, grad[b], state + b * p.time * p.states, mine)) return false;
        } else if (grad[b] == 0) {
          if (!elsewhere) clear(state + b * p.time * p.states, p.lengths[b] * p.states);
        } else scaled.add(b, 0, p.lengths[b], false);
      }
      if (grouping.halves == 2) scaled = scaled.half(half == 1);
      if (scaled.size) backward_group(p, *shared, scaled, rows, grad, alpha, centre, state, mine ? &*counts : nullptr);
      return true;
    });
    if (counts && done) counts->finish(*shared, half ? -1 : 1, mine);
    return done;
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

// One matrix for all sequences and frames.
inline bool one_matrix(const hmm_problem &p) { return !p.time_varying && (p.batch == 1 || !p.transition_batch_stride); }

template <class Real>
int forward(const hmm_problem &p, const int64_t *order, Parallel parallel, Real *log_partition, Real *alpha, Real *norm,
            Real *centre, int32_t *method) {
  if (p.batch == 0) return HMM_OK;
  const bool one = one_matrix(p);
  Forward<Real> body(p, Grouping(p, order, one, one && p.both_ends && p.threads > 1 && p.batch < 7 * int64_t(p.threads)));
  body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre, body.method = method;
  const Scratch<Meeting> meetings(p.batch);
  const FlushToZero flush;
  std::optional<Arcs<Real>> shared;
  if (one) shared.emplace((const Real *)p.transition, p.states, p.time, body.grouping.halves == 2);
  if (!meetings.data || (one && !shared->allocated())) return HMM_OUT_OF_MEMORY;
  body.shared = one ? &*shared : nullptr, body.meetings = meetings;
  const int status = run(parallel, body.grouping.workers, p.threads, body);
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
  Backward<Real> body(p, Grouping(p, order, one, both_ends));
  body.grad = grad, body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre;
  body.method = method, body.state = state, body.edge = edge, body.shared = nullptr, body.partial = nullptr;
  const int workers = body.grouping.workers;
  if (!one) return run(parallel, workers, p.threads, body);
  const FlushToZero flush;
  const Arcs<Real> shared((const Real *)p.transition, N, p.time, true);
  const Scratch<Real> partial(edge ? workers * N * N : 0);
  if (!shared.allocated() || !partial.data) return HMM_OUT_OF_MEMORY;
  body.shared = &shared, body.partial = partial;
  const int status = run(parallel, workers, p.threads, body);
  if (edge) {
    std::memcpy(edge, partial, N * N * sizeof(Real));
    for (int worker = 1; worker < workers; worker++)
      for (int64_t k = 0; k < N * N; k++) edge[k] += partial[worker * N * N + k];
  }
  return status;
}

template <class Real> struct Viterbi : Status {
  const hmm_problem &p;
  Grouping grouping;
  const MaxArcs<Real> *shared = nullptr;
  Real *score, *delta;
  int64_t *states;
  Viterbi(const hmm_problem &problem, const int64_t *order, Real *s, Real *d, int64_t *z)
      : p(problem), grouping(problem, order, !problem.transition_batch_stride && !problem.time_varying, false), score(s), delta(d), states(z) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Scratch<Real> rows(kViterbiRows * round_up(p.states, kPanel<Real>));
    if (!rows.data) return out_of_memory();
    int64_t at = 0;
    for (int64_t k = 0; at < p.batch; k++) {
      const Group group = grouping.group(at);
      at += group.size;
      if (k % workers != worker) continue;
      if (shared || p.time_varying) viterbi_group(p, shared, group, (Real *)rows, score, delta, states);
      else {
        const MaxArcs<Real> own(Sequence<Real>(p, group.index[0]).transition, p.time > 1 ? p.states : 0);
        if (!own.allocated()) return out_of_memory();
        viterbi_group(p, &own, group, (Real *)rows, score, delta, states);
      }
    }
  }
};

template <class Real>
int viterbi(const hmm_problem &p, const int64_t *order, Parallel parallel, Real *score, Real *delta, int64_t *states) {
  Viterbi<Real> body(p, order, score, delta, states);
  if (p.time_varying || p.transition_batch_stride || p.time < 2) return run(parallel, p.batch, p.threads, body);
  const MaxArcs<Real> shared((const Real *)p.transition, p.states);
  if (!shared.allocated()) return HMM_OUT_OF_MEMORY;
  body.shared = &shared;
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> struct TopK : Status {
  const hmm_problem &p;
  const int64_t *order;
  int64_t k;
  const MaxArcs<Real> *shared = nullptr;
  Real *score;
  int64_t *states;
  explicit TopK(const hmm_problem &problem) : p(problem) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    for (int64_t n = worker; n < p.batch; n += workers) {
      const int64_t b = order[n];
      const Sequence<Real> q(p, b);
      const Paths<Real> paths = {score + b, states + b * p.time, p.batch, p.batch * p.time};
      std::optional<MaxArcs<Real>> own;
      if (!shared && !p.time_varying) own.emplace(q.transition, p.time > 1 ? p.states : 0);
      if (own && !own->allocated()) return out_of_memory();
      if (!topk_sequence(q, own ? &*own : shared, k, p.time, paths)) return out_of_memory();
    }
  }
};

template <class Real>
int topk(const hmm_problem &p, const int64_t *order, Parallel parallel, int64_t k, Real *score, int64_t *states) {
  if (k < 1 || k > std::numeric_limits<int32_t>::max() / p.states) return HMM_INVALID_ARGUMENT;
  TopK<Real> body(p);
  body.order = order, body.k = k, body.score = score, body.states = states;
  if (p.time_varying || p.transition_batch_stride || p.time < 2) return run(parallel, p.batch, p.threads, body);
  const MaxArcs<Real> shared((const Real *)p.transition, p.states);
  if (!shared.allocated()) return HMM_OUT_OF_MEMORY;
  body.shared = &shared;
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> struct Sample : Status {
  const hmm_problem &p;
  int64_t samples;
  const Columns<Real> *shared[2] = {};  // for log messages, for scaled ones
  const Real *log_partition, *alpha, *uniform;
  const int32_t *method;
  int64_t *states;
  explicit Sample(const hmm_problem &problem) : p(problem) {}

  static bool log_messages(const Sequence<Real> &q, Real *alpha) {
    const LogMessages<Real> exact(q);
    if (!exact.allocated()) return false;
    for (int64_t k = 0; k < q.length * q.states; k++) alpha[k] = Real(exact.alpha[k]);
    return true;
  }
  bool feasible(int64_t b) const { return log_partition[b] - log_partition[b] == 0; }

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states, padded = round_up(N, kLanes<Real>);
    Scratch<Real> rows(2 * padded);
    Scratch<double> sums(padded / kLanes<Real>);
    if (!rows.data || !sums.data) return out_of_memory();
    for (int64_t b = worker; b < p.batch; b += workers) {
      const Sequence<Real> q(p, b);
      for (int64_t s = 0; s < samples; s++)
        for (int64_t t = feasible(b) ? q.length : 0; t < p.time; t++) states[(s * p.batch + b) * p.time + t] = -1;
      if (!feasible(b)) continue;
      const bool redone = method[b] == HMM_REDONE, scaled = method[b] == HMM_SCALED;
      Scratch<Real> messages(redone ? q.length * N : 0);
      if (!messages.data || (redone && !log_messages(q, messages))) return out_of_memory();
      std::optional<Columns<Real>> own;
      if (!one_matrix(p) && worth_columns(p, samples * q.length)) own.emplace(q.transition, N, scaled);
      if (own && !own->data.data) return out_of_memory();
      Walks<Real> walks = {q, scaled, redone ? (const Real *)messages : alpha + b * p.time * N,
                           own ? &*own : shared[scaled], rows, rows + padded, sums};
      walks.run(samples, p.batch * p.time, uniform + b * p.time, states + b * p.time);
    }
  }
};

template <class Real>
int sample(const hmm_problem &p, Parallel parallel, int64_t samples, const Real *log_partition, const Real *alpha,
           const int32_t *method, const Real *uniform, int64_t *states) {
  for (int64_t b = 0; b < p.batch; b++)
    if (method[b] == HMM_BOTH_ENDS) return HMM_INVALID_ARGUMENT;
  Sample<Real> body(p);
  body.samples = samples, body.log_partition = log_partition, body.alpha = alpha, body.method = method;
  body.uniform = uniform, body.states = states;
  std::optional<Columns<Real>> columns[2];
  if (one_matrix(p)) {
    const FlushToZero flush;
    int64_t walked[2] = {};
    for (int64_t b = 0; b < p.batch; b++)
      if (body.feasible(b)) walked[method[b] == HMM_SCALED] += samples * p.lengths[b];
    for (bool scaled : {false, true}) {
      if (!worth_columns(p, walked[scaled])) continue;
      columns[scaled].emplace((const Real *)p.transition, p.states, scaled);
      if (!columns[scaled]->data.data) return HMM_OUT_OF_MEMORY;
      body.shared[scaled] = &*columns[scaled];
    }
  }
  return run(parallel, p.batch, p.threads, body);
}

template <class Real>
constexpr Kernels<Real> table() {
  return {forward<Real>, backward<Real>, viterbi<Real>, topk<Real>, sample<Real>, tangent<Real>,
          {banded_forward<Real>, banded_backward<Real>, banded_viterbi<Real>, banded_sample<Real>},
          {low_rank_forward<Real>, low_rank_backward<Real>}};
}

}  // namespace

#define HMM_STRING(name) #name
#define HMM_NAME(name) HMM_STRING(name)
#define HMM_TABLE_OF(name) hmm_##name
#define HMM_TABLE(name) HMM_TABLE_OF(name)
extern const InstructionSet HMM_TABLE(HMM_TARGET) = {HMM_NAME(HMM_TARGET), table<float>(), table<double>(),
                                             semi_markov::table<float>(), semi_markov::table<double>(),
                                             active::table<float>(), active::table<double>()};
