// Spreads the kernels over sequences and threads. Compiled once for each instruction set, HMM_TARGET naming the table;
// everything else has internal linkage, so that the linker cannot mix code of different instruction sets.
#include "kernels.h"

#include "active_kernels.h"
#include "banded.h"
#include "forward_backward.h"
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

// Arcs that cannot win are left out where finding them costs less than they do.
constexpr int64_t kPruneFrom = 128;
bool prunes(const hmm_problem &p) { return !p.time_varying && p.time > 1 && p.states >= kPruneFrom; }

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
      std::optional<MaxArcs<Real>> own;
      std::optional<PrunedStep<Real>> pruned;
      if (!shared && !p.time_varying)
        own.emplace(Sequence<Real>(p, group.index[0]).transition, p.time > 1 ? p.states : 0, prunes(p));
      if (own && !own->allocated()) return out_of_memory();
      if (prunes(p)) pruned.emplace(own ? *own : *shared, group.size);
      if (pruned && !pruned->allocated()) return out_of_memory();
      viterbi_group(p, own ? &*own : shared, pruned ? &*pruned : nullptr, group, (Real *)rows, score, delta, states);
    }
  }
};

template <class Real>
int viterbi(const hmm_problem &p, const int64_t *order, Parallel parallel, Real *score, Real *delta, int64_t *states) {
  Viterbi<Real> body(p, order, score, delta, states);
  if (p.time_varying || p.transition_batch_stride || p.time < 2) return run(parallel, p.batch, p.threads, body);
  const MaxArcs<Real> shared((const Real *)p.transition, p.states, prunes(p));
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
