// Forward-backward by scaled probabilities, for transitions shared over time (Rabiner 1989, section V.A; here with
// power-of-two scales, which are exact, and a certificate).
//
//   A(i, j) = exp(phi(i, j) - c(j)),  c(j) = max_i phi(i, j) to 1/64;     w_t(j) = exp(e_t(j) + c(j) - max of the same over j)
//   a_t     = 2^k_t (a_{t-1} A) * w_t,    sum_j a_t(j) in [2^18, 2^31);      log Z = log sum_j a_{L-1}(j) + what was taken out
//   b_{t-1} = A (w_t * b_t) / G,          G such that sum_i a_{t-1}(i) b_{t-1}(i) = 1;          gamma_t = a_t * b_t
//   counts  = A * sum_t a_{t-1}^T (w_t * b_t) / G_{t-1},   as one matrix product over blocks of frames
//
// From both ends: where there are fewer sequences than rows and threads would take, the second half of each runs at the
// same time as the first, from the end back. A chain read from its end is a chain again, with A transposed, the same w_t,
// final scores (in w_{L-1}) as initial ones, and messages that need no G:
//
//   b_{L-1} = 2^30 w_{L-1};   b_t = 2^k_t (A b_{t+1}) * w_t  for t >= m;       Z = sum_ij a_{m-1}(i) A(i, j) b_m(j)
//
// Backward, each half walks from the middle to its own end, and starts from the other's message: the first as above, from
// b_m; the second by the same kernel against the arcs, from a_{m-1}. No step is done twice. m = (L + 1) / 2.
// To cut further takes transfer matrices, N rows a step where a message is one: for N = 50, 10,000 vector products a frame,
// 5,000 cycles, against the 500 that a frame of one sequence takes so: ten threads would have to share them to break even.
//
// Several sequences go through a step together, so that a step is a product (M x N) by (N x N) whose right side is
// packed once. Cost a frame: 2 N^2 flops forward, 4 N^2 backward with counts, N exps each; 4 N^2 bytes of arcs a step for
// up to 8 sequences. Floors on one core (AMD EPYC, AVX-512: 234 GFLOP/s; arcs from the second cache, N <= 512, 170 to 270
// GB/s; from the third, 120) and what forward + backward reach:
//   B = 8, arithmetic: N = 50 takes 0.45 + 0.68 ms for 1,000 frames, 90 and 118 GFLOP/s (14 of 64 columns are idle lanes;
//     N exps weigh as much as the product); N = 128, 1.4 + 2.6 ms, 190 and 200; N = 512, 19 + 43 ms, 220 and 190.
//     Since then messages that grow are not rescaled at each frame: .86 of the forward pass at N = 50 (Zen 3, AVX2), .73 at 16.
//   B = 1, the arcs' bytes: forward, 3,000 frames, N = 128 in 1.2 ms, 160 GB/s; N = 512 in 21 ms, 150; N = 1024 (1,000
//     frames) in 39 ms, 109. Below N = 64 a frame takes some 40 ns beside the product.
// Two threads over one, forward + backward, B = 8, 300 frames: N = 50 and 128, by sequences, 1.8; N = 256 and 512, from both
// ends, 1.9; N = 1024 and 2048, in lockstep, 1.85 to 1.9. B = 1: N = 256 1.8, N = 512 1.55. More threads were not measured.
// Limits: none on N or T.
//
// When is it exact? A number below 2^-126 (float) is lost. Two certificates, either is enough:
//  (mixing) All arcs allowed, and within each column they differ by R bits at most. Then the backward scores of any two
//     states differ by R bits at most. A weight that is lost stands before a product of at most 2^31, and a term of a
//     product below 2^-126; so what is lost or made up at t is below N^2 2^-95, against the sum s_t before rescaling, and
//     its posterior below N^2 2^(R - 95) / s_t. With s_t >= T N^2 2^(R - 95 + 24) demanded, frames add up to less than 2^-24.
//  (entrywise) Every state that can be reached has a message of at least 2^-94, hence a relative error of at most N 2^-32,
//     and a weight that is above 2^-126, to which smaller ones are lifted: nothing was lost or made up. Another state is
//     reachable if an allowed arc leads to it from a state whose message is not 0; then the sequence is redone (redo.h). A
//     zero sum alone would not show that, since a state that was lost may win later.
// Backward, messages satisfy sum a b = 1; with a in [2^-94, 2^31] and s_t >= 2^-18 an entry that is lost has a
// posterior below 2^(31 - 126 + 30 + 18) = 2^-47. And none overflows: where a sum grew by N at most, rescaling takes
// 7 + log N bits off a and adds them to b of the frame before, so that b < 2^(94 + 2 (7 + 10)) for N of up to 1024 and,
// with one bit for seven, 2^(94 + 2 (1 + log N)) for more. Double precision: the same with the bits of Range<double>.
//
// From both ends, the same holds with the roles exchanged. (mixing) Every A(i, j) is in [2^-R, 1], hence those of a row
// too differ by R bits at most, and so do the forward scores of any two states, by which what b loses is weighted.
// (entrywise) is asked of b as of a. (joined) A term A(i, j) b_m(j) that is lost is below 2^-126 and stands before an a of
// at most 2^31; so Z may lack N^2 2^-95, and Z >= N^2 2^-65 is demanded of sequences that keep the result: 30 bits. If
// either half or the join fails, the sequence is redone as a whole.
#pragma once
#include <bit>
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
// Messages are rescaled when their sum leaves [2^18, 2^31): to [2^30, 2^31) where it fell and, where a step multiplies it by
// 1024 at most, to [2^24, 2^25) where it grew, either way once in some frames, not in each.
constexpr int kTopBits = 30, kGrownBits = 24, kLowestTopBits = 18;
constexpr int64_t kGrowing = 1024;
inline bool stands(double total) { return total >= double(1 << kLowestTopBits) && total < 2. * (1 << kTopBits); }

// log2 of the power of two that does so; total is positive and normal.
inline int rescaling(double total, int64_t growth) {
  const int exponent = int(std::bit_cast<uint64_t>(total) >> 52) - 1023;
  return (exponent > kTopBits && growth <= kGrowing ? kGrownBits : kTopBits) - exponent;
}
template <class Real> Real power_of_two(int exponent);  // within the normal numbers
template <> inline float power_of_two(int exponent) { return std::bit_cast<float>(uint32_t(exponent + 127) << 23); }
template <> inline double power_of_two(int exponent) { return std::bit_cast<double>(uint64_t(exponent + 1023) << 52); }
// Halves must meet in 2^-65 N^2 (float): see (joined).
template <class Real> constexpr int kLeastJoinedBits = Range<Real>::kSmallestBits + kTopBits + 1 + Range<Real>::kPrecision + 6;

// Rows that a product takes at once: with two vectors of columns 16 accumulators of 32 registers, 8 of 16. More rows follow
// while the columns are in cache. (8 rows by one vector read nine numbers for eight products, where six do: of 16 registers
// that took 1.05 times as long at N = 50, 1.3 at 256 and more.)
#if defined(__AVX512F__)
constexpr int kMostRows = 8;
#else
constexpr int kMostRows = 4;
#endif
template <int M> constexpr int kRows = M < kMostRows ? M : kMostRows;
template <int M> constexpr int kVectors = M < kMostRows ? 4 : 2;  // of columns, beside M rows
// A panel of packed columns is as wide as a product of the most rows takes; one of fewer reads two side by side. (In panels of
// twice the width, it would read every other line: at N = 2048, where a panel leaves the second cache before its other half
// is read, that took 1.5 times as long.)
constexpr int kPanelVectors = 2;
template <class Real> constexpr int kPanel = kPanelVectors * kLanes<Real>;

template <int B> struct Width {
  static constexpr int value = B;
};

struct Span {
  int64_t begin, end;
};

// Goes through M rows and the columns of a span, as many of both at once as registers hold: tile(Width<vectors>, m, j).
template <int M, class Real, class Tile> HMM_INLINE void in_tiles(Span span, Tile tile) {
  constexpr int W = kLanes<Real>, B = kVectors<kRows<M>>;
  const auto rows = [&](auto width, int64_t j) __attribute__((always_inline)) {
    for (int m = 0; m < M; m += kRows<M>) tile(width, m, j);
  };
  int64_t j = span.begin;
  for (; span.end - j > (B - 1) * W; j += B * W) rows(Width<B>{}, j);
  for (; j < span.end; j += W) rows(Width<1>{}, j);
}

// out[m](j) = what multiply(sums, m, j) finds for each tile of M rows and the columns of a span.
template <int M, class Real, class Multiply>
HMM_INLINE void product_step(Span span, Real *const *out, Multiply multiply) {
  constexpr int W = kLanes<Real>, R = kRows<M>;
  in_tiles<M, Real>(span, [&](auto width, int m0, int64_t j0) __attribute__((always_inline)) {
    constexpr int B = decltype(width)::value;
    Vec<Real> sums[R][B];
    multiply(sums, m0, j0);
#pragma GCC unroll 16
    for (int m = 0; m < R; m++)
#pragma GCC unroll 16
      for (int v = 0; v < B; v++) store(out[m0 + m] + j0 + v * W, sums[m][v]);
  });
}

// One of several chunks of the columns, in pairs of panels: what a column's product is does not depend on the chunks.
template <class Real> constexpr int kChunkColumns = 2 * kPanel<Real>;
template <class Real> Span chunk_of(int64_t columns, int chunk, int chunks) {
  constexpr int64_t width = kChunkColumns<Real>;
  const int64_t pairs = (columns + width - 1) / width, end = pairs * (chunk + 1) / chunks * width;
  return {pairs * chunk / chunks * width, end < columns ? end : columns};
}

// A matrix (depth, columns) as panels of packed columns, of which those in `span` are computed.
template <class Real> struct Panels {
  const Real *data;
  int64_t depth, columns;
  Span span = {0, columns};
  const Real *from(int64_t j) const { return data + j / kPanel<Real> * kPanel<Real> * depth + j % kPanel<Real>; }
  Panels chunk(int chunk, int chunks) const { return {data, depth, columns, chunk_of<Real>(columns, chunk, chunks)}; }
};

// The v-th vector of columns of row k, from column vector `packed` of a panel of K rows on.
template <class Real> HMM_INLINE Vec<Real> packed_vector(const Real *packed, int64_t K, int64_t k, int v) {
  return load(packed + (v / kPanelVectors * K + k) * kPanel<Real> + v % kPanelVectors * kLanes<Real>);
}

// acc[m][v] = sum_k x[m][k] packed[k][v], for B vectors of packed columns. A fused product takes four cycles
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
    for (int v = 0; v < B; v++) a[v] = packed_vector(packed, K, k, v);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Vec<Real> s = splat(row[m][k]);
#pragma GCC unroll 16
      for (int v = 0; v < B; v++) sum[m][v] += s * a[v];
    }
  };
  int64_t k = 0;
#pragma GCC unroll 2  // a tenth of the instructions are the loop's
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

  // What packing some columns has found.
  struct Found {
    Real highest, lowest;  // c(j), and the allowed arcs below their c
    bool forbidden;
  };

  Arcs(int64_t n, bool with_backward)  // to be packed
      : N(n), padded(round_up(n, kPanel<Real>)), forward(padded * n, false), backward(with_backward ? padded * n : 0, false),
        shift(padded) {}
  Arcs(const Real *scores, int64_t n, int64_t T, bool with_backward) : Arcs(n, with_backward) {
    if (!allocated()) return;
    const Found found = pack(scores, {0, N});
    certify(&found, 1, T);
    if (with_backward) pack_transposed({0, N});
  }

  // The columns' maxima (into `shift`) and panels.
  Found pack(const Real *scores, Span span) {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    const Real ninf = kNegativeInfinity<Real>;
    Found found = {ninf, 0, false};
    Real *c = shift;
    for (int64_t j = span.begin; j < (span.end < N ? span.end : padded); j++) c[j] = ninf;
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = span.begin; j < span.end; j += W)
        store(c + j, larger(load(c + j), load_part(scores + i * N + j, N - j, ninf)));
    // On a grid, differences of any two c are exact, and so is the shift that the emissions get.
    for (int64_t j = span.begin; j < span.end; j++) {
      c[j] = c[j] == ninf ? ninf : std::rint(c[j] * 64) / 64;
      found.highest = c[j] > found.highest ? c[j] : found.highest;  // +inf and NaN show in A
    }
    for (int64_t j = span.begin; j < span.end; j += W) {
      const Vec<Real> m = load(c + j), origin = m == ninf ? Vec<Real>{} : m;
      Vec<Real> low = {};
      Real *panel = forward + j / P * P * N + j % P;
      for (int64_t i = 0; i < N; i++) {
        Vec<Real> s = load_part(scores + i * N + j, N - j, ninf) - origin;
        Vec<Real> finite = s == ninf ? Vec<Real>{} : s;
        low = finite < low ? finite : low;
        store(panel + i * P, exp<Real>(s));
        if (N - j >= W) found.forbidden |= any<Real>(s == ninf);
        else
          for (int64_t v = 0; v < N - j; v++) found.forbidden |= s[v] == ninf;
      }
      for (int v = 0; v < W; v++) found.lowest = low[v] < found.lowest ? low[v] : found.lowest;
    }
    return found;
  }

  // Makes shifts of the maxima and chooses the certificate, when all columns are packed.
  void certify(const Found *found, int count, int64_t T) {
    const Real ninf = kNegativeInfinity<Real>;
    Found all = {ninf, 0, false};
    for (const Found *f = found; f < found + count; f++) {
      all.highest = f->highest > all.highest ? f->highest : all.highest;
      all.lowest = f->lowest < all.lowest ? f->lowest : all.lowest;
      all.forbidden |= f->forbidden;
    }
    const Real highest = all.highest == ninf ? Real(0) : all.highest;
    top = double(highest);
    for (int64_t j = 0; j < padded; j++) {
      shift[j] = shift[j] == ninf ? Real(0) : shift[j] - highest;
      wide |= shift[j] < Real(-16);
    }
    const double bits = -double(all.lowest) * 1.4426950408889634;
    usable = bits <= -Range<Real>::kArcBits;
    const double demanded = bits + 2 * std::log2(double(N)) + std::log2(double(T)) + Range<Real>::kSmallestBits +
                            kTopBits + 1 + Range<Real>::kPrecision;
    mixing = !all.forbidden && demanded <= kLowestTopBits - 4;  // beyond that, benign frames would fail it
    least_sum = std::exp2(mixing && demanded > Range<Real>::kLeastSumBits ? demanded : Range<Real>::kLeastSumBits);
  }

  // The panels of A transposed from those of A, rows of these. By squares of vectors, so that every line of memory is met once.
  void pack_transposed(Span rows_of) {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    Vec<Real> square[W];
    for (int64_t i = rows_of.begin; i < rows_of.end; i += W)
      for (int64_t j = 0; j < N; j += W) {
        const int64_t rows = N - i < W ? N - i : W, columns = N - j < W ? N - j : W;
        for (int v = 0; v < W; v++)
          square[v] = v < rows ? load(forward + j / P * P * N + (i + v) * P + j % P) : Vec<Real>{};
        transpose<Real>(square);
        for (int v = 0; v < columns; v++) store(backward + i / P * P * N + (j + v) * P + i % P, square[v]);
      }
  }

  bool allocated() const { return forward.data && backward.data && shift.data; }
  // The panels that lead a message on: with the arcs (step 1) or against them (-1).
  const Real *along(int step) const { return step > 0 ? forward : backward; }
  Panels<Real> panels(int step) const { return {along(step), N, N}; }
};

}  // namespace
