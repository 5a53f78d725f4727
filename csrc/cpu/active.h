// Forward-backward of chains of which only K of the N states can emit a frame, by scaled probabilities over the K slots of
// each frame (Rabiner 1989, section V.A, on the blocks of Chiu and Rush 2020, section 3.1):
//
//   w_t(j)  = exp(e_t(j) + c(j) - max of the same over j)             A, c: active_blocks.h
//   a_t     = 2^k_t (a_{t-1} A_t) * w_t,   sum_j a_t(j) in [2^18, 2^31),         A_t: the K x K block of A between frames
//   b_{t-1} = A_t (w_t * b_t) / G,         G such that sum_i a_{t-1}(i) b_{t-1}(i) = 1;           gamma_t = a_t * b_t
//   counts(i, j) += a_{t-1}(i) A_t(i, j) w_t(j) b_t(j) / G
//
// Cost a frame: 2 K^2 flops and K exps forward, 6 K^2 flops and K exps backward; 8 K^2 bytes of A and 8 K^2 of counts, of
// which each row is one or two lines of the cache, asked for a frame ahead. At K = 10 arithmetic is 20 vector operations
// forward and some 90 backward, 40 of them the sums over rows, and the recursion a chain of about 20 + 20 + 4 cycles.
// Limits: none on N, T or K; without runs of consecutive ids K^2 reads a frame take the place of K^2 / 16.
//
// When is it exact? What is made up for allowed arcs and states below the smallest normal number, 2^-126 in float, stands
// before numbers whose sum is 2^31 at most, so it is below 2^-95; what is lost is less. Every state that can be reached
// must have a message of at least 2^-68 before rescaling (double: 2^-920), so that its relative error is below 2^-27 a
// frame; a smaller one is reachable if an allowed arc leads to it from a state whose message is not 0, and then the
// sequence is redone (active_log.h). A zero sum alone would not show that, since a state that was lost may win later.
// Going backward, an entry that is lost has a posterior below 2^-46 where sums before rescaling are at least 2^-18, which
// is demanded too.
#pragma once
#include "active_log.h"
#include "scaled.h"

namespace {

template <class Real> constexpr int kReachedBits = sizeof(Real) == 4 ? -68 : -920;

// Rows of scratch that the passes over one sequence share, padded to whole vectors.
template <class Real> struct ActiveRows {
  const int64_t width;
  Scratch<Real> w, u, y, lost, spare;
  explicit ActiveRows(int64_t K) : width(round_up(K, kLanes<Real>)), w(width), u(width), y(width), lost(width), spare(width) {}
  bool allocated() const { return w.data && u.data && y.data && lost.data && spare.data; }
};

// sum += x, what rounding takes from it into `lost` (Knuth's two-sum): large scores may cancel.
template <class Real> HMM_INLINE void add_score(Vec<Real> x, Vec<Real> &sum, Vec<Real> &lost) {
  const Vec<Real> whole = sum + x, part = whole - sum, error = (sum - (whole - part)) + (x - part);
  lost += whole == kNegativeInfinity<Real> ? Vec<Real>{} : error;
  sum = whole;
}

// w_t of a frame into rows.w; returns what was taken out of the log partition. shift: null at the first frame.
template <class Real>
HMM_INLINE double weigh(const ActiveSequence<Real> &q, const Frame<Real> &f, int64_t t, const Real *shift,
                        ActiveRows<Real> &rows) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>, *score = f.score;
  Real *const w = rows.w, *const lost = rows.lost, *const spare = rows.spare;
  if (!f.run) {
    gather_scores(f, q.slots, spare);
    score = spare;
  }
  Vec<Real> m = splat(ninf);
  for (int64_t j = 0; j < rows.width; j += W) {
    Vec<Real> s = load_part(score + j, f.count - j, ninf), low = {};
    if (shift && j < f.count) add_score<Real>(load(shift + j), s, low);
    store(w + j, s);
    store(lost + j, low);
    m = larger(m, s);
  }
  for (const Real *ends : {t == 0 ? q.initial : nullptr, t == q.length - 1 ? q.final : nullptr}) {
    if (!ends) continue;
    gather_row(ends, f, rows.width, ninf, spare);
    m = splat(ninf);
    for (int64_t j = 0; j < rows.width; j += W) {
      Vec<Real> s = load(w + j), low = load(lost + j);
      add_score<Real>(load(spare + j), s, low);
      store(w + j, s);
      store(lost + j, low);
      m = larger(m, s);
    }
  }
  Real top = max_of<Real>(m);
  if (top == ninf) top = 0;
  for (int64_t j = 0; j < rows.width; j += W) {
    const Vec<Real> s = load(w + j);
    store(w + j, s == ninf ? Vec<Real>{} : lifted_exp<Real>((s - top) + load(lost + j)));
  }
  return double(top);
}

// out = (previous A) * w for B vectors of columns from j; returns which entries are too small, of those that w allows.
template <int B, class Real>
HMM_INLINE Int<Real> forward_slots(const Block<Real> &block, const Real *previous, int64_t rows, int64_t j, const Real *w,
                                   int64_t K, Real *out, Vec<Real> &total) {
  constexpr int W = kLanes<Real>;
  Vec<Real> acc[2][B] = {};
  const Real *row = block.data + j;
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2, row += 2 * block.pitch)
    for (int v = 0; v < B; v++) {
      acc[0][v] += splat(previous[i]) * load(row + v * W);
      acc[1][v] += splat(previous[i + 1]) * load(row + block.pitch + v * W);
    }
  if (i < rows)
    for (int v = 0; v < B; v++) acc[0][v] += splat(previous[i]) * load(row + v * W);
  Int<Real> suspect = {};
  for (int v = 0; v < B; v++) {
    const Vec<Real> weight = load(w + j + v * W), x = (acc[0][v] + acc[1][v]) * weight;
    const Vec<Real> a = weight == Real(0) ? Vec<Real>{} : x;  // columns of other states may hold anything
    suspect |= (a < std::ldexp(Real(1), kReachedBits<Real>)) & (weight > Real(0));
    total += a;
    store_part(out + j + v * W, K - j - v * W, a);
  }
  return suspect;
}

// Is some state with too small a message reachable?
template <class Real>
__attribute__((noinline)) bool reachable(const Block<Real> &block, const Real *previous, int64_t rows, const Real *w,
                                         const Real *out, int64_t columns) {
  const Real smallest = std::ldexp(Real(1), kReachedBits<Real>);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; previous[i] > 0 && j < columns; j++)
      if (w[j] > 0 && out[j] < smallest && block.data[i * block.pitch + j] > 0) return true;
  return false;
}

// One step; returns the sum of `out`, or a negative number where the certificate fails.
template <class Real>
HMM_INLINE double forward_step(const Block<Real> &block, const Real *previous, int64_t rows, const Real *w, int64_t columns,
                               int64_t K, Real *out) {
  constexpr int W = kLanes<Real>;
  Vec<Real> total = {};
  Int<Real> suspect = {};
  int64_t j = 0;
  for (; columns - j > 3 * W; j += 4 * W) suspect |= forward_slots<4>(block, previous, rows, j, w, K, out, total);
  for (; j < columns; j += W) suspect |= forward_slots<1>(block, previous, rows, j, w, K, out, total);
  if (j < K) clear(out + j, K - j);
  if (any<Real>(suspect) && reachable(block, previous, rows, w, (const Real *)out, columns)) return -1;
  return double(sum_of<Real>(total));
}

// alpha (L, K) out; returns whether the result is certified.
template <class Real>
bool forward_active(const ActiveSequence<Real> &q, Blocks<Real> &blocks, ActiveRows<Real> &rows, Real *alpha,
                    double &log_partition) {
  const int64_t K = q.slots, L = q.length;
  const double least = std::exp2(Range<Real>::kLeastSumBits);
  log_partition = 0;
  if (L == 0) return true;
  Frame<Real> from, to = q.frame(0), next = to;
  double taken = -kTopBits * kLn2, total = 0;
  for (int64_t t = 0; t < L; t++, from = to, to = next) {
    Real *out = alpha + t * K;
    prefetch_frame<Real>(q, t + kStreamed, nullptr, alpha);
    if (t + 1 < L) {
      next = q.frame(t + 1);
      blocks.prefetch(to, next);
    }
    if (t == 0) {
      taken += weigh<Real>(q, to, t, nullptr, rows);
      total = 0;
      for (int64_t j = 0; j < K; j++) {
        total += double(out[j] = std::ldexp(Real(1), kTopBits) * rows.w[j]);
        if (rows.w[j] > 0 && out[j] < std::ldexp(Real(1), kReachedBits<Real>)) return false;
      }
    } else {
      const Block<Real> block = blocks(from, to);
      taken += weigh(q, to, t, block.shift, rows);
      total = forward_step(block, (const Real *)out - K, from.count, (const Real *)rows.w, to.count, K, out);
    }
    if (!(total >= least)) return false;  // infeasible, lost or NaN: log space tells which
    if (!stands(total)) taken -= rescale(out, total, K, K) * kLn2;
  }
  log_partition = taken + std::log(total);
  return true;
}

// beta(i) = sum_j A(i, j) u(j) for the rows of a block.
template <class Real>
HMM_INLINE void backward_step(const Block<Real> &block, const Real *u, int64_t rows, int64_t columns, Real *beta) {
  constexpr int W = kLanes<Real>;
  for (int64_t i = 0; i < rows; i++) {
    const Real *row = block.data + i * block.pitch;
    Vec<Real> acc = load(row) * load(u);
    for (int64_t j = W; j < columns; j += W) acc += load(row + j) * load(u + j);
    beta[i] = sum_of<Real>(acc);
  }
}

// counts(i, j) += grad a(i) A(i, j) u(j) / G, counts being (N, N).
template <class Real>
HMM_INLINE void count_step(const Block<Real> &block, const Frame<Real> &from, const Frame<Real> &to, const Real *a,
                           const Real *u, Real inverse, Real grad, int64_t N, Real *counts) {
  constexpr int W = kLanes<Real>;
  for (int64_t i = 0; i < from.count; i++) {
    if (from.id[i] < 0) continue;
    const Real *row = block.data + i * block.pitch, scale = a[i] * inverse;
    Real *out = counts + from.id[i] * N;
    if (to.run) {
      out += to.id[0];
      for (int64_t j = 0; j < to.count; j += W) {
        const Vec<Real> edge = load(row + j) * load(u + j) * scale;  // before grad: in range whatever grad is
        store_part(out + j, to.count - j, load_part(out + j, to.count - j, Real(0)) + edge * grad);
      }
    } else
      for (int64_t j = 0; j < to.count; j++)
        if (to.id[j] >= 0) out[to.id[j]] += row[j] * u[j] * scale * grad;
  }
}

// state (L, K) is written; counts (N, N), null to skip, are added to.
template <class Real>
void backward_active(const ActiveSequence<Real> &q, Blocks<Real> &blocks, ActiveRows<Real> &rows, const Real *alpha, Real grad,
                     Real *state, Real *counts) {
  constexpr int W = kLanes<Real>;
  const int64_t K = q.slots, L = q.length, N = q.states;
  if (L == 0) return;
  Real *const y = rows.y, *const u = rows.u, *const w = rows.w;
  Frame<Real> to = q.frame(L - 1), from = to, before = L > 1 ? q.frame(L - 2) : to;
  Block<Real> block = {};
  for (int64_t t = L - 1; t >= 0; t--) {  // here y is b_{t+1}, `to` the frame t + 1, `from` the frame t
    const Real *a = alpha + t * K;
    prefetch_frame<Real>(q, t - kStreamed, alpha, state);
    if (t < L - 1) backward_step(block, (const Real *)u, from.count, to.count, y);
    else
      for (int64_t j = 0; j < K; j++) y[j] = 1;
    const Real inverse = Real(1) / posterior_mass(a, y, K);
    if (counts && t < L - 1) count_step(block, from, to, a, (const Real *)u, inverse, grad, N, counts);
    posterior_row<Real>(a, y, nullptr, grad, inverse, K, state + t * K, nullptr);
    if (t == 0) break;
    to = from, from = before;
    if (t > 1) {
      before = q.frame(t - 2);
      blocks.prefetch(before, from);
      if (counts) prefetch_window<true>(counts, N, before, from);
    }
    block = blocks(from, to);
    weigh(q, to, t, block.shift, rows);
    for (int64_t j = 0; j < rows.width; j += W) store(u + j, load(w + j) * (load(y + j) * inverse));
  }
}

}  // namespace
