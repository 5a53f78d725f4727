// Spreads the kernels of active.h and active_log.h over sequences and threads. Sequences are claimed in the order of falling
// length. A gradient that is summed over the batch has a partial sum (N, N) for each share of the work but the first.
#pragma once
#include <optional>

#include "active.h"
#include "parallel.h"

namespace {
namespace active {

inline int64_t all_frames(const hmm_active_problem &p) {
  int64_t frames = 0;
  for (int64_t b = 0; b < p.batch; b++) frames += p.lengths[b];
  return frames;
}

// The table of a transition that all sequences share, if it is worth making.
template <class Real> struct SharedTable {
  const Table<Real> *table = nullptr;
  std::optional<Table<Real>> made;
  bool allocated = true;
  explicit SharedTable(const hmm_active_problem &p) {
    if (p.transition_batch_stride || !wants_table(p, all_frames(p))) return;
    const FlushToZero flush;
    made.emplace(p.states);
    allocated = made->allocated();
    if (!allocated) return;
    made->fill((const Real *)p.transition);
    table = &*made;
  }
};

// The blocks of one share of the work: from the shared table, or from one of its own for each long enough sequence.
template <class Real> struct ShareBlocks {
  const hmm_active_problem &p;
  const Table<Real> *shared;
  std::optional<Table<Real>> own;
  Blocks<Real> blocks;
  ShareBlocks(const hmm_active_problem &problem, const Table<Real> *table) : p(problem), shared(table), blocks(problem) {}

  // Null when memory runs out.
  Blocks<Real> *of(const ActiveSequence<Real> &q) {
    if (!blocks.allocated()) return nullptr;
    const bool table = p.transition_batch_stride && wants_table(p, q.length);
    if (table && !own) own.emplace(p.states);
    if (table && !own->allocated()) return nullptr;
    if (table) own->fill(q.transition);
    blocks.use(q.transition, table ? &*own : shared);
    return &blocks;
  }
};

template <class Real> struct Forward : Status {
  const hmm_active_problem &p;
  const int64_t *order;
  const Table<Real> *shared;
  Real *log_partition, *alpha;
  int32_t *method;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    ShareBlocks<Real> blocks(p, shared);
    ActiveRows<Real> rows(p.slots);
    if (!rows.allocated()) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k], at = b * p.time * p.slots, used = p.lengths[b] * p.slots;
      const ActiveSequence<Real> q(p, b);
      Blocks<Real> *mine = blocks.of(q);
      if (!mine) return out_of_memory();
      double z = 0;
      method[b] = forward_active(q, *mine, rows, alpha + at, z) ? HMM_SCALED : HMM_REDONE;
      if (method[b] == HMM_REDONE) {
        const ActiveLog<Real> exact(q);
        if (!exact.allocated()) return out_of_memory();
        z = exact.log_partition;
        clear(alpha + at, used);  // of no use, but the same bits every time
      }
      log_partition[b] = Real(z);
      clear(alpha + at + used, p.time * p.slots - used);
    }
  }
};

template <class Real> struct Backward : Status {
  const hmm_active_problem &p;
  const int64_t *order;
  const Table<Real> *shared;
  const Real *grad, *alpha;
  const int32_t *method;
  Real *state, *edge;
  int64_t edge_batch_stride;
  Real *partial;  // (workers - 1, N, N)

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t arcs = p.states * p.states;
    Real *const sum = worker ? partial + (worker - 1) * arcs : edge;
    if (edge && !edge_batch_stride) clear(sum, arcs);
    ShareBlocks<Real> blocks(p, shared);
    ActiveRows<Real> rows(p.slots);
    if (!rows.allocated()) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k], at = b * p.time * p.slots, used = p.lengths[b] * p.slots;
      const ActiveSequence<Real> q(p, b);
      Real *const counts = !edge ? nullptr : edge_batch_stride ? edge + b * edge_batch_stride : sum;
      if (edge && edge_batch_stride) clear(counts, arcs);
      clear(state + at + used, p.time * p.slots - used);
      if (method[b] == HMM_REDONE) {
        ActiveLog<Real> exact(q);
        if (!exact.allocated() || !exact.backward(double(grad[b]), state + at, counts)) return out_of_memory();
      } else if (grad[b] == 0) {
        clear(state + at, used);
      } else {
        Blocks<Real> *mine = blocks.of(q);
        if (!mine) return out_of_memory();
        backward_active(q, *mine, rows, alpha + at, grad[b], state + at, counts);
      }
    }
  }
};

template <class Real>
int forward(const hmm_active_problem &p, const int64_t *order, Parallel parallel, Real *log_partition, Real *alpha,
            int32_t *method) {
  const SharedTable<Real> shared(p);
  if (!shared.allocated) return HMM_OUT_OF_MEMORY;
  Forward<Real> body{{}, p, order, shared.table, log_partition, alpha, method};
  return run(parallel, p.batch, p.threads, body);
}

template <class Real>
int backward(const hmm_active_problem &p, const int64_t *order, Parallel parallel, const Real *grad, const Real *alpha,
             const int32_t *method, Real *state, Real *edge, int64_t edge_batch_stride) {
  const SharedTable<Real> shared(p);
  const int64_t arcs = p.states * p.states;
  const int others = int(p.batch < p.threads ? p.batch : p.threads) - 1;
  const Pages<Real> partial(edge && !edge_batch_stride && others > 0 ? others * arcs : 0);
  if (!shared.allocated || !partial.data) return HMM_OUT_OF_MEMORY;
  Backward<Real> body{{}, p, order, shared.table, grad, alpha, method, state, edge, edge_batch_stride, partial.data};
  const int status = run(parallel, p.batch, p.threads, body);
  for (int k = 0; edge && !edge_batch_stride && k < others; k++)
    for (int64_t n = 0; n < arcs; n++) edge[n] += partial.data[k * arcs + n];
  return status;
}

template <class Real> struct Viterbi : Status {
  const hmm_active_problem &p;
  const int64_t *order;
  Real *score, *back;
  int64_t *states;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    ActivePaths<Real> rows(p.slots);
    if (!rows.allocated()) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k];
      int64_t *path = states + b * p.time;
      Real *mine = back + b * p.time * p.slots;
      score[b] = Real(viterbi_active(ActiveSequence<Real>(p, b), rows, mine, path));
      for (int64_t t = p.lengths[b]; t < p.time; t++) path[t] = -1;
    }
  }
};

template <class Real>
int viterbi(const hmm_active_problem &p, const int64_t *order, Parallel parallel, Real *score, Real *back, int64_t *states) {
  Viterbi<Real> body{{}, p, order, score, back, states};
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> struct Sample : Status {
  const hmm_active_problem &p;
  const int64_t *order;
  int64_t samples;
  const Real *log_partition, *alpha;
  const int32_t *method;
  const Real *uniform;
  int64_t *states;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Scratch<Real> rows(2 * p.slots + 64);
    if (!rows.data) return out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k];
      const ActiveSequence<Real> q(p, b);
      const bool feasible = log_partition[b] - log_partition[b] == 0, redone = feasible && method[b] == HMM_REDONE;
      Scratch<Real> logs(redone ? q.length * q.slots : 0);
      if (!logs.data || (redone && !log_messages(q, logs))) return out_of_memory();
      for (int64_t s = 0; s < samples; s++) {
        const int64_t at = (s * p.batch + b) * p.time;
        for (int64_t t = feasible ? q.length : 0; t < p.time; t++) states[at + t] = -1;
        const Real *messages = redone ? (const Real *)logs : alpha + b * p.time * p.slots;
        if (feasible) sample_active(q, !redone, messages, uniform + at, states + at, (Real *)rows);
      }
    }
  }

  static bool log_messages(const ActiveSequence<Real> &q, Real *out) {
    const ActiveLog<Real> exact(q);
    if (!exact.allocated()) return false;
    for (int64_t k = 0; k < q.length * q.slots; k++) out[k] = Real(exact.alpha[k]);
    return true;
  }
};

template <class Real>
int sample(const hmm_active_problem &p, const int64_t *order, Parallel parallel, int64_t samples, const Real *log_partition,
           const Real *alpha, const int32_t *method, const Real *uniform, int64_t *states) {
  Sample<Real> body{{}, p, order, samples, log_partition, alpha, method, uniform, states};
  return run(parallel, p.batch, p.threads, body);
}

template <class Real> constexpr ActiveKernels<Real> table() {
  return {forward<Real>, backward<Real>, viterbi<Real>, sample<Real>};
}

}  // namespace active
}  // namespace
