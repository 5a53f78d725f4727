// Spreads the semi-Markov kernels over sequences and threads: the longest first, each worker with tables of its own.
#pragma once
#include "parallel.h"
#include "semi_markov_paths.h"
#include "semi_markov_posterior.h"

namespace {
namespace semi_markov {

// What one worker keeps: tables of the scores, made again for each sequence only where they differ, the ring and rows.
template <class In> struct Workplace {
  const hmm_semi_markov &p;
  int64_t longest;
  std::optional<Arcs<In>> ahead, back;
  std::optional<Durations<In>> durations;
  Window window;
  Scratch<double> rows;

  explicit Workplace(const hmm_semi_markov &problem)
      : p(problem), longest(p.max_duration < p.time ? p.max_duration : p.time > 1 ? p.time : 1), window(longest, p.states),
        rows(6 * window.padded) {}

  // Returns false where there is no memory.
  bool prepare(const View<In> &q, bool forward, bool backward) {
    if (forward && (!ahead || p.transition_batch_stride)) ahead.emplace(q.transition, p.states, false);
    if (backward && (!back || p.transition_batch_stride)) back.emplace(q.transition, p.states, true);
    if (!durations || p.durations_batch_stride) durations.emplace(q, longest);
    return (!forward || ahead->allocated()) && (!backward || back->allocated()) && durations->allocated() &&
           window.allocated() && rows.data;
  }
};

template <class In> struct Forward : Status {
  const hmm_semi_markov &p;
  const int64_t *order;
  In *log_partition;
  double *messages, *centre;
  explicit Forward(const hmm_semi_markov &problem) : p(problem) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Workplace<In> place(p);
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k];
      const View<In> q(p, b);
      const Messages out(p, b, messages, centre);
      if (!place.prepare(q, true, false)) return out_of_memory();
      log_partition[b] = In(forward(q, *place.ahead, *place.durations, place.window, out, place.rows));
      if (out.start) out.clear_rest(p, q.length);
    }
  }
};

template <class In> struct Backward : Status {
  const hmm_semi_markov &p;
  const int64_t *order;
  const In *grad, *log_partition;
  double *messages, *centre;
  In *state, *starts, *arcs, *durations;
  double *partial_arcs, *partial_durations;  // each worker's share of what is summed over the batch, or one sequence's
  explicit Backward(const hmm_semi_markov &problem) : p(problem) {}

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t N = p.states, size = N * N, lengths = N * p.max_duration;
    Workplace<In> place(p);
    Counts counts(N, place.longest, arcs, durations);
    if (!counts.allocated()) return out_of_memory();
    double *my_arcs = arcs ? partial_arcs + worker * size : nullptr;
    double *my_durations = durations ? partial_durations + worker * lengths : nullptr;
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k], at = b * p.time * N, L = p.lengths[b];
      if (!place.prepare(View<In>(p, b), true, true)) return out_of_memory();
      sequence(b, place, counts);
      clear(state + at + L * N, (p.time - L) * N);
      if (starts) clear(starts + at + L * N, (p.time - L) * N);
      if (arcs && p.transition_batch_stride) {
        counts.finish_arcs(*place.ahead, my_arcs);
        move(my_arcs, size, arcs + b * size);
      }
      if (durations && p.durations_batch_stride) {
        counts.finish_durations(p.max_duration, my_durations);
        move(my_durations, lengths, durations + b * lengths);
      }
    }
    if (arcs && !p.transition_batch_stride) counts.finish_arcs(*place.ahead, my_arcs);
    if (durations && !p.durations_batch_stride) counts.finish_durations(p.max_duration, my_durations);
  }

  static void move(double *from, int64_t n, In *to) {
    for (int64_t k = 0; k < n; k++) to[k] = In(from[k]);
    clear(from, n);
  }

  void sequence(int64_t b, Workplace<In> &place, Counts &counts) {
    const View<In> q(p, b);
    const int64_t at = b * p.time * q.states, size = q.length * q.states;
    const In z = log_partition[b];
    In *mine = starts ? starts + at : nullptr;
    if (size == 0) return;
    if (z - z == 0 && grad[b] != 0) {
      backward(q, double(grad[b]), *place.ahead, *place.back, *place.durations, place.window,
               Messages(p, b, messages, centre), state + at, mine, counts, place.rows);
      return;
    }
    const bool nan = z != z;
    const In fill = nan ? std::numeric_limits<In>::quiet_NaN() : In(0);
    for (int64_t k = 0; k < size; k++) state[at + k] = fill;
    for (int64_t k = 0; mine && k < size; k++) mine[k] = fill;
    for (int64_t k = 0; nan && counts.arcs && q.length > 1 && k < counts.N * counts.padded; k++) counts.exact[k] = double(fill);
    for (int64_t k = 0; nan && counts.durations && k < counts.D * counts.padded; k++) counts.lengths[k] = double(fill);
  }
};

template <class In> struct Paths : Status {
  const hmm_semi_markov &p;
  double *messages, *centre;
  int64_t *states;
  uint8_t *starts;
  explicit Paths(const hmm_semi_markov &problem) : p(problem) {}

  // A path of sequence b, -1 and 0 past its end and where none is feasible.
  template <class Choose>
  void path(const View<In> &q, int64_t b, int64_t row, bool feasible, const double *most, double *scratch, int64_t longest, Choose choose) {
    int64_t *z = states + row * p.time;
    uint8_t *s = starts + row * p.time;
    const int64_t L = feasible ? q.length : 0;
    if (feasible) walk(q, longest, most, Messages(p, b, messages, centre), z, s, scratch, choose);
    for (int64_t t = L; t < p.time; t++) z[t] = -1, s[t] = 0;
  }
};

template <class In> struct Viterbi : Paths<In> {
  using Paths<In>::p;
  const int64_t *order;
  In *score;
  using Paths<In>::Paths;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    Workplace<In> place(p);
    const int64_t N = p.states, padded = place.window.padded;
    Scratch<double> scratch(N > place.longest ? N : place.longest), arcs(N * padded), most(p.time);
    if (!scratch.data || !arcs.data || !most.data) return this->out_of_memory();
    for (int64_t k = worker; k < p.batch; k += workers) {
      const int64_t b = order[k];
      const View<In> q(p, b);
      if (!place.prepare(q, false, false)) return this->out_of_memory();
      if (k == worker || p.transition_batch_stride)
        for (int64_t i = 0; i < N; i++) widen(q.transition + i * N, N, padded, arcs + i * padded);
      frame_maxima(q, most);
      const Messages out(p, b, this->messages, this->centre);
      const double best = best_messages(q, arcs, *place.durations, place.window, most, out, place.rows);
      out.clear_rest(p, q.length);
      score[b] = In(best);
      this->path(q, b, b, best - best == 0, most, scratch, place.longest, choose_best);
    }
  }
};

template <class In> struct Sample : Paths<In> {
  using Paths<In>::p;
  int64_t samples;
  const In *log_partition;
  const double *uniform;
  using Paths<In>::Paths;

  void operator()(int worker, int workers) {
    const FlushToZero flush;
    const int64_t longest = p.max_duration < p.time ? p.max_duration : p.time;
    Scratch<double> scratch(p.states > longest ? p.states : longest), most(p.time);
    if (!scratch.data || !most.data) return this->out_of_memory();
    for (int64_t b = worker; b < p.batch; b += workers) {
      const View<In> q(p, b);
      const bool feasible = log_partition[b] - log_partition[b] == 0;
      frame_maxima(q, most);
      for (int64_t s = 0; s < samples; s++) {
        const int64_t row = s * p.batch + b;
        this->path(q, b, row, feasible, most, scratch, longest, ChooseDrawn{uniform + 2 * row * p.time});
      }
    }
  }
};

template <class In>
int run_forward(const hmm_semi_markov &p, const int64_t *order, Parallel parallel, In *log_partition, double *messages, double *centre) {
  Forward<In> body(p);
  body.order = order, body.log_partition = log_partition, body.messages = messages, body.centre = centre;
  return p.batch ? run(parallel, p.batch, p.threads, body) : HMM_OK;
}

// out (n) = the sum of `workers` rows, in their order.
template <class In> void add_shares(const double *partial, int workers, int64_t n, In *out) {
  for (int64_t k = 0; k < n; k++) {
    double sum = 0;
    for (int worker = 0; worker < workers; worker++) sum += partial[worker * n + k];
    out[k] = In(sum);
  }
}

template <class In>
int run_backward(const hmm_semi_markov &p, const int64_t *order, Parallel parallel, const In *grad, const In *log_partition,
                 const double *messages, const double *centre, In *state, In *starts, In *arcs, In *durations) {
  const int workers = int(p.batch < p.threads ? p.batch : p.threads);
  const int64_t size = p.states * p.states, lengths = p.states * p.max_duration;
  const Scratch<double> partial_arcs(arcs ? workers * size : 0), partial_durations(durations ? workers * lengths : 0);
  if (!partial_arcs.data || !partial_durations.data) return HMM_OUT_OF_MEMORY;
  Backward<In> body(p);
  body.order = order, body.grad = grad, body.log_partition = log_partition;
  body.messages = const_cast<double *>(messages), body.centre = const_cast<double *>(centre);  // only read
  body.state = state, body.starts = starts, body.arcs = arcs, body.durations = durations;
  body.partial_arcs = partial_arcs, body.partial_durations = partial_durations;
  const int status = p.batch ? run(parallel, p.batch, p.threads, body) : HMM_OK;
  if (arcs && !p.transition_batch_stride) add_shares(partial_arcs, workers, size, arcs);
  if (durations && !p.durations_batch_stride) add_shares(partial_durations, workers, lengths, durations);
  return status;
}

template <class In>
int run_viterbi(const hmm_semi_markov &p, const int64_t *order, Parallel parallel, In *score, double *messages, double *centre,
                int64_t *states, uint8_t *starts) {
  Viterbi<In> body(p);
  body.order = order, body.score = score, body.messages = messages, body.centre = centre, body.states = states;
  body.starts = starts;
  return p.batch ? run(parallel, p.batch, p.threads, body) : HMM_OK;
}

template <class In>
int run_sample(const hmm_semi_markov &p, Parallel parallel, int64_t samples, const In *log_partition, const double *messages,
               const double *centre, const double *uniform, int64_t *states, uint8_t *starts) {
  Sample<In> body(p);
  body.samples = samples, body.log_partition = log_partition, body.uniform = uniform, body.states = states;
  body.starts = starts;
  body.messages = const_cast<double *>(messages), body.centre = const_cast<double *>(centre);  // only read
  return p.batch ? run(parallel, p.batch, p.threads, body) : HMM_OK;
}

template <class In> constexpr SemiMarkovKernels<In> table() {
  return {run_forward<In>, run_backward<In>, run_viterbi<In>, run_sample<In>};
}

}  // namespace semi_markov
}  // namespace
