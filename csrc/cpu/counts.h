// Expected transition counts: counts(i, j) = A(i, j) sum over frames of left(i) right(j), one matrix product a block of
// frames. 2 N^2 flops a frame; both blocks are packed as they arrive and stay in the second-level cache.
#pragma once
#include "scaled_arcs.h"

namespace {

template <class Real> struct Counts {
  static constexpr int kRows = 8, kColumns = kPanelVectors / 2 * kLanes<Real>;  // of the register tile
  const int64_t N, padded_rows, padded_columns;
  const int64_t depth;  // frames a block
  int64_t filled = 0;
  Scratch<Real> sum, left, right;

  explicit Counts(int64_t n)
      : N(n), padded_rows(round_up(n, kRows)), padded_columns(round_up(n, kColumns)), depth(n <= 256 ? 256 : 128),
        sum(padded_rows * padded_columns), left(padded_rows * depth), right(padded_columns * depth) {}
  bool allocated() const { return sum.data && left.data && right.data; }

  // One frame: a (N) times `scale` on the left, u (padded) on the right.
  void add(const Real *a, Real scale, const Real *u) {
    constexpr int W = kLanes<Real>;
    for (int64_t i = 0; i < N; i += kRows)
      for (int64_t r = 0; r < kRows && i + r < N; r++) left[(i * depth) + filled * kRows + r] = a[i + r] * scale;
    for (int64_t j = 0; j < padded_columns; j += W)
      store(right + j / kColumns * kColumns * depth + filled * kColumns + j % kColumns, load(u + j));
    if (++filled == depth) flush();
  }

  void flush() {
    constexpr int W = kLanes<Real>, B = kColumns / W;
    for (int64_t j = 0; j < padded_columns; j += kColumns)
      for (int64_t i = 0; i < padded_rows; i += kRows) {
        Vec<Real> acc[kRows][B] = {};
        const Real *x = left + i * depth, *y = right + j * depth;
        for (int64_t k = 0; k < filled; k++) {
          Vec<Real> column[B];
#pragma GCC unroll 4
          for (int v = 0; v < B; v++) column[v] = load(y + k * kColumns + v * W);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; m++) {
            const Vec<Real> s = splat(x[k * kRows + m]);
#pragma GCC unroll 4
            for (int v = 0; v < B; v++) acc[m][v] += s * column[v];
          }
        }
        for (int m = 0; m < kRows; m++)
          for (int v = 0; v < B; v++) {
            Real *out = sum + (i + m) * padded_columns + j + v * W;
            store(out, load(out) + acc[m][v]);
          }
      }
    filled = 0;
  }

  // edge (N, N) += A * sum. A forbidden arc gets nothing, whatever its sum overflowed to.
  void finish(const Arcs<Real> &arcs, Real *edge) {
    flush();
    constexpr int P = kPanel<Real>;
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < N; j++) {
        const Real a = arcs.forward[j / P * P * N + i * P + j % P];
        if (a > 0) edge[i * N + j] += std::ldexp(sum[i * padded_columns + j], kTopBits) * a;
      }
  }
};

}  // namespace
