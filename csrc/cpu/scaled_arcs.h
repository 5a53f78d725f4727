// Forward-backward by scaled probabilities, for transitions shared over time (Rabiner 1989, section V.A; here with
// power-of-two scales, which are exact, and a certificate).
//
//   A(i, j) = exp(phi(i, j) - c(j)),  c(j) = max_i phi(i, j) to 1/64;     w_t(j) = exp(e_t(j) + c(j) - max of the same over j)
//   a_t     = 2^k_t (a_{t-1} A) * w_t,    sum_j a_t(j) in [2^18, 2^31);      log Z = log sum_j a_{L-1}(j) + what was taken out
//   b_{t-1} = A (w_t * b_t) / G,          G such that sum_i a_{t-1}(i) b_{t-1}(i) = 1;          gamma_t = a_t * b_t
//   counts  = A * sum_t a_{t-1}^T (w_t * b_t) / G_{t-1},   as one matrix product over blocks of frames
//
// Several sequences go through a step together, so that a step is a product (M x N) by (N x N) whose right side is
// packed once. Cost a frame: 2 N^2 flops forward, 4 N^2 backward, N exps each; bound by arithmetic from N = 32 on
// (2 N^2 / 16 lanes / 2 ports: 0.5 us a frame for N = 128). Limits: none on N or T.
//
// When is it exact? A number below 2^-126 (float) is lost. Two certificates, either is enough:
//  (mixing) All arcs allowed, and within each column they differ by R bits at most. Then the backward scores of any two
//     states differ by R bits at most. A weight that is lost stands before a product of at most 2^31, and a term of a
//     product below 2^-126; so what is lost or made up at t is below N^2 2^-95, against the sum s_t before rescaling, and
//     its posterior below N^2 2^(R - 95) / s_t. With s_t >= T N^2 2^(R - 95 + 24) demanded, frames add up to less than 2^-24.
//  (entrywise) Every state that can be reached has a message of at least 2^-94, hence a relative error of at most N 2^-32:
//     nothing was lost. A state with a smaller message is reachable if an allowed arc leads to it from a state whose
//     message is not 0; then the sequence is redone (redo.h). A zero sum alone would not show that, since a state
//     that was lost may win later.
// Backward, messages satisfy sum a b = 1; with a in [2^-94, 2^31] and s_t >= 2^-18 an entry that is lost has a
// posterior below 2^(31 - 126 + 30 + 18) = 2^-47. Double precision: the same with the bits of Range<double>.
#pragma once
#include <cmath>
#include <cstring>

#include "problem.h"
#include "simd.h"

namespace {

template <class Real> struct Range;
template <> struct Range<float> {
  static constexpr int kSmallestBits = -126, kEntryBits = -94, kArcBits = -100, kLeastSumBits = -18, kPrecision = 24;
};
template <> struct Range<double> {
  static constexpr int kSmallestBits = -1022, kEntryBits = -960, kArcBits = -980, kLeastSumBits = -370, kPrecision = 53;
};
// Messages are rescaled to a sum in [2^30, 2^31) when it leaves [2^18, 2^31): once in some ten frames of typical speech.
constexpr int kTopBits = 30, kLowestTopBits = 18;
// Halves must meet in 2^-65 N^2 (float): see (joined).
template <class Real> constexpr int kLeastJoinedBits = Range<Real>::kSmallestBits + kTopBits + 1 + Range<Real>::kPrecision + 6;

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // a panel of packed columns; 32 registers: up to 16 accumulators
#else
constexpr int kPanelVectors = 2;
#endif
template <class Real> constexpr int kPanel = kPanelVectors * kLanes<Real>;

template <int B> struct Width {
  static constexpr int value = B;
};

// acc[m][v] = sum_k x[m][k] packed[k][v], for B vectors of one panel of packed columns. A fused product takes four cycles
// and two can begin in each: where M B is less than 8, that many sums over every D-th k run side by side.
template <int M, int B, class Real>
HMM_INLINE void product(const Real *const *x, const Real *packed, int64_t K, Vec<Real> (&acc)[M][B]) {
  constexpr int D = M * B < 8 ? 8 / (M * B) : 1;
  Vec<Real> part[D][M][B];
#pragma GCC unroll 16
  for (int d = 0; d < D; d++)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int v = 0; v < B; v++) part[d][m][v] = Vec<Real>{};
  const Real *row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) row[m] = x[m];
  const auto add = [&](int64_t k, Vec<Real>(&sum)[M][B]) __attribute__((always_inline)) {
    Vec<Real> a[B];
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) a[v] = load(packed + k * kPanel<Real> + v * kLanes<Real>);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Vec<Real> s = splat(row[m][k]);
#pragma GCC unroll 16
      for (int v = 0; v < B; v++) sum[m][v] += s * a[v];
    }
  };
  int64_t k = 0;
  for (; k + D <= K; k += D)
#pragma GCC unroll 16
    for (int d = 0; d < D; d++) add(k + d, part[d]);
  for (; k < K; k++) add(k, part[0]);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < B; v++) {
      acc[m][v] = part[0][m][v];
#pragma GCC unroll 16
      for (int d = 1; d < D; d++) acc[m][v] += part[d][m][v];
    }
}

// The transition matrix, ready for both directions.
template <class Real> struct Arcs {
  int64_t N, padded;
  Scratch<Real> forward, backward, shift;  // panels of A, panels of A transposed, c(j) - max c
  double top = 0;                          // max c
  double least_sum = 0;                    // s_t must not be less
  bool mixing = false, usable = true;      // which certificate applies; usable: no allowed arc was flushed
  bool wide = false;                       // shifts over 16 nats: e + c may cancel, its rounding must be made good

  Arcs(const Real *scores, int64_t n, int64_t T, bool with_backward)
      : N(n), padded(round_up(n, kPanel<Real>)), forward(padded * n), backward(with_backward ? padded * n : 0), shift(padded) {
    if (!forward.data || !backward.data || !shift.data) return;
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    const Real ninf = kNegativeInfinity<Real>;
    Real *c = shift;
    for (int64_t j = 0; j < padded; j++) c[j] = ninf;
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < N; j += W) store(c + j, larger(load(c + j), load_part(scores + i * N + j, N - j, ninf)));
    // On a grid, differences of any two c are exact, and so is the shift that the emissions get.
    for (int64_t j = 0; j < N; j++) c[j] = c[j] == ninf ? ninf : std::rint(c[j] * 64) / 64;
    Real highest = ninf;
    for (int64_t j = 0; j < N; j++) highest = c[j] > highest ? c[j] : highest;  // +inf and NaN show in A
    if (highest == ninf) highest = 0;
    top = double(highest);
    Real lowest = 0;  // of the allowed arcs, below their column's maximum
    bool forbidden = false;
    for (int64_t j = 0; j < padded; j += W) {
      Vec<Real> m = load(c + j), origin = m == ninf ? Vec<Real>{} : m, low = {};
      Real *panel = forward + j / P * P * N + j % P;
      for (int64_t i = 0; i < N; i++) {
        Vec<Real> s = load_part(scores + i * N + j, N - j, ninf) - origin;
        Vec<Real> finite = s == ninf ? Vec<Real>{} : s;
        low = finite < low ? finite : low;
        store(panel + i * P, exp<Real>(s));
        if (N - j >= W) forbidden |= any<Real>(s == ninf);
        else
          for (int64_t v = 0; v < N - j; v++) forbidden |= s[v] == ninf;
      }
      for (int v = 0; v < W; v++) lowest = low[v] < lowest ? low[v] : lowest;
      store(c + j, m == ninf ? Vec<Real>{} : m - highest);
      wide |= any<Real>(load(c + j) < Real(-16));
    }
    const double bits = -double(lowest) * 1.4426950408889634;
    usable = bits <= -Range<Real>::kArcBits;
    const double demanded = bits + 2 * std::log2(double(N)) + std::log2(double(T)) + Range<Real>::kSmallestBits +
                            kTopBits + 1 + Range<Real>::kPrecision;
    mixing = !forbidden && demanded <= kLowestTopBits - 4;  // beyond that, benign frames would fail it
    least_sum = std::exp2(mixing && demanded > Range<Real>::kLeastSumBits ? demanded : Range<Real>::kLeastSumBits);
    if (with_backward) pack_transposed();
  }
  bool allocated() const { return forward.data && backward.data && shift.data; }
  // The panels that lead a message on: with the arcs (step 1) or against them (-1).
  const Real *along(int step) const { return step > 0 ? forward : backward; }

 private:
  // Squares of vectors, so that every line of memory is met once.
  void pack_transposed() {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    Vec<Real> square[W];
    for (int64_t i = 0; i < N; i += W)
      for (int64_t j = 0; j < N; j += W) {
        const int64_t rows = N - i < W ? N - i : W, columns = N - j < W ? N - j : W;
        for (int v = 0; v < W; v++)
          square[v] = v < rows ? load(forward + j / P * P * N + (i + v) * P + j % P) : Vec<Real>{};
        transpose<Real>(square);
        for (int v = 0; v < columns; v++) store(backward + i / P * P * N + (j + v) * P + i % P, square[v]);
      }
  }
};

}  // namespace
