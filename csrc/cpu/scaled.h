// Forward-backward by scaled probabilities over groups of sequences, what a step is made of: the recursions, costs and
// certificates are in scaled_arcs.h, whole passes in walks.h.
#pragma once
#include "scaled_arcs.h"

namespace {

constexpr int kGroup = 8;  // sequences that go through a step together, at most
constexpr double kLn2 = 0.6931471805599453;

// Where the two halves of a sequence meet: frames before this one belong to the first. Frame 0 always does.
inline int64_t meeting(int64_t length) { return (length + 1) / 2; }

// Sequences, or halves of them, in the order of falling length: those still running at a step are the first ones.
struct Group {
  int size = 0;
  int step = 1;                            // 1: from the first frame on; -1: from the last one back, against the arcs
  int64_t index[kGroup], length[kGroup];   // the sequence and how many of its frames are walked
  int64_t first[kGroup];                   // the frame where the walk begins
  bool meets[kGroup];                      // it ends beside the other half, whose message it goes on from

  void add(int64_t b, int64_t begin, int64_t frames, bool half) {
    index[size] = b, first[size] = begin, length[size] = frames, meets[size++] = half;
  }
  Group half(bool second) const {  // of a group of whole sequences
    Group g;
    g.step = second ? -1 : 1;
    for (int m = 0; m < size; m++) {
      const int64_t middle = meeting(length[m]);
      if (second) g.add(index[m], length[m] - 1, length[m] - middle, true);
      else g.add(index[m], 0, middle, length[m] > 1);
    }
    return g;
  }
  int64_t frame(int m, int64_t t) const { return first[m] + t * step; }
  int running(int64_t t) const { return first_ones([&](int m) { return length[m] > t; }); }
  // Those with a message of the step after t, their own or the other half's.
  int entered(int64_t t) const { return first_ones([&](int m) { return length[m] + meets[m] > t + 1; }); }

 private:
  template <class Test> int first_ones(Test test) const {
    int n = 0;
    while (n < size && test(n)) n++;
    return n;
  }
};

// What a group's walk ends with: the last message's sum, what was taken out of it, and whether the certificate failed.
struct Ends {
  double total[kGroup], taken[kGroup];
  bool lost[kGroup];
};

// function(Width<M>) for the smallest M of 1, 2, 4, 8 that holds `rows` rows, which are 1 at least.
template <class Function> HMM_INLINE void for_rows(int rows, Function function) {
  if (rows > 4) function(Width<8>{});
  else if (rows > 2) function(Width<4>{});
  else if (rows > 1) function(Width<2>{});
  else function(Width<1>{});
}

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
HMM_APART void frame_weights(const Real *emission, const Real *shift, bool wide, Real top, int64_t N, Real *w) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  const auto weights = [&](auto sum) __attribute__((always_inline)) {
    const auto some = [&](int64_t j) __attribute__((always_inline)) {
      const Vec<Real> e = emission ? load_part(emission + j, N - j, ninf) : Vec<Real>{};
      store_part(w + j, N - j, e == ninf ? Vec<Real>{} : lifted_exp<Real>(sum(e, j)));
    };
    int64_t j = 0;
    for (; N - j >= W; j += W) some(j);
    if (j < N) some(j);
  };
  if (!shift) return weights([&](Vec<Real> e, int64_t) __attribute__((always_inline)) { return e - top; });
  if (!wide) return weights([&](Vec<Real> e, int64_t j) __attribute__((always_inline)) { return e - top + load(shift + j); });
  weights([&](Vec<Real> e, int64_t j) __attribute__((always_inline)) {
    const Vec<Real> sum = e - top, s = load(shift + j), part = sum - e, whole = sum + s, other = whole - sum;
    return whole + (((e - (sum - part)) + (-top - part)) + ((sum - (whole - other)) + (s - other)));
  });
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
template <bool Find, class Real, class Chain>
HMM_INLINE double weigh(const Sequence<Real> &q, const Chain &arcs, int64_t t, Real &centre, Real *w, Real *spare) {
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
HMM_APART bool reachable(Int<Real> suspect, const Real *previous, const Real *packed, int64_t depth) {
  Int<Real> reached = {};
  for (int64_t i = 0; i < depth; i++)
    if (previous[i] > 0) reached |= packed_vector(packed, depth, i, 0) > Real(0);
  return any<Real>(suspect & reached);
}

// out[m] = (previous[m] A) * w[m] for the columns from j0, B vectors of them, A being what the panels hold; adds to sum,
// flags where (entrywise) fails, unless the chain is mixing.
template <int M, int B, class Real>
HMM_INLINE void forward_columns(const Panels<Real> &panels, bool mixing, int64_t j0, const Real *const *previous,
                                const Real *const *w, Real *const *out, Vec<Real> *sum, bool *flag) {
  constexpr int W = kLanes<Real>;
  const int64_t N = panels.columns;
  const Real smallest = std::ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *packed = panels.from(j0);
  Vec<Real> acc[M][B];
  product<M, B, Real>(previous, packed, panels.depth, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) {
      const int64_t j = j0 + v * W;
      const Vec<Real> weight = load(w[m] + j), a = acc[m][v] * weight;
      sum[m] += a;
      store_part(out[m] + j, N - j, a);
      if (mixing || flag[m]) continue;
      const Int<Real> suspect = ((a < smallest) | (weight <= kTiny<Real>)) & (weight > Real(0));
      if (any<Real>(suspect)) flag[m] = reachable<Real>(suspect, previous[m], panels.from(j), panels.depth);
    }
}

template <int M, class Real>
void forward_step(const Panels<Real> &panels, bool mixing, const Real *const *previous, const Real *const *w,
                  Real *const *out, double *total, bool *flag) {
  Vec<Real> sum[M];
  for (int m = 0; m < M; m++) sum[m] = Vec<Real>{};
  in_tiles<M, Real>(panels.span, [&](auto width, int m, int64_t j) __attribute__((always_inline)) {
    forward_columns<kRows<M>, decltype(width)::value>(panels, mixing, j, previous + m, w + m, out + m, sum + m, flag + m);
  });
  for (int m = 0; m < M; m++) total[m] = double(sum_of<Real>(sum[m]));
}

// a_0, or from the end b_{L-1}: 2^30 exp(initial) * w, or 2^30 w.
template <class Real>
HMM_INLINE void first_message(const Sequence<Real> &q, bool mixing, bool from_end, const Real *w, Real *spare,
                              Real *out, double &total, double &taken, bool &flag) {
  const Real top = std::ldexp(Real(1), kTopBits), smallest = std::ldexp(Real(1), Range<Real>::kEntryBits);
  const Real *scores = from_end ? nullptr : q.initial;
  const Real scores_top = scores ? frame_top<Real>(scores, nullptr, q.states) : Real(0);
  frame_weights<Real>(scores, nullptr, false, scores_top, q.states, spare);
  taken += double(scores_top) - kTopBits * kLn2;
  total = 0;
  for (int64_t j = 0; j < q.states; j++) {
    out[j] = spare[j] * top * w[j];
    total += double(out[j]);
    flag |= !mixing && out[j] < smallest && spare[j] > 0 && w[j] > 0;
  }
}

// Brings a message (N) and its sum back into their range by a power of two; returns its exponent. growth: by how much the
// chain's step can multiply a sum.
template <class Real> int rescale(Real *message, double &total, int64_t N, int64_t growth) {
  constexpr int W = kLanes<Real>;
  const int up = rescaling(total, growth);
  const Real scale = power_of_two<Real>(up);
  for (int64_t j = 0; j < N; j += W) store_part(message + j, N - j, load_part(message + j, N - j, Real(0)) * scale);
  total *= double(scale);
  return up;
}

// out[m] = A u[m] for M sequences; the panels hold A transposed.
template <int M, class Real>
HMM_APART void backward_step(const Panels<Real> &panels, const Real *const *u, Real *const *out) {
  product_step<M, Real>(panels.span, out, [&](auto &sums, int m, int64_t i) __attribute__((always_inline)) {
    product(u + m, panels.from(i), panels.depth, sums);
  });
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

}  // namespace
