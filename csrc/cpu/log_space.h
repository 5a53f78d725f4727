// Forward-backward in log space: exact for any scores, any pattern of -inf and transitions that vary over time.
//
//   c_t(j)     = max_i [alpha_{t-1}(i) + phi_t(i, j)]
//   norm_t(j)  = c_t(j) - C_t + log sum_i exp(alpha_{t-1}(i) + phi_t(i, j) - c_t(j)),        C_t = max_j c_t(j)
//   alpha_t(j) = norm_t(j) + (e_t(j) - max e_t) - M_t,                                      max_j alpha_t(j) = 0
//   log Z      = log sum_j exp(alpha_{L-1}(j) + f(j)) + sum_t (C_t + max e_t + M_t)         (the sum in float64)
//
// Every difference above is between numbers of like size, so that float32 messages keep their precision whatever the
// scale of the scores, and re-centring at each step keeps the error from growing with T. Backward, no second kind of
// message is needed (Baum-Welch posteriors by the backward Markov chain, Rabiner 1989, eqs. 27 and 37):
//
//   p(z_{t-1} = i, z_t = j | x) = gamma_t(j) exp(alpha_{t-1}(i) + phi_t(i, j) - C_t - norm_t(j)),   summed over j: gamma_{t-1}(i)
//
// Cost a step, N^2 arcs: forward, two sweeps of the arcs (the second from cache): 1 max, 1 exp, 4 additions an arc and
// 4 bytes read; backward, 1 exp, 3 additions, 2 products, 4 bytes read and 4 written. At 14 vector operations an exp
// and 16 lanes, forward is bound by arithmetic (about 19/16 operations an arc, against 4 bytes), backward by both. Measured
// on one core (AMD EPYC, AVX-512, 3.7 GHz, 2 operations a cycle, 36 GB/s), B = 8, N = 50, T = 1000, 20 M arcs in rows of
// 64 lanes, outputs that were touched before: forward 6.0 ms against 4.1 of arithmetic, backward 14.0 against 4.4 of
// arithmetic and 4.6 of memory; two threads 1.9 times as fast. One sequence runs on one thread.
// Limits: none on N or T.
//
// In is the scores' type, Acc that of the messages. Scaled float32 sequences that had to be redone use Acc = double.
#pragma once
#include <cmath>
#include <cstring>

#include "problem.h"
#include "simd.h"

namespace {

// norm and maximum over i of one block of up to B vectors of columns, j0 <= j.
template <int B, class In, class Acc>
HMM_INLINE void log_sum_columns(const In *arcs, const Acc *alpha, int64_t N, int64_t j0, Acc *maximum, Acc *sum) {
  constexpr int W = kLanes<Acc>;
  const Acc ninf = kNegativeInfinity<Acc>;
  int64_t left[B];
  Vec<Acc> m[B], s[B];
  for (int v = 0; v < B; v++) {
    left[v] = N - j0 - v * W;
    m[v] = splat(ninf);
  }
  for (int64_t i = 0; i < N; i++) {
    const In *row = arcs + i * N + j0;
    for (int v = 0; v < B; v++) m[v] = larger(m[v], load_as(row + v * W, left[v], ninf) + alpha[i]);
  }
  for (int v = 0; v < B; v++) {
    store(maximum + j0 + v * W, m[v]);
    m[v] = m[v] == ninf ? Vec<Acc>{} : m[v];
    s[v] = Vec<Acc>{};
  }
  for (int64_t i = 0; i < N; i++) {
    const In *row = arcs + i * N + j0;
    for (int v = 0; v < B; v++) s[v] += exp<Acc>((load_as(row + v * W, left[v], ninf) - m[v]) + alpha[i]);
  }
  for (int v = 0; v < B; v++) store(sum + j0 + v * W, s[v]);
}

template <class In, class Acc>
HMM_INLINE void log_sum_step(const In *arcs, const Acc *alpha, int64_t N, Acc *maximum, Acc *sum) {
  constexpr int W = kLanes<Acc>;
  int64_t j = 0;
  for (; N - j > 3 * W; j += 4 * W) log_sum_columns<4>(arcs, alpha, N, j, maximum, sum);
  if (N - j > 2 * W) log_sum_columns<3>(arcs, alpha, N, j, maximum, sum);
  else if (N - j > W) log_sum_columns<2>(arcs, alpha, N, j, maximum, sum);
  else if (N > j) log_sum_columns<1>(arcs, alpha, N, j, maximum, sum);
}

template <class In, class Acc> HMM_INLINE Acc row_max(const In *row, int64_t N) {
  Vec<Acc> m = splat(kNegativeInfinity<Acc>);
  for (int64_t j = 0; j < N; j += kLanes<Acc>) m = larger(m, load_as(row + j, N - j, kNegativeInfinity<Acc>));
  Acc top = max_of<Acc>(m);
  return top == kNegativeInfinity<Acc> ? Acc(0) : top;
}

// alpha = norm + (scores - their maximum), centred to maximum 0. Adds what was taken out to `offset`. Rows of norm and
// alpha are read and written up to N only. Returns false where every state is forbidden.
template <class In, class Acc>
HMM_INLINE bool centre_row(const Acc *norm, const In *scores, const In *more, int64_t N, Acc *alpha, double &offset) {
  const Acc ninf = kNegativeInfinity<Acc>;
  constexpr int W = kLanes<Acc>;
  Acc top = scores ? row_max<In, Acc>(scores, N) : Acc(0), top_more = more ? row_max<In, Acc>(more, N) : Acc(0);
  Vec<Acc> m = splat(ninf);
  Int<Acc> bad = {};
  for (int64_t j = 0; j < N; j += W) {
    Vec<Acc> a = load_part(norm + j, N - j, ninf);
    if (scores) a += load_as(scores + j, N - j, ninf) - top;
    if (more) a += load_as(more + j, N - j, ninf) - top_more;
    m = larger(m, a);
    bad |= a != a;
    store_part(alpha + j, N - j, a);
  }
  Acc middle = max_of<Acc>(m);
  offset += double(top) + double(top_more);
  if (any<Acc>(bad)) {
    offset = std::numeric_limits<double>::quiet_NaN();
    return false;
  }
  if (middle == ninf) return false;
  for (int64_t j = 0; j < N; j += W) store_part(alpha + j, N - j, load_part(alpha + j, N - j, ninf) - middle);
  offset += double(middle);
  return true;
}

// alpha, norm: (L, N); centre: (L,); returns log Z. norm and centre are where backward_log_space looks for them.
template <class In, class Acc>
double forward_log_space(const Sequence<In> &q, Acc *alpha, Acc *norm, Acc *centre, Acc *scratch /* 2 round_up(N) */) {
  constexpr int W = kLanes<Acc>;
  const int64_t N = q.states, L = q.length;
  const Acc ninf = kNegativeInfinity<Acc>;
  double offset = 0;
  if (L == 0) return 0;
  Acc *maximum = scratch, *sum = scratch + round_up(N, 4 * W);
  for (int64_t t = 0; t < L; t++) {
    Acc *row = norm + t * N;
    Acc C;
    if (t == 0) {
      C = row_max<In, Acc>(q.initial, N);
      for (int64_t j = 0; j < N; j += W) store_part(row + j, N - j, load_as(q.initial + j, N - j, ninf) - C);
    } else {
      log_sum_step(q.arcs(t), alpha + (t - 1) * N, N, maximum, sum);
      C = row_max<Acc, Acc>(maximum, N);
      for (int64_t j = 0; j < N; j += W) {
        // The sum is 0 where c is -inf; NaN where a score is, though c, a maximum, may have forgotten it.
        Vec<Acc> c = load(maximum + j), s = load(sum + j);
        store_part(row + j, N - j, s == Acc(0) ? c : (c - C) + log(s == Acc(0) ? splat(Acc(1)) : s));
      }
    }
    centre[t] = C;
    offset += double(C);
    if (!centre_row<In, Acc>(row, q.emission ? q.frame(t) : nullptr, t == L - 1 ? q.final : nullptr, N, alpha + t * N, offset)) {
      clear(alpha + (t + 1) * N, (L - t - 1) * N);
      clear(norm + (t + 1) * N, (L - t - 1) * N);
      clear(centre + t + 1, L - t - 1);
      return offset == offset ? -std::numeric_limits<double>::infinity() : offset;
    }
  }
  const Acc *last = alpha + (L - 1) * N;
  double total = 0;
  for (int64_t j = 0; j < N; j++) total += std::exp(double(last[j]));
  return offset + std::log(total);
}

// One step of the backward chain: edge(i, j) = gamma_t(j) exp(alpha_{t-1}(i) + phi_t(i, j) - C - norm(j)). `weight` holds
// gamma_t and `norm` is finite wherever weight is not 0; both padded to whole vectors. previous(i) = sum_j edge(i, j).
// edge: null, or (N, N) that is written (Add = false) or added to (Add = true).
template <bool Add, class In, class Acc, class Out>
HMM_INLINE void posterior_step(const In *arcs, const Acc *alpha, const Acc *norm, Acc C, const Acc *weight, int64_t N,
                               Acc *previous, Out *edge) {
  constexpr int W = kLanes<Acc>;
  for (int64_t i = 0; i < N; i++) {
    const In *row = arcs + i * N;
    Vec<Acc> total = {};
    for (int64_t j = 0; j < N; j += W) {
      Vec<Acc> score = ((load_as(row + j, N - j, kNegativeInfinity<Acc>) - C) - load(norm + j)) + alpha[i];
      Vec<Acc> e = load(weight + j) * exp<Acc>(score);
      total += e;
      if (edge) {
        Out *out = edge + i * N + j;
        if constexpr (Add) store_part(out, N - j, load_part(out, N - j, Out(0)) + e);
        else store_part(out, N - j, e);
      }
    }
    previous[i] = sum_of<Acc>(total);
  }
}

// state: (L, N) out; edge as above, moving by edge_stride (N^2) a frame, 0 to add all frames into one, which must hold zeros.
template <class In, class Acc, class Out, class Edge>
void backward_log_space(const Sequence<In> &q, double grad, double log_partition, const Acc *alpha, const Acc *norm,
                        const Acc *centre, Out *state, Edge *edge, int64_t edge_stride, Acc *scratch /* 3 round_up(N) */) {
  constexpr int W = kLanes<Acc>;
  const int64_t N = q.states, L = q.length, padded = round_up(N, 4 * W);
  const bool nan = log_partition != log_partition || log_partition == std::numeric_limits<double>::infinity();
  if (L == 0) return;
  if (grad == 0 || nan || log_partition == -std::numeric_limits<double>::infinity()) {
    const double fill = nan ? std::numeric_limits<double>::quiet_NaN() : 0;
    for (int64_t k = 0; k < L * N; k++) state[k] = Out(fill);
    if (edge && (edge_stride || nan))
      for (int64_t t = 1; t < L; t++)
        for (int64_t k = 0; k < N * N; k++) edge[(t - 1) * edge_stride + k] = Edge(fill);
    return;
  }
  // The chain runs with mass grad, which saves a product an arc; where that could flush or overflow, with mass 1.
  const bool extreme = !(std::fabs(grad) > 1e-6 && std::fabs(grad) < 1e6);
  const double mass = extreme ? 1 : grad;
  Acc *gamma = scratch, *safe = scratch + padded, *previous = scratch + 2 * padded;
  clear(gamma, padded);
  clear(safe, padded);
  for (int64_t j = 0; j < N; j++) previous[j] = std::exp(alpha[(L - 1) * N + j]);
  for (int64_t t = L - 1;; t--) {
    // The mass of gamma is exact: normalising it here keeps rounding errors from adding up over time.
    double total = 0;
    for (int64_t j = 0; j < N; j++) total += double(previous[j]);
    const Acc scale = Acc(mass / total);
    for (int64_t j = 0; j < N; j++) state[t * N + j] = Out(gamma[j] = previous[j] * scale);
    if (t == 0) break;
    for (int64_t j = 0; j < N; j++) safe[j] = gamma[j] == 0 ? std::numeric_limits<Acc>::max() / 4 : norm[t * N + j];
    Edge *out = edge ? edge + (t - 1) * edge_stride : nullptr;
    if (edge_stride) posterior_step<false>(q.arcs(t), alpha + (t - 1) * N, safe, centre[t], gamma, N, previous, out);
    else posterior_step<true>(q.arcs(t), alpha + (t - 1) * N, safe, centre[t], gamma, N, previous, out);
  }
  if (!extreme) return;
  for (int64_t k = 0; k < L * N; k++) state[k] = Out(state[k] * grad);
  if (edge)
    for (int64_t k = 0; k < (edge_stride ? (L - 1) * edge_stride : N * N); k++) edge[k] = Edge(edge[k] * grad);
}

}  // namespace
