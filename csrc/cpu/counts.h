// Expected transition counts: counts(i, j) = A(i, j) sum over frames of left(i) right(j), one matrix product a block of
// frames. 2 N^2 flops a frame, 4 N bytes packed as they arrive; the sum, 4 N^2 bytes, is read and written once in 256 frames.
// Bound by arithmetic: 160 GFLOP/s at N = 50, 200 at 512, 190 at 1024, of 234 (AMD EPYC, AVX-512). Limits: none on N or T.
#pragma once
#include "scaled_arcs.h"

namespace {

template <class Real> struct Counts {
  static constexpr int kRows = 8, kColumns = kPanel<Real>;  // of the register tile
  static constexpr int kDepth = 256;                                           // frames a block
  const int64_t N, padded;
  const Real grad_scale;  // a power of two that brings the largest |grad| near 1, so that products stay in range
  Scratch<Real> sum, right;
  const Real *left[kDepth];

  Counts(int64_t n, const Real *grad, int64_t batch)
      : N(n), padded(round_up(n, kColumns)), grad_scale(scale_of(grad, batch)), sum(round_up(n, kRows) * padded, false), right(padded * kDepth, false) {}
  bool allocated() const { return sum.data && right.data; }

  static Real scale_of(const Real *grad, int64_t batch) {
    Real largest = 0;
    for (int64_t b = 0; b < batch; b++) largest = std::fabs(grad[b]) > largest ? std::fabs(grad[b]) : largest;
    return largest > 0 && std::isfinite(largest) ? std::ldexp(Real(1), -std::ilogb(largest)) : Real(1);
  }

  // One frame: a (N), which must stay where it is until the next flush, on the left; scale * u (padded) on the right.
  void put(int64_t slot, const Real *a, Real scale, const Real *u) {
    constexpr int W = kLanes<Real>;
    scale *= std::ldexp(Real(1), -kTopBits);  // so that the products stay in range; finish() takes it back
    left[slot] = a;
    for (int64_t j = 0; j < padded; j += W)
      store(right + j / kColumns * kColumns * kDepth + slot * kColumns + j % kColumns, load(u + j) * scale);
  }

  // sum(i.., j..) += left(:, i..)^T right(:, j..) for Rows rows, one tile of columns and `frames` slots.
  template <int Rows> void tile(int64_t i, int64_t j, int64_t frames, bool begun) {
    constexpr int W = kLanes<Real>, B = kColumns / W;
    Vec<Real> acc[Rows][B] = {};
    const Real *y = right + j * kDepth;
    for (int64_t k = 0; k < frames; k++) {
      const Real *x = left[k] + i;
      Vec<Real> column[B];
#pragma GCC unroll 4
      for (int v = 0; v < B; v++) column[v] = load(y + k * kColumns + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; m++) {
        const Vec<Real> s = splat(x[m]);
#pragma GCC unroll 4
        for (int v = 0; v < B; v++) acc[m][v] += s * column[v];
      }
    }
    for (int m = 0; m < Rows; m++)
      for (int v = 0; v < B; v++) {
        Real *out = sum + (i + m) * padded + j + v * W;
        store(out, begun ? load(out) + acc[m][v] : acc[m][v]);
      }
  }

  // Empties the slots filled so far into these columns of the sum; `begun`: not for the first time.
  void flush(int64_t frames, bool begun, Span columns) {
    for (int64_t j = columns.begin; j < columns.end; j += kColumns) {
      int64_t i = 0;
      for (; i + kRows <= N; i += kRows) tile<kRows>(i, j, frames, begun);
      for (; i + 2 <= N; i += 2) tile<2>(i, j, frames, begun);
      if (i < N) tile<1>(i, j, frames, begun);
    }
  }

  // edge (N, N) = A * sum in these columns, or += where it holds something. A forbidden arc gets nothing, whatever its sum
  // overflowed to. Where the frames came against the arcs (step -1), the sum and its panels are transposed.
  void finish(const Arcs<Real> &arcs, int step, Span columns, Real *edge, bool add) const {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    const Real *panels = arcs.along(step), up = std::ldexp(Real(1), kTopBits), unscale = 1 / grad_scale;
    Vec<Real> square[W];
    for (int64_t i = 0; i < N; i += W)
      for (int64_t j = columns.begin; j < columns.end; j += W) {
        for (int v = 0; v < W; v++) {
          square[v] = Vec<Real>{};
          if (i + v >= N) continue;
          const Vec<Real> a = load(panels + j / P * P * N + (i + v) * P + j % P);
          square[v] = a > Real(0) ? load(sum + (i + v) * padded + j) * a * up * unscale : Vec<Real>{};
        }
        if (step < 0) transpose<Real>(square);
        const int64_t row = step > 0 ? i : j, column = step > 0 ? j : i;
        for (int v = 0; v < W && row + v < N; v++) {
          Real *out = edge + (row + v) * N + column;
          store_part(out, N - column, add ? load_part(out, N - column, Real(0)) + square[v] : square[v]);
        }
      }
  }
};

// A thread's view of sums that its team fills: how far they are follows from the sequences' lengths, so each counts for itself.
template <class Real> struct Counting {
  Counts<Real> *sums;   // null: nothing is counted
  int64_t filled = 0;   // slots
  bool begun = false;   // the sums hold earlier slots

  bool room(int slots) const { return !sums || filled + slots <= Counts<Real>::kDepth; }
  void flush(Span columns) const { sums->flush(filled, begun, columns); }
  void flushed() { filled = 0, begun = true; }

  // What was counted, into or onto edge.
  template <class Team> void finish(const Arcs<Real> &arcs, int step, Real *edge, bool add, Team &team) {
    if (!sums || (add && !begun && !filled)) return;
    team.together([&](int chunk) {
      const Span columns = chunk_of<Real>(sums->N, chunk, team.chunks());
      flush(columns);
      sums->finish(arcs, step, columns, edge, add);
    });
    flushed();
  }
};

}  // namespace
