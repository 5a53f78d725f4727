// Forward-backward by scaled probabilities over groups of sequences: the recursions, costs and certificates are in
// scaled_arcs.h.
#pragma once
#include "counts.h"
#include "scaled_arcs.h"

namespace {

constexpr int kGroup = 8;  // sequences that go through a step together, at most
constexpr double kLn2 = 0.6931471805599453;
template <class Real> constexpr Real kTiny = std::numeric_limits<Real>::min();

// A group of sequences in the order of falling length: those still running at a frame are the first ones.
struct Group {
  int size = 0;
  int64_t index[kGroup], length[kGroup];
  int running(int64_t t) const {
    int n = 0;
    while (n < size && length[n] > t) n++;
    return n;
  }
};

// The largest e + shift of a frame, 0 where all are forbidden. emission, shift: null for zeros.
template <class Real> HMM_INLINE Real frame_top(const Real *emission, const Real *shift, int64_t N) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  Vec<Real> m = splat(ninf);
  for (int64_t j = 0; j < N; j += W) {
    Vec<Real> e = emission ? load_part(emission + j, N - j, ninf) : Vec<Real>{};
    if (shift) e += emission ? load(shift + j) : load_part(shift + j, N - j, ninf);
    m = larger(m, e);
  }
  const Real top = max_of<Real>(m);
  return top == ninf ? Real(0) : top;
}

// w = exp(e + shift - top). A forbidden state gets 0, an allowed one at least 2^-126, so that the two stay apart. Writes N
// numbers; what pads w is left alone. Large scores may cancel, where `wide` the sum is compensated (Knuth's two-sum).
template <class Real>
HMM_INLINE void frame_weights(const Real *emission, const Real *shift, bool wide, Real top, int64_t N, Real *w) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  for (int64_t j = 0; j < N; j += W) {
    const Vec<Real> e = emission ? load_part(emission + j, N - j, ninf) : Vec<Real>{};
    Vec<Real> sum = e - top;
    if (shift && !wide) sum += load(shift + j);
    if (shift && wide) {
      const Vec<Real> s = load(shift + j), part = sum - e, whole = sum + s, other = whole - sum;
      const Vec<Real> lost = ((e - (sum - part)) + (-top - part)) + ((sum - (whole - other)) + (s - other));
      sum = whole + lost;
    }
    Vec<Real> x = exp<Real>(sum);
    x = x < kTiny<Real> ? splat(kTiny<Real>) : x;
    store_part(w + j, N - j, e == ninf ? Vec<Real>{} : x);
  }
}

// w *= f, where allowed states stay at least 2^-126.
template <class Real> HMM_INLINE void multiply_weights(Real *w, const Real *f, int64_t N) {
  for (int64_t j = 0; j < N; j++) {
    const Real x = w[j] * f[j];
    w[j] = w[j] > 0 && f[j] > 0 && x < kTiny<Real> ? kTiny<Real> : x;
  }
}

// The weights of frame t of one sequence, final scores included; returns what was taken out of the log partition.
// `centre` remembers the frame's maximum between the forward pass, which finds it, and the backward one.
template <bool Find, class Real>
HMM_INLINE double weigh(const Sequence<Real> &q, const Arcs<Real> &arcs, int64_t t, Real &centre, Real *w, Real *spare) {
  const Real *emission = q.emission ? q.frame(t) : nullptr, *shift = t ? arcs.shift.data : nullptr;
  if (Find) centre = frame_top<Real>(emission, shift, q.states);
  frame_weights<Real>(emission, shift, arcs.wide, centre, q.states, w);
  double taken = double(centre) + (t ? arcs.top : 0);
  if (q.final && t == q.length - 1) {
    const Real top = frame_top<Real>(q.final, nullptr, q.states);
    frame_weights<Real>(q.final, nullptr, false, top, q.states, spare);
    multiply_weights(w, spare, q.states);
    taken += double(top);
  }
  return taken;
}

// Asks for a row some frames before it is needed. Eight sequences are more streams than the hardware follows by itself;
// of long rows it catches up within the row.
template <bool Write, class Real> HMM_INLINE void prefetch(const Real *row, int64_t N) {
  constexpr int64_t line = 64 / sizeof(Real);
  for (int64_t j = 0; j < N + line - 1 && j < 16 * line; j += line) __builtin_prefetch(row + j, Write, 3);
}
constexpr int64_t kAhead = 3;  // frames

// Is some suspect state of these columns reachable? See (entrywise) in scaled_arcs.h.
template <class Real>
__attribute__((noinline)) bool reachable(Int<Real> suspect, const Real *previous, const Real *packed, int64_t N) {
  Int<Real> reached = {};
  for (int64_t i = 0; i < N; i++)
    if (previous[i] > 0) reached |= load(packed + i * kPanel<Real>) > Real(0);
  return any<Real>(suspect & reached);
}

// out[m] = (previous[m] A) * w[m] for the columns from j0, B vectors of them; adds to sum, flags where (entrywise) fails.
template <int M, int B, class Real>
HMM_INLINE void forward_columns(const Arcs<Real> &arcs, int64_t j0, const Real *const *previous, const Real *const *w,
                                Real *const *out, Vec<Real> *sum, bool *flag) {
  constexpr int P = kPanel<Real>, W = kLanes<Real>;
  const int64_t N = arcs.N;
  const Real smallest = std::ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *packed = arcs.forward + j0 / P * P * N + j0 % P;
  Vec<Real> acc[M][B];
  product<M, B, Real>(previous, packed, N, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) {
      const int64_t j = j0 + v * W;
      const Vec<Real> weight = load(w[m] + j), a = acc[m][v] * weight;
      sum[m] += a;
      store_part(out[m] + j, N - j, a);
      if (arcs.mixing || flag[m]) continue;
      const Int<Real> suspect = (a < smallest) & (weight > Real(0));
      if (any<Real>(suspect)) flag[m] = reachable<Real>(suspect, previous[m], packed + v * W, N);
    }
}

template <int M, class Real>
void forward_step(const Arcs<Real> &arcs, const Real *const *previous, const Real *const *w, Real *const *out,
                  double *total, bool *flag) {
  constexpr int W = kLanes<Real>, B = M > 4 ? kPanelVectors / 2 : kPanelVectors;
  Vec<Real> sum[M];
  for (int m = 0; m < M; m++) sum[m] = Vec<Real>{};
  int64_t j = 0;
  for (; arcs.N - j > (B - 1) * W; j += B * W) forward_columns<M, B>(arcs, j, previous, w, out, sum, flag);
  for (; j < arcs.N; j += W) forward_columns<M, 1>(arcs, j, previous, w, out, sum, flag);
  for (int m = 0; m < M; m++) total[m] = double(sum_of<Real>(sum[m]));
}

// Rows of scratch a group needs: per sequence one of weights and one of products, and three to spare.
constexpr int kGroupRows = 2 * kGroup + 3;

template <class Real>
void forward_group(const hmm_problem &p, const Arcs<Real> &arcs, const Group &group, Real *scratch, Real *log_partition,
                   Real *alpha, Real *centre, int32_t *method) {
  constexpr int W = kLanes<Real>;
  const int64_t N = p.states, padded = arcs.padded;
  const Real smallest = std::ldexp(Real(1), Range<Real>::kEntryBits), top = std::ldexp(Real(1), kTopBits);
  Real *weights = scratch, *idle = scratch + kGroup * padded, *spare = idle + padded, *zeros = spare + padded;
  double taken[kGroup] = {}, total[kGroup];
  bool flag[kGroup] = {};
  const int64_t longest = group.size ? group.length[0] : 0;
  for (int64_t t = 0; t < longest; t++) {
    const int running = group.running(t);
    bool hope = false;
    for (int m = 0; m < running; m++) hope |= !flag[m];
    if (!hope) break;
    const Real *previous[kGroup], *w[kGroup];
    Real *out[kGroup];
    for (int m = 0; m < kGroup; m++) {  // the rows past the running ones repeat the first, with weight 0, into `idle`
      const int64_t row = group.index[m < running ? m : 0] * p.time + t;
      previous[m] = alpha + (row - (t > 0)) * N;
      out[m] = m < running ? alpha + row * N : idle;
      w[m] = m < running ? weights + m * padded : zeros;
      if (m >= running) continue;
      if (t + kAhead < group.length[m]) {
        if (p.emission) prefetch<false>((const Real *)p.emission + (row + kAhead) * N, N);
        prefetch<true>(alpha + (row + kAhead) * N, N);
      }
      taken[m] += weigh<true>(Sequence<Real>(p, group.index[m]), arcs, t, centre[row], weights + m * padded, spare);
    }
    if (t == 0)
      for (int m = 0; m < running; m++) {
        const Sequence<Real> q(p, group.index[m]);
        const Real initial_top = frame_top<Real>(q.initial, nullptr, N);
        frame_weights<Real>(q.initial, nullptr, false, initial_top, N, spare);
        taken[m] += double(initial_top) - kTopBits * kLn2;
        total[m] = 0;
        for (int64_t j = 0; j < N; j++) {
          out[m][j] = spare[j] * top * w[m][j];
          total[m] += double(out[m][j]);
          flag[m] |= !arcs.mixing && out[m][j] < smallest && spare[j] > 0 && w[m][j] > 0;
        }
      }
    else if (running > 4) forward_step<8, Real>(arcs, previous, w, out, total, flag);
    else if (running > 2) forward_step<4, Real>(arcs, previous, w, out, total, flag);
    else if (running > 1) forward_step<2, Real>(arcs, previous, w, out, total, flag);
    else forward_step<1, Real>(arcs, previous, w, out, total, flag);
    for (int m = 0; m < running; m++) {
      if (!(total[m] >= arcs.least_sum)) {  // infeasible, lost or NaN: redo.h tells which
        flag[m] = true;
        continue;
      }
      if (t == group.length[m] - 1) log_partition[group.index[m]] = Real(taken[m] + std::log(total[m]));
      if (total[m] >= std::ldexp(1., kLowestTopBits) && total[m] < std::ldexp(1., kTopBits + 1)) continue;
      int exponent;
      std::frexp(total[m], &exponent);
      const int up = kTopBits + 1 - exponent;
      const Real scale = std::ldexp(Real(1), up);
      for (int64_t j = 0; j < N; j += W) store_part(out[m] + j, N - j, load_part(out[m] + j, N - j, Real(0)) * scale);
      taken[m] -= up * kLn2;
    }
  }
  for (int m = 0; m < group.size; m++) {
    method[group.index[m]] = flag[m] ? HMM_REDONE : HMM_SCALED;
    if (group.length[m] == 0) log_partition[group.index[m]] = 0;
  }
}

// out[m] = A u[m] for M sequences.
template <int M, class Real> void backward_step(const Arcs<Real> &arcs, const Real *const *u, Real *const *out) {
  constexpr int P = kPanel<Real>, W = kLanes<Real>, B = M > 4 ? kPanelVectors / 2 : kPanelVectors;
  auto columns = [&](auto width, int64_t i0) {
    constexpr int b = decltype(width)::value;
    Vec<Real> acc[M][b];
    product<M, b, Real>(u, arcs.backward + i0 / P * P * arcs.N + i0 % P, arcs.N, acc);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int v = 0; v < b; v++) store(out[m] + i0 + v * W, acc[m][v]);
  };
  int64_t i = 0;
  for (; arcs.N - i > (B - 1) * W; i += B * W) columns(Width<B>{}, i);
  for (; i < arcs.N; i += W) columns(Width<1>{}, i);
}

// G = sum a b over the states that can be reached; b of the others becomes 0, whatever it overflowed to.
template <class Real> HMM_INLINE Real posterior_mass(const Real *a, Real *b, int64_t N) {
  constexpr int W = kLanes<Real>;
  Vec<Real> g = {};
  for (int64_t j = 0; j < N; j += W) {
    const Vec<Real> x = load_part(a + j, N - j, Real(0)), y = x > Real(0) ? load(b + j) : Vec<Real>{};
    store(b + j, y);
    g += x * y;
  }
  return sum_of<Real>(g);
}

// gamma = grad a b / G into state (N), and w b / G into next, which is padded; w null for 1.
template <class Real>
HMM_INLINE void posterior_row(const Real *a, const Real *b, const Real *w, Real grad, Real inverse, int64_t N, Real *state, Real *next) {
  constexpr int W = kLanes<Real>;
  for (int64_t j = 0; j < N; j += W) {
    const Vec<Real> y = load(b + j) * inverse;
    store_part(state + j, N - j, load_part(a + j, N - j, Real(0)) * y * grad);
    if (w) store(next + j, load(w + j) * y);
  }
}

template <class Real>
void backward_group(const hmm_problem &p, const Arcs<Real> &arcs, const Group &group, Real *scratch, const Real *grad,
                    const Real *alpha, const Real *centre, Real *state, Counts<Real> *counts) {
  const int64_t N = p.states, padded = arcs.padded;
  // `next` holds w * b of the frame after; the idle rows of a step go to `idle`.
  Real *next = scratch, *beta = next + kGroup * padded, *spare = beta + kGroup * padded, *w = spare + padded, *idle = w + padded;
  const int64_t longest = group.size ? group.length[0] : 0;
  for (int64_t t = longest - 1; t >= 0; t--) {
    const int running = group.running(t), before = group.running(t + 1);
    const Real *u[kGroup];
    Real *out[kGroup];
    for (int m = 0; m < kGroup; m++) {
      u[m] = next + (m < before ? m : 0) * padded;
      out[m] = m < before ? beta + m * padded : idle;
    }
    if (before > 4) backward_step<8, Real>(arcs, u, out);
    else if (before > 2) backward_step<4, Real>(arcs, u, out);
    else if (before > 1) backward_step<2, Real>(arcs, u, out);
    else if (before > 0) backward_step<1, Real>(arcs, u, out);
    for (int m = 0; m < running; m++) {
      const int64_t b = group.index[m], frame = b * p.time + t;
      const Real *a = alpha + frame * N;
      if (t >= kAhead) {
        prefetch<false>(a - kAhead * N, N);
        if (p.emission) prefetch<false>((const Real *)p.emission + (frame - kAhead) * N, N);
        prefetch<true>(state + (frame - kAhead) * N, N);
      }
      Real *const y = beta + m * padded;
      if (m >= before)
        for (int64_t j = 0; j < N; j++) y[j] = 1;
      const Real inverse = Real(1) / posterior_mass(a, y, N);
      if (counts && m < before) counts->add(a, grad[b] * counts->grad_scale * inverse, next + m * padded);
      Real found = t ? centre[frame] : Real(0);
      if (t) weigh<false>(Sequence<Real>(p, b), arcs, t, found, w, spare);
      posterior_row<Real>(a, y, t ? w : nullptr, grad[b], inverse, N, state + frame * N, next + m * padded);
    }
  }
}

}  // namespace
