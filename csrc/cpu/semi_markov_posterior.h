// Posteriors of semi-Markov chains from the forward pass's messages: the recursions at the head of semi_markov.h, read
// backward, and what they say of each boundary. With ends and starts as there, up to the frames' centres,
//
//   duration count (j, d)   += starts_t(j) w_d(j) / sum_d w_d(j),      w: the window's weights of bstart_t(j)
//   transition count (i, j) += starts_t(j) x_i weight(i, j) / sum_i x_i weight(i, j),      x_i = exp(end_{t-1}(i))
//
// so that a frame adds N D products and one outer product, kept for kBlock frames and added together. Where a sum was
// formed in log space, so are its terms.
#pragma once
#include "semi_markov.h"

namespace {
namespace semi_markov {

// Sums of posteriors over frames (and sequences), of one worker.
struct Counts {
  static constexpr int kBlock = 4;
  int64_t N, padded, D;
  bool arcs, durations;
  Scratch<double> raw, exact, lengths;  // (N, padded) without and with the arc's weight; (2 D, padded) as Durations
  Scratch<double> from, into;           // (kBlock, padded): outer products that wait
  int waiting = 0;

  Counts(int64_t states, int64_t longest, bool with_arcs, bool with_durations)
      : N(states), padded(round_up(states, W)), D(longest), arcs(with_arcs), durations(with_durations),
        raw(arcs ? N * padded : 0), exact(arcs ? N * padded : 0), lengths(durations ? 2 * D * padded : 0),
        from(kBlock * padded), into(kBlock * padded) {}
  bool allocated() const { return raw.data && exact.data && lengths.data && from.data && into.data; }

  // raw(i, j) += sum_k from_k(i) into_k(j).
  void add_waiting() {
    for (int k = waiting; k < kBlock; k++) clear(into.data + k * padded, padded);
    if (waiting)
      for (int64_t j = 0; j < padded; j += W) {
        const V a = load(into + j), b = load(into + padded + j), c = load(into + 2 * padded + j), d = load(into + 3 * padded + j);
        for (int64_t i = 0; i < N; i++)
          store(raw + i * padded + j, load(raw + i * padded + j) + from[i] * a + from[padded + i] * b +
                                          from[2 * padded + i] * c + from[3 * padded + i] * d);
      }
    waiting = 0;
  }

  // The arcs into frame t, `begin` (padded) being starts_t times the upstream gradient. end: end_{t-1}; start: start_t.
  template <class In> void add_arcs(const Arcs<In> &ahead, const double *end, const double *start, const double *begin) {
    const double lowest = std::log(kSafe);
    double *x = from + waiting * padded, *g = into + waiting * padded;
    for (int64_t j = 0; j < padded; j += W) {
      const V top = load(ahead.top + j), s = load_part(start + j, N - j, kNinf), p = load(begin + j);
      const Int<double> safe = s - top >= lowest, redo = ~safe & (p != 0.);
      store(x + j, exp<double>(load_part(end + j, N - j, kNinf)));
      store(g + j, safe ? p * exp<double>(safe ? top - s : V{}) : V{});
      if (!any<double>(redo)) continue;
      for (int64_t k = j; k < j + W; k++)
        for (int64_t i = 0; redo[k - j] && i < N; i++) {
          const double a = end[i] + double(ahead.score(i, k)) - start[k];
          if (a > -745) exact[i * padded + k] += begin[k] * std::exp(a);
        }
    }
    if (++waiting == kBlock) add_waiting();
  }

  // The segments that start at a frame. sum: log_sum_window's; shift: what makes start + bstart a log-posterior.
  template <class In>
  void add_durations(const Window &w, const Durations<In> &scores, int64_t slot, const double *sum, const double *start,
                     double shift, const double *begin, double grad) {
    const int64_t row = scores.row(slot);
    for (int64_t j = 0; j < padded; j += W) {
      const V total = load(sum + j), p = load(begin + j);
      const Int<double> safe = total >= kSafeWindow, some = p != 0.;
      double *count = lengths + row + j;
      if (any<double>(safe & some)) {
        const V f = safe ? p / (safe ? total : splat(1.)) : V{};
        for (int64_t s = 0; s < D; s++, count += padded)
          store(count, load(count) + f * (load(w.weight + s * padded + j) * load(scores.weight + row + s * padded + j)));
        count = lengths + row + j;
      }
      if (!any<double>(~safe & some)) continue;
      const V h = ~safe & some ? load_part(start + j, N - j, kNinf) + load(w.base + j) + shift : splat(kNinf);
      for (int64_t s = 0; s < D; s++, count += padded)
        store(count, load(count) + grad * exp<double>(load(w.score + s * padded + j) + load(scores.score + row + s * padded + j) + h));
    }
  }

  // out (N, N) += the arcs' counts, which are forgotten.
  template <class In> void finish_arcs(const Arcs<In> &ahead, double *out) {
    add_waiting();
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < N; j++)
        out[i * N + j] += exact[i * padded + j] + raw[i * padded + j] * ahead.weight[i * padded + j];
    clear(raw.data, N * padded);
    clear(exact.data, N * padded);
  }

  // out (N, most) += the durations' counts, which are forgotten.
  void finish_durations(int64_t most, double *out) {
    for (int64_t k = 0; k < 2 * D; k++)
      for (int64_t j = 0; j < N; j++) out[j * most + D - 1 - k % D] += lengths[k * padded + j];
    clear(lengths.data, 2 * D * padded);
  }
};

// state (L, N) out: grad p(z_t = j); starts the same for starts_t(j), or null. For a finite log Z.
template <class In>
void backward(const View<In> &q, double grad, const Arcs<In> &ahead, const Arcs<In> &back, const Durations<In> &durations,
              Window &w, const Messages &in, In *state, In *starts, Counts &counts, double *rows /* 6 padded */) {
  const int64_t N = q.states, L = q.length, padded = w.padded;
  double *bend = rows, *bstart = rows + padded, *x = rows + 2 * padded, *sum = rows + 3 * padded, *mass = rows + 4 * padded,
         *begin = rows + 5 * padded;
  clear(mass, padded);
  w.empty();
  double top = kNinf, total = 0;
  const double *last = in.end + (L - 1) * N;
  const auto ending = [&](int64_t j) { return last[j] + (q.final ? double(q.final[j]) : 0.); };
  for (int64_t j = 0; j < N; j++) top = std::fmax(top, ending(j));
  for (int64_t j = 0; j < N; j++) total += std::exp(ending(j) - top);
  double c = -(top + std::log(total));  // log Z less the centres of both directions: of moderate size at every frame
  for (int64_t t = L - 1; t >= 0; t--) {
    const int64_t slot = (L - 1 - t) % w.D;
    const double *start = in.start + t * N, *end = in.end + t * N, shift = c - in.centre[t];
    if (t == L - 1) widen(q.final, N, padded, bend);
    else log_sum_arcs(back, bstart, x, bend);
    for (int64_t j = 0; j < padded; j += W) {
      const V e = load_part(end + j, N - j, kNinf), b = e == kNinf ? e : load(bend + j);  // unreachable: may overflow
      store(bend + j, b);
      store(mass + j, load(mass + j) + exp<double>(e + b + c));
    }
    for (int64_t j = 0; j < N; j++) state[t * N + j] = In(grad * mass[j]);
    w.enter<true>(slot, bend, q.frame(t), N, row_max<In, double>(q.frame(t), N));
    log_sum_window(w, durations, slot, bstart, sum);
    for (int64_t j = 0; j < padded; j += W) {
      const V s = load_part(start + j, N - j, kNinf), b = s == kNinf ? s : load(bstart + j), p = exp<double>(s + b + shift);
      const V left = load(mass + j) - p;
      store(bstart + j, b);
      store(begin + j, grad * p);
      store(mass + j, larger(V{}, left));
    }
    for (int64_t j = 0; starts && j < N; j++) starts[t * N + j] = In(begin[j]);
    if (counts.durations) counts.add_durations(w, durations, slot, sum, start, shift, begin, grad);
    if (counts.arcs && t > 0) counts.add_arcs(ahead, in.end + (t - 1) * N, start, begin);
    const double n = centre_message(bstart, padded);
    w.shift(n);
    c = shift + n;
  }
}

}  // namespace semi_markov
}  // namespace
