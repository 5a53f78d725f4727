// Spreads the kernels over sequences and threads. Compiled once for each instruction set, HMM_TARGET naming the table;
// everything else has internal linkage, so that the linker cannot mix code of different instruction sets.
#include "kernels.h"

#include "parallel.h"
#include "redo.h"
#include "tangent.h"
#include "viterbi.h"

namespace {

// Sequences (in the order of falling length) that go together: full groups, then what is left in powers of two, so that
// few rows of a product are idle. Groups are no larger than an even share of the threads.
struct Grouping {
  const int64_t *order, *lengths;
  int64_t batch;
  int most;
  Grouping(const hmm_problem &p, const int64_t *sorted) : order(sorted), lengths(p.lengths), batch(p.batch) {
    const int64_t share = (p.batch + p.threads - 1) / p.threads;
    most = p.transition_batch_stride ? 1 : share >= 7 ? 8 : share >= 3 ? 4 : share >= 2 ? 2 : 1;
  }
  // The group from position `at` on.
  Group group(int64_t at) const {
    const int64_t left = batch - at;
    int64_t size = most;
    while (size > 1 && left < size - (size > 2)) size /= 2;
    Group g;
    g.size = int(left < size ? left : size);
    for (int m = 0; m < g.size; m++) {
      g.index[m] = order[at + m];
      g.length[m] = lengths[order[at + m]];
    }
    return g;
  }
};

template <class Real> struct Forward : Status {
  const hmm_problem &p;
  Grouping grouping;
  const Arcs<Real> *shared;
  Real *log_partition, *alpha, *norm, *centre;
  int32_t *method;

  Forward(const hmm_problem &problem, const int64_t *order) : p(problem), grouping(problem, order) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    for (int64_t b = worker; b < p.batch; b += workers) {
      clear_rest(alpha, b, p.states);
      clear_rest(centre, b, 1);
    }
    if (p.time_varying) return log_space(worker, workers);
    Scratch<Real> rows(kGroupRows * round_up(p.states, kPanel<Real>));
    if (!rows.data) return out_of_memory();
    Redo<Real> redo(p);
    int64_t at = 0;
    for (int64_t k = 0; at < p.batch; k++) {
      const Group group = grouping.group(at);
      at += group.size;
      if (k % workers != worker) continue;
      if (shared) scaled(*shared, group, rows);
      else {
        const Arcs<Real> own(Sequence<Real>(p, group.index[0]).transition, p.states, p.time, false);
        if (!own.allocated()) return out_of_memory();
        scaled(own, group, rows);
      }
      for (int m = 0; m < group.size; m++) {
        const int64_t b = group.index[m];
        if (method[b] != HMM_REDONE) continue;
        double z;
        if (!redo.forward(b, z)) return out_of_memory();
        log_partition[b] = Real(z);
        clear(alpha + b * p.time * p.states, p.lengths[b] * p.states);  // of no use, but the same bits every time
        clear(centre + b * p.time, p.lengths[b]);
      }
    }
  }

  // What lies past a sequence's end is 0, so that equal inputs give equal outputs, bit for bit.
  void clear_rest(Real *x, int64_t b, int64_t width) {
    clear(x + (b * p.time + p.lengths[b]) * width, (p.time - p.lengths[b]) * width);
  }

  void scaled(const Arcs<Real> &arcs, const Group &group, Real *rows) {
    if (arcs.usable) forward_group(p, arcs, group, rows, log_partition, alpha, centre, method);
    else
      for (int m = 0; m < group.size; m++) method[group.index[m]] = HMM_REDONE;
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

template <class Real> struct Backward : Status {
  const hmm_problem &p;
  Grouping grouping;
  const Arcs<Real> *shared;
  const Real *grad, *log_partition, *alpha, *norm, *centre;
  const int32_t *method;
  Real *state, *edge;
  Real *partial;  // (workers, N, N): each worker's share of a gradient summed over the batch

  Backward(const hmm_problem &problem, const int64_t *order) : p(problem), grouping(problem, order) {}

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
      if (!groups(worker, workers, rows, mine, redo)) out_of_memory();
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
      one.size = 1, one.index[0] = b, one.length[0] = p.lengths[b];
      Counts<Real> counts(mine ? N : 0, grad + b, 1);
      if (!own.allocated() || !counts.allocated()) return out_of_memory();
      backward_group(p, own, one, (Real *)rows, grad, alpha, centre, state, mine ? &counts : nullptr);
      if (mine) counts.finish(own, mine);
    }
  }

  bool groups(int worker, int workers, Real *rows, Real *mine, Redo<Real> &redo) {
    Counts<Real> counts(mine ? p.states : 0, grad, p.batch);
    if (!counts.allocated()) return false;
    int64_t at = 0;
    for (int64_t k = 0; at < p.batch; k++) {
      const Group all = grouping.group(at);
      at += all.size;
      if (k % workers != worker) continue;
      Group scaled;
      for (int m = 0; m < all.size; m++) {
        const int64_t b = all.index[m];
        if (method[b] == HMM_REDONE) {
          if (!redo.backward(b, grad[b], state + b * p.time * p.states, mine)) return false;
          continue;
        }
        if (grad[b] == 0) {
          clear(state + b * p.time * p.states, p.lengths[b] * p.states);
          continue;
        }
        scaled.index[scaled.size] = b;
        scaled.length[scaled.size++] = p.lengths[b];
      }
      if (scaled.size) backward_group(p, *shared, scaled, rows, grad, alpha, centre, state, mine ? &counts : nullptr);
    }
    if (mine) counts.finish(*shared, mine);
    return true;
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

template <class Real>
int forward(const hmm_problem &p, const int64_t *order, Parallel parallel, Real *log_partition, Real *alpha, Real *norm,
            Real *centre, int32_t *method) {
  if (p.batch == 0) return HMM_OK;
  Forward<Real> body(p, order);
  body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre, body.method = method;
  if (p.time_varying || p.transition_batch_stride) {
    body.shared = nullptr;
    return run(parallel, p.batch, p.threads, body);
  }
  const FlushToZero flush;
  const Arcs<Real> shared((const Real *)p.transition, p.states, p.time, false);
  if (!shared.allocated()) return HMM_OUT_OF_MEMORY;
  body.shared = &shared;
  return run(parallel, p.batch, p.threads, body);
}

template <class Real>
int backward(const hmm_problem &p, const int64_t *order, Parallel parallel, const Real *grad, const Real *log_partition,
             const Real *alpha, const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge) {
  if (p.batch == 0) {
    if (edge && !p.time_varying && !p.transition_batch_stride) clear(edge, p.states * p.states);
    return HMM_OK;
  }
  Backward<Real> body(p, order);
  body.grad = grad, body.log_partition = log_partition, body.alpha = alpha, body.norm = norm, body.centre = centre;
  body.method = method, body.state = state, body.edge = edge, body.shared = nullptr, body.partial = nullptr;
  if (p.time_varying || p.transition_batch_stride) return run(parallel, p.batch, p.threads, body);
  const FlushToZero flush;
  const int64_t N = p.states;
  const Arcs<Real> shared((const Real *)p.transition, N, p.time, true);
  const int workers = int(p.batch < p.threads ? p.batch : p.threads);
  const Scratch<Real> partial(edge ? workers * N * N : 0);
  if (!shared.allocated() || !partial.data) return HMM_OUT_OF_MEMORY;
  body.shared = &shared, body.partial = partial;
  const int status = run(parallel, p.batch, p.threads, body);
  if (edge) {
    std::memcpy(edge, partial, N * N * sizeof(Real));
    for (int worker = 1; worker < workers; worker++)
      for (int64_t k = 0; k < N * N; k++) edge[k] += partial[worker * N * N + k];
  }
  return status;
}

template <class Real> struct Viterbi : Status {
  const hmm_problem &p;
  Real *score, *delta;
  int64_t *states;
  Viterbi(const hmm_problem &problem, Real *s, Real *d, int64_t *z) : p(problem), score(s), delta(d), states(z) {}
  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Scratch<Real> rows(round_up(p.states, 4 * kLanes<Real>));
    if (!rows.data) return out_of_memory();
    for (int64_t b = worker; b < p.batch; b += workers) {
      int64_t *path = states + b * p.time;
      score[b] = Real(viterbi_sequence(Sequence<Real>(p, b), delta + b * p.time * p.states, path, (Real *)rows));
      for (int64_t t = p.lengths[b]; t < p.time; t++) path[t] = -1;
    }
  }
};

template <class Real> int viterbi(const hmm_problem &p, Parallel parallel, Real *score, Real *delta, int64_t *states) {
  Viterbi<Real> body(p, score, delta, states);
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> struct Sample : Status {
  const hmm_problem &p;
  int64_t samples;
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

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states;
    Scratch<Real> rows(2 * round_up(N, kLanes<Real>)), columns(p.time_varying ? 0 : N * N);
    if (!rows.data || !columns.data) return out_of_memory();
    for (int64_t b = worker; b < p.batch; b += workers) {
      const Sequence<Real> q(p, b);
      if (!p.time_varying && p.time > 1 && (b == worker || p.transition_batch_stride))
        for (int64_t i = 0; i < N; i++)
          for (int64_t j = 0; j < N; j++) columns[j * N + i] = q.transition[i * N + j];
      const bool feasible = log_partition[b] - log_partition[b] == 0, redone = feasible && method[b] == HMM_REDONE;
      Scratch<Real> messages(redone ? q.length * N : 0);
      if (!messages.data || (redone && !log_messages(q, messages))) return out_of_memory();
      for (int64_t s = 0; s < samples; s++) {
        int64_t *path = states + (s * p.batch + b) * p.time;
        for (int64_t t = feasible ? q.length : 0; t < p.time; t++) path[t] = -1;
        if (feasible)
          sample_sequence(q, method[b] == HMM_SCALED, redone ? (const Real *)messages : alpha + b * p.time * N,
                          p.time_varying ? nullptr : (Real *)columns, uniform + (s * p.batch + b) * p.time, path, (Real *)rows);
      }
    }
  }
};

template <class Real>
int sample(const hmm_problem &p, Parallel parallel, int64_t samples, const Real *log_partition, const Real *alpha,
           const int32_t *method, const Real *uniform, int64_t *states) {
  Sample<Real> body(p);
  body.samples = samples, body.log_partition = log_partition, body.alpha = alpha, body.method = method;
  body.uniform = uniform, body.states = states;
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> constexpr Kernels<Real> table() { return {forward<Real>, backward<Real>, viterbi<Real>, sample<Real>, tangent<Real>}; }

}  // namespace

#define HMM_STRING(name) #name
#define HMM_NAME(name) HMM_STRING(name)
#define HMM_TABLE_OF(name) hmm_##name
#define HMM_TABLE(name) HMM_TABLE_OF(name)
extern const InstructionSet HMM_TABLE(HMM_TARGET) = {HMM_NAME(HMM_TARGET), table<float>(), table<double>()};
