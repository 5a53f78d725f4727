// Semi-Markov chains: forward-backward over segmentations (explicit-duration HMM: Yu 2010; Sarawagi and
// Cohen 2004).
//
//   start_0(j) = initial(j),   start_t(j) = log sum_i exp(end_{t-1}(i) + phi(i, j))
//   end_t(j)   = log sum_{d=1..min(D, t+1)} exp(start_{t-d+1}(j) + durations(j, d) + e_{t-d+1}(j) + ... + e_t(j))
//   log Z      = log sum_j exp(end_{L-1}(j) + final(j))
//
// and the same read backward: bend_{L-1} = final, bend_t(i) = log sum_j exp(phi(i, j) + bstart_{t+1}(j)), bstart_t(j) =
// log sum_d exp(bend_{t+d-1}(j) + durations(j, d) + the window's emissions). With these,
//
//   p(a segment of j starts at t) = exp(start_t(j) + bstart_t(j) - log Z)    =: starts_t(j)
//   p(a segment of j ends at t)   = exp(end_t(j) + bend_t(j) - log Z)        =: ends_t(j)
//   p(z_t = j)                    = p(z_{t+1} = j) - starts_{t+1}(j) + ends_t(j)
//
// Precision. Everything is float64 inside, whatever the scores' type: a window of 30 frames 500 nats apart is a number
// whose float32 rounding is 1e-3. Messages are centred at each frame. A window's emissions are a difference of running
// sums, of scores less their frame's largest: score_s(j) = start_s(j) - base(j) enters a ring of D slots, where base(j) is the sum of emissions and centres so
// far; a base beyond kFar is added to the ring and begins again at 0, so that differences stay accurate for any T and any
// outlier. A forbidden frame empties its state's ring: no difference of infinities is formed.
//
// Both sums are products of weights, N^2 + N D multiplications a frame and 4 N exponentials and logarithms: arcs
// exp(phi - column maximum), durations exp(durations - row maximum), ring exp(score - centre(j)), a centre kept until a
// weight would leave e^kHigh or a window's sum fall below kSafeWindow. What is flushed to zero is below 2^-1022. Beside
// it stand factors of at most 1 in a sum over arcs: one of at least kSafe has lost less than 1e-22 N of itself. In a window
// a duration that is flushed stands beside a ring's weight of up to e^kHigh, and the product may have been 1e-177: a sum of
// at least kSafeWindow has lost less than 1e-27 D. Any other is formed again in log space, by maximum and exponentials,
// which is exact for every pattern of -inf and any range.
//
// Cost a frame: forward, N^2 + N D products and 8 N^2 + 16 N D bytes read (from cache, shared by all frames); backward,
// 2 N^2 + 3 N D products and 24 N^2 + 56 N D bytes. At N = 50, D = 30 forward is 500 vector products and 28 exponentials
// and logarithms of about 25 operations: 0.17 us at two operations a cycle and 3.5 GHz (a count, not a measurement).
// Measured, CPU time of one thread with AVX-512: 0.44 us forward, 2.6 times that, and 1.24 us backward; 3.8 and 5 us where
// emissions are 500 nats apart and half of the arcs forbidden, so that most sums are formed again in log space.
// Limits: none on N, T or D. A worker's memory: 8 (3 N^2 + 8 N D) bytes, N rounded up to whole vectors.
#pragma once
#include <optional>

#include "log_space.h"

namespace {
namespace semi_markov {

using V = Vec<double>;
constexpr int W = kLanes<double>;
constexpr double kNinf = kNegativeInfinity<double>, kSafe = 1e-285, kSafeWindow = 1e-150, kHigh = 300, kFar = 4096;

// Typed view of one sequence of an hmm_semi_markov.
template <class In> struct View {
  const In *initial, *transition, *emission, *durations, *final;  // final may be null
  int64_t length, states, most;  // most: D as the caller stores it

  View(const hmm_semi_markov &p, int64_t b)
      : initial((const In *)p.initial + b * p.initial_batch_stride),
        transition((const In *)p.transition + b * p.transition_batch_stride),
        emission((const In *)p.emission + b * p.time * p.states),
        durations((const In *)p.durations + b * p.durations_batch_stride),
        final(p.final ? (const In *)p.final + b * p.final_batch_stride : nullptr),
        length(p.lengths[b]), states(p.states), most(p.max_duration) {}
  const In *frame(int64_t t) const { return emission + t * states; }
};

// log(x) for positive normal x, within 2 units in the last place: x = 2^k m, m in [1/sqrt 2, sqrt 2), and the series of
// log m = 2 artanh((m - 1) / (m + 1)) to the power 21, whose remainder is below 1e-18.
HMM_INLINE V log_of(V x) {
  Int<double> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Int<double> exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;
  bits -= exponent << 52;
  V m;
  std::memcpy(&m, &bits, sizeof m);
  const V e = __builtin_convertvector(exponent, V), f = m - 1., s = f / (m + 1.), z = s * s;
  V p = splat(2. / 21);
  for (int k = 19; k >= 3; k -= 2) p = p * z + 2. / k;
  return e * Simd<double>::kLn2High + (2. * s + (s * z * p + e * Simd<double>::kLn2Low));
}

// Arc weights of one direction: weight(from, to) = exp(score(from, to) - top(to)).
template <class In> struct Arcs {
  const In *scores;
  int64_t N, padded, from_stride, to_stride;
  Scratch<double> weight, top;

  Arcs(const In *phi, int64_t states, bool reverse)
      : scores(phi), N(states), padded(round_up(states, W)), from_stride(reverse ? 1 : states),
        to_stride(reverse ? states : 1), weight(padded * states), top(padded) {
    if (!weight.data || !top.data) return;
    for (int64_t to = 0; to < padded; to++) top[to] = kNinf;
    for (int64_t from = 0; from < N; from++)
      for (int64_t to = 0; to < N; to++) {
        const double s = double(score(from, to));
        weight[from * padded + to] = s;
        top[to] = s > top[to] ? s : top[to];
      }
    for (int64_t from = 0; from < N; from++)
      for (int64_t to = 0; to < padded; to += W) {
        const V m = load(top + to), s = load(weight + from * padded + to);
        store(weight + from * padded + to, m == kNinf ? V{} : exp<double>(s - m));
      }
  }
  bool allocated() const { return weight.data && top.data; }
  In score(int64_t from, int64_t to) const { return scores[from * from_stride + to * to_stride]; }
};

// Durations, in rows over states: rows k and D + k hold duration D - k, so that the D rows from D - 1 - s on belong to a
// ring's slots 0, 1, ... when slot s is the newest.
template <class In> struct Durations {
  int64_t D, padded;
  int64_t first_bad;  // the shortest duration with a score that is NaN or +inf
  Scratch<double> score, weight, top;

  Durations(const View<In> &q, int64_t longest)
      : D(longest), padded(round_up(q.states, W)), first_bad(std::numeric_limits<int64_t>::max()), score(2 * D * padded), weight(2 * D * padded), top(padded) {
    if (!allocated()) return;
    for (int64_t j = 0; j < padded; j++) {
      top[j] = kNinf;
      for (int64_t k = 0; k < D; k++) {
        const double s = j < q.states ? double(q.durations[j * q.most + D - k - 1]) : kNinf;
        score[k * padded + j] = score[(D + k) * padded + j] = s;
        top[j] = s > top[j] ? s : top[j];
        if (bad(s)) first_bad = D - k < first_bad ? D - k : first_bad;
      }
    }
    for (int64_t k = 0; k < 2 * D; k++)
      for (int64_t j = 0; j < padded; j += W) {
        const V m = load(top + j);
        store(weight + k * padded + j, m == kNinf ? V{} : exp<double>(load(score + k * padded + j) - m));
      }
  }
  bool allocated() const { return score.data && weight.data && top.data; }
  int64_t row(int64_t slot) const { return (D - 1 - slot) * padded; }
};

// The last D messages that entered, as the head of this file tells. `top` is at least the ring's largest score.
struct Window {
  int64_t D, padded;
  Scratch<double> score, weight, base, centre, top;
  Window(int64_t longest, int64_t states)
      : D(longest), padded(round_up(states, W)), score(D * padded), weight(D * padded), base(padded), centre(padded), top(padded) {}
  bool allocated() const { return score.data && weight.data && base.data && centre.data && top.data; }

  void empty() {
    for (int64_t k = 0; k < D * padded; k++) score[k] = kNinf;
    clear(weight.data, D * padded);
    clear(base.data, padded);
    clear(centre.data, padded);
    for (int64_t j = 0; j < padded; j++) top[j] = kNinf;
  }

  // Begins far bases again at 0 and centres the ring on its largest score.
  template <bool kWeights> void settle(int64_t j) {
    const V b = load(base + j), far = (b > kFar) | (b < -kFar) ? b : V{};
    V m = splat(kNinf);
    for (int64_t s = 0; s < D; s++) {
      const V x = load(score + s * padded + j) + far;
      m = larger(m, x);
      store(score + s * padded + j, x);
    }
    store(base + j, b - far);
    store(top + j, m);
    if (!kWeights) return;
    m = m == kNinf ? V{} : m;
    store(centre + j, m);
    for (int64_t s = 0; s < D; s++) store(weight + s * padded + j, exp<double>(load(score + s * padded + j) - m));
  }

  // Empties the ring of the lanes whose frame is forbidden.
  void forbid(int64_t j, Int<double> dead) {
    for (int64_t k = j; k < D * padded; k += padded) {
      store(score + k, dead ? splat(kNinf) : load(score + k));
      store(weight + k, dead ? V{} : load(weight + k));
    }
    store(top + j, dead ? splat(kNinf) : load(top + j));
  }

  // message (padded) enters `slot` and all windows grow by `frame` (N) less `most`, its maximum, which every path has
  // alike. Returns whether a score is NaN or +inf.
  template <bool kWeights, class In> bool enter(int64_t slot, const double *message, const In *frame, int64_t N, double most) {
    Int<double> wrong = {};
    for (int64_t j = 0; j < padded; j += W) {
      const V e = load_as(frame + j, N - j, 0.), b = load(base + j), c = load(centre + j);
      const Int<double> dead = e == kNinf;
      wrong |= is_bad<double>(e);
      const V x = dead ? splat(kNinf) : load(message + j) - b, grown = b + (dead ? V{} : e - most);
      store(score + slot * padded + j, x);
      store(base + j, grown);
      store(top + j, larger(load(top + j), x));
      if (kWeights) store(weight + slot * padded + j, exp<double>(x - c));
      if (any<double>(dead)) forbid(j, dead);
      const Int<double> high = x - c > kHigh, far = (grown > kFar) | (grown < -kFar);
      if (any<double>(kWeights ? high | far : far)) settle<kWeights>(j);
    }
    return any<double>(wrong);
  }

  void shift(double by) {
    for (int64_t j = 0; j < padded; j += W) store(base + j, load(base + j) - by);
  }
};

// What a sum over arcs or over a window is made of: products of weights, or in their place sums of scores.
struct SumProduct {
  static HMM_INLINE V none() { return V{}; }
  static HMM_INLINE V add(V sum, V x, V weight) { return sum + x * weight; }
};
struct MaxPlus {
  static HMM_INLINE V none() { return splat(kNinf); }
  static HMM_INLINE V add(V most, V x, V score) { return larger(most, sum_beside_max(score, x)); }
};

// out (B vectors) = what `Of` makes of n rows, `stride` apart, and x: x[i] beside row i (arcs), or a row itself (a window).
template <class Of, int B> HMM_INLINE void over_arcs(const double *x, const double *rows, int64_t n, int64_t stride, double *out) {
  V sum[B];
  for (int v = 0; v < B; v++) sum[v] = Of::none();
  for (int64_t i = 0; i < n; i++)
    for (int v = 0; v < B; v++) sum[v] = Of::add(sum[v], splat(x[i]), load(rows + i * stride + v * W));
  for (int v = 0; v < B; v++) store(out + v * W, sum[v]);
}
template <class Of, int B> HMM_INLINE void over_window(const double *x, const double *rows, int64_t n, int64_t stride, double *out) {
  V sum[B];
  for (int v = 0; v < B; v++) sum[v] = Of::none();
  for (int64_t s = 0; s < n; s++)
    for (int v = 0; v < B; v++) sum[v] = Of::add(sum[v], load(x + s * stride + v * W), load(rows + s * stride + v * W));
  for (int v = 0; v < B; v++) store(out + v * W, sum[v]);
}

// The same for all of `padded` columns.
template <class Of> void over_arcs(const double *x, const double *rows, int64_t n, int64_t padded, double *out) {
  int64_t j = 0;
  for (; padded - j >= 8 * W; j += 8 * W) over_arcs<Of, 8>(x, rows + j, n, padded, out + j);
  for (; padded - j >= 4 * W; j += 4 * W) over_arcs<Of, 4>(x, rows + j, n, padded, out + j);
  for (; padded - j >= 2 * W; j += 2 * W) over_arcs<Of, 2>(x, rows + j, n, padded, out + j);
  if (j < padded) over_arcs<Of, 1>(x, rows + j, n, padded, out + j);
}
template <class Of> void over_window(const double *x, const double *rows, int64_t n, int64_t padded, double *out) {
  int64_t j = 0;
  for (; padded - j >= 4 * W; j += 4 * W) over_window<Of, 4>(x + j, rows + j, n, padded, out + j);
  for (; padded - j >= 2 * W; j += 2 * W) over_window<Of, 2>(x + j, rows + j, n, padded, out + j);
  if (j < padded) over_window<Of, 1>(x + j, rows + j, n, padded, out + j);
}

// exp(x) of messages, then to(j) = log sum_i x(i) weight(i, j), again in log space where that is not certified.
template <class In> void log_sum_arcs(const Arcs<In> &arcs, const double *from, double *x, double *to) {
  const int64_t N = arcs.N, padded = arcs.padded;
  for (int64_t i = 0; i < padded; i += W) store(x + i, exp<double>(load(from + i)));
  over_arcs<SumProduct>(x, arcs.weight, N, padded, to);
  for (int64_t j = 0; j < padded; j += W) {
    const V sum = load(to + j), top = load(arcs.top + j);
    const Int<double> safe = sum >= kSafe, redo = ~safe & (top > kNinf);
    store(to + j, safe ? top + log_of(safe ? sum : splat(1.)) : splat(kNinf));
    if (!any<double>(redo)) continue;
    for (int64_t k = j; k < j + W; k++) {
      if (!redo[k - j]) continue;
      double m = kNinf, total = 0;
      for (int64_t i = 0; i < N; i++) m = std::fmax(m, from[i] + double(arcs.score(i, k)));
      if (m == kNinf) continue;
      for (int64_t i = 0; i < N; i++) {
        const double s = from[i] + double(arcs.score(i, k)) - m;
        if (s > -745) total += std::exp(s);
      }
      to[k] = m + std::log(total);
    }
  }
}

// to(j) = log sum over the window of state j, `slot` being the newest. sum (padded) out: of weights, 0 where the sum was
// formed in log space.
template <class In>
void log_sum_window(Window &w, const Durations<In> &durations, int64_t slot, double *to, double *sum) {
  const int64_t D = w.D, padded = w.padded;
  const double *weight = durations.weight + durations.row(slot), *score = durations.score + durations.row(slot);
  over_window<SumProduct>(w.weight, weight, D, padded, sum);
  for (int64_t j = 0; j < padded; j += W) {
    const V total = load(sum + j), base = load(w.base + j);
    const Int<double> safe = total >= kSafeWindow;
    if (!any<double>(~safe & (load(w.top + j) > kNinf))) {
      store(to + j, safe ? base + load(w.centre + j) + load(durations.top + j) + log_of(safe ? total : splat(1.)) : splat(kNinf));
      continue;
    }
    V m = splat(kNinf), exact = {};
    for (int64_t s = 0; s < D; s++) m = larger(m, load(w.score + s * padded + j) + load(score + s * padded + j));
    const Int<double> none = m == kNinf;
    m = none ? V{} : m;
    for (int64_t s = 0; s < D; s++)
      exact += exp<double>(load(w.score + s * padded + j) + load(score + s * padded + j) - m);
    store(to + j, none ? splat(kNinf) : base + m + log_of(none ? splat(1.) : exact));
    store(sum + j, V{});
    w.settle<true>(j);
  }
}

// Moves a row's maximum to 0; returns what was taken out, 0 where every entry is -inf.
inline double centre_message(double *row, int64_t padded) {
  V m = splat(kNinf);
  for (int64_t j = 0; j < padded; j += W) m = larger(m, load(row + j));
  const double top = max_of<double>(m);
  if (top == kNinf) return 0;
  for (int64_t j = 0; j < padded; j += W) store(row + j, load(row + j) - top);
  return top;
}

// x (n) widened into a row of whole vectors, -inf beyond; x may be null for zeros.
template <class In> void widen(const In *x, int64_t N, int64_t padded, double *row) {
  for (int64_t j = 0; j < padded; j += W)
    store(row + j, x ? load_as(x + j, N - j, kNinf) : load_part(row + j, 0, kNinf));
  if (!x)
    for (int64_t j = 0; j < N; j++) row[j] = 0;
}

// The kernel's messages of one sequence, (L, N) each and (L,): start_t(j), end_t(j) less centre(t), and centre. All null
// where nobody will read them.
struct Messages {
  double *start, *end, *centre;
  Messages(const hmm_semi_markov &p, int64_t b, double *all, double *centres)
      : start(all ? all + b * p.time * p.states : nullptr),
        end(all ? all + (p.batch + b) * p.time * p.states : nullptr), centre(all ? centres + b * p.time : nullptr) {}
  // What lies past a sequence's end is 0, so that equal inputs give equal outputs, bit for bit.
  void clear_rest(const hmm_semi_markov &p, int64_t length) const {
    clear(start + length * p.states, (p.time - length) * p.states);
    clear(end + length * p.states, (p.time - length) * p.states);
    clear(centre + length, p.time - length);
  }
};

// log Z; NaN where a score is NaN or +inf.
template <class In>
double forward(const View<In> &q, const Arcs<In> &arcs, const Durations<In> &durations, Window &w, const Messages &out,
               double *rows /* 4 padded */) {
  const int64_t N = q.states, L = q.length, padded = w.padded;
  double *start = rows, *end = rows + padded, *x = rows + 2 * padded, *sum = rows + 3 * padded, offset = 0;
  if (L == 0) return 0;
  bool wrong = any_bad(q.initial, N) || (q.final && any_bad(q.final, N)) || durations.first_bad <= L ||
               (L > 1 && any_bad(q.transition, N * N));
  w.empty();
  for (int64_t t = 0; t < L; t++) {
    if (t == 0) widen(q.initial, N, padded, start);
    else log_sum_arcs(arcs, end, x, start);
    const double most = row_max<In, double>(q.frame(t), N);
    wrong |= w.enter<true>(t % w.D, start, q.frame(t), N, most);
    log_sum_window(w, durations, t % w.D, end, sum);
    const double m = centre_message(end, padded);
    w.shift(m);
    offset += most + m;
    if (!out.start) continue;
    std::memcpy(out.start + t * N, start, N * sizeof(double));
    std::memcpy(out.end + t * N, end, N * sizeof(double));
    out.centre[t] = m;
  }
  if (wrong) return std::numeric_limits<double>::quiet_NaN();
  double m = kNinf, total = 0;
  for (int64_t j = 0; j < N; j++) {
    if (q.final) end[j] += double(q.final[j]);
    m = end[j] > m ? end[j] : m;
  }
  if (m == kNinf) return kNinf;
  for (int64_t j = 0; j < N; j++) total += std::exp(end[j] - m);
  return offset + (m + std::log(total));
}

}  // namespace semi_markov
}  // namespace
