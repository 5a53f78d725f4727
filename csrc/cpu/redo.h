// Sequences that the scaled pass in their own precision could not certify, again and exactly: by scaled probabilities in
// float64 where the scores are float32 (666 nats of range instead of 65; about 4 times the cost of the float32 pass),
// and where these cannot be certified either, in log space in float64 (about 40 times). Nothing is kept between the
// passes but the log partition: the backward pass begins with a forward pass of its own.
#pragma once
#include <optional>

#include "log_space.h"
#include "walks.h"

namespace {

// One sequence's scores in float64, as a problem with a batch of one.
struct Widened {
  Scratch<double> initial, emission, final;
  int64_t length;
  hmm_problem problem = {};

  template <class Real>
  Widened(const Sequence<Real> &q)
      : initial(q.states), emission(q.emission ? q.length * q.states : 0), final(q.final ? q.states : 0), length(q.length) {
    if (!allocated()) return;
    for (int64_t j = 0; j < q.states; j++) initial[j] = double(q.initial[j]);
    for (int64_t k = 0; q.emission && k < length * q.states; k++) emission[k] = double(q.emission[k]);
    for (int64_t j = 0; q.final && j < q.states; j++) final[j] = double(q.final[j]);
    problem.batch = 1, problem.time = length, problem.states = q.states, problem.threads = 1;
    problem.initial = initial.data, problem.lengths = &length;
    problem.emission = q.emission ? emission.data : nullptr, problem.final = q.final ? final.data : nullptr;
  }
  bool allocated() const { return initial.data && emission.data && final.data; }
  Group group() const {
    Group g;
    g.add(0, 0, length, false);
    return g;
  }
};

// Messages of one sequence in log space, in float64.
template <class Real> struct LogMessages {
  const Sequence<Real> q;
  Scratch<double> alpha, norm, centre, rows;
  double log_partition = 0;

  explicit LogMessages(const Sequence<Real> &sequence)
      : q(sequence), alpha(q.length * q.states), norm(q.length * q.states), centre(q.length),
        rows(3 * round_up(q.states, 4 * kLanes<double>)) {
    if (allocated()) log_partition = forward_log_space<Real, double>(q, alpha, norm, centre, rows);
  }
  bool allocated() const { return alpha.data && norm.data && centre.data && rows.data; }
};

// A worker's way to redo sequences; shared transitions are widened and packed once, when first needed. The functions
// return false when memory runs out.
template <class Real> struct Redo {
  const hmm_problem &p;
  std::optional<Arcs<double>> arcs;
  int64_t arcs_of = -1;

  explicit Redo(const hmm_problem &problem) : p(problem) {}

  bool forward(int64_t b, double &log_partition) {
    if constexpr (sizeof(Real) == 4) {
      const Sequence<Real> q(p, b);
      const Widened wide(q);
      const Scratch<double> alpha(q.length * q.states), centre(q.length);
      if (!wide.allocated() || !alpha.data || !centre.data || !pack(b)) return false;
      int32_t method = HMM_REDONE;
      if (!scaled_forward(wide, alpha, centre, log_partition, method)) return false;
      if (method == HMM_SCALED) return true;
    }
    const LogMessages<Real> exact(Sequence<Real>(p, b));
    log_partition = exact.log_partition;
    return exact.allocated();
  }

  // state (L, N) is written; edge (N, N), null to skip, is added to.
  bool backward(int64_t b, Real grad, Real *state, Real *edge) {
    const Sequence<Real> q(p, b);
    const int64_t N = q.states;
    const Scratch<double> edges(edge ? N * N : 0);
    if (!edges.data) return false;
    bool done = false;
    if constexpr (sizeof(Real) == 4)
      if (!scaled_backward(b, double(grad), state, edge ? (double *)edges : nullptr, done)) return false;
    if (!done) {
      const LogMessages<Real> exact(q);
      if (!exact.allocated()) return false;
      backward_log_space(q, double(grad), exact.log_partition, (const double *)exact.alpha, (const double *)exact.norm,
                         (const double *)exact.centre, state, edge ? (double *)edges : nullptr, 0, (double *)exact.rows);
    }
    for (int64_t k = 0; edge && k < N * N; k++) edge[k] += Real(edges[k]);
    return true;
  }

 private:
  bool pack(int64_t b) {
    const int64_t wanted = p.transition_batch_stride ? b : 0;
    if (arcs_of == wanted) return true;
    const int64_t numbers = p.states * p.states;
    const Scratch<double> wide(numbers);
    if (!wide.data) return false;
    const Real *narrow = Sequence<Real>(p, b).transition;
    for (int64_t k = 0; k < numbers; k++) wide[k] = double(narrow[k]);
    arcs.emplace(wide, p.states, p.time, true);
    arcs_of = wanted;
    return arcs->allocated();
  }

  bool scaled_forward(const Widened &wide, double *alpha, double *centre, double &log_partition, int32_t &method) {
    if (!arcs->usable) return true;
    Scratch<double> rows(group_rows(1) * arcs->padded);
    if (!rows.data) return false;
    Ends ends;
    Alone alone;
    forward_group(wide.problem, *arcs, wide.group(), (double *)rows, alpha, centre, ends, alone);
    if (ends.lost[0]) return true;
    method = HMM_SCALED;
    log_partition = wide.length ? ends.taken[0] + std::log(ends.total[0]) : 0;
    return true;
  }

  bool scaled_backward(int64_t b, double grad, Real *state, double *edges, bool &done) {
    const Sequence<Real> q(p, b);
    const int64_t N = q.states, L = q.length;
    const Widened wide(q);
    const Scratch<double> alpha(L * N), centre(L), wide_state(L * N);
    if (!wide.allocated() || !alpha.data || !centre.data || !wide_state.data || !pack(b)) return false;
    double log_partition = 0;
    int32_t method = HMM_REDONE;
    if (!scaled_forward(wide, alpha, centre, log_partition, method)) return false;
    if (method != HMM_SCALED) return true;
    Counts<double> counts(edges ? N : 0, &grad, 1);
    Scratch<double> rows(group_rows(1) * arcs->padded);
    if (!counts.allocated() || !rows.data) return false;
    Counting<double> counting = {edges ? &counts : nullptr};
    Alone alone;
    backward_group(wide.problem, *arcs, wide.group(), (double *)rows, &grad, (const double *)alpha,
                   (const double *)centre, (double *)wide_state, counting, alone);
    counting.finish(*arcs, 1, edges, false, alone);
    for (int64_t k = 0; k < L * N; k++) state[k] = Real(wide_state[k]);
    done = true;
    return true;
  }
};

}  // namespace
