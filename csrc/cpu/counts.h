// Expected transition counts: counts(i, j) = A(i, j) sum over frames of left(i) right(j), one matrix product a block of
// frames. 2 N^2 flops a frame, 8 N bytes packed as they arrive (rows of messages lie a power of two apart, of which a cache
// keeps few: read in place, N = 1024 took 1.15 times as long); the sum, 4 N^2 bytes, is read and written once in 256 frames.
// Bound by arithmetic: 160 GFLOP/s at N = 50, 200 at 512, 190 at 1024, of 234 (AMD EPYC, AVX-512). Limits: none on N or T.
#pragma once
#include "scaled_arcs.h"

namespace {

template <class Real> struct Counts {
  static constexpr int kTall = kMostRows, kColumns = kPanel<Real>;  // of the register tile
  static constexpr int kDepth = 256;                                // frames a block
  static constexpr int kPitch = kDepth + 4;  // of panels: a frame goes to lines that do not lie a power of two apart
  const int64_t N, padded;
  const Real grad_scale;  // a power of two that brings the largest |grad| near 1, so that products stay in range
  Scratch<Real> sum, left, right;  // left and right: panels of a tile's rows and columns, a slot a row

  Counts(int64_t n, const Real *grad, int64_t batch)
      : N(n), padded(round_up(n, kColumns)), grad_scale(scale_of(grad, batch)), sum(round_up(n, kTall) * padded, false),
        left(round_up(n, kTall) * kPitch, false), right(padded * kPitch, false) {}
  bool allocated() const { return sum.data && left.data && right.data; }

  static Real scale_of(const Real *grad, int64_t batch) {
    Real largest = 0;
    for (int64_t b = 0; b < batch; b++) largest = std::fabs(grad[b]) > largest ? std::fabs(grad[b]) : largest;
    return largest > 0 && std::isfinite(largest) ? std::ldexp(Real(1), -std::ilogb(largest)) : Real(1);
  }

  // One frame: a (N) on the left, scale * u (padded) on the right.
  void put(int64_t slot, const Real *a, Real scale, const Real *u) {
    constexpr int W = kLanes<Real>;
    scale *= std::ldexp(Real(1), -kTopBits);  // so that the products stay in range; finish() takes it back
    int64_t i = 0;
    for (; i + kTall <= N; i += kTall) std::memcpy(left + i * kPitch + slot * kTall, a + i, kTall * sizeof(Real));
    for (int64_t m = i; m < N; m++) left[i * kPitch + slot * kTall + m - i] = a[m];
    for (int64_t j = 0; j < padded; j += W)
      store(right + j / kColumns * kColumns * kPitch + slot * kColumns + j % kColumns, load(u + j) * scale);
  }

  // sum(i.., j..) += left(:, i..)^T right(:, j..) for Rows rows, one tile of columns and `frames` slots.
  template <int Rows> void tile(int64_t i, int64_t j, int64_t frames, bool begun) {
    constexpr int W = kLanes<Real>, B = kColumns / W;
    Vec<Real> acc[Rows][B] = {};
    const Real *x = left + i / kTall * kTall * kPitch + i % kTall, *y = right + j * kPitch;
    for (int64_t k = 0; k < frames; k++) {
      Vec<Real> column[B];
#pragma GCC unroll 4
      for (int v = 0; v < B; v++) column[v] = load(y + k * kColumns + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; m++) {
        const Vec<Real> s = splat(x[k * kTall + m]);
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

  // Empties the slots filled so far into these rows of the sum; `begun`: not for the first time.
  void flush(int64_t frames, bool begun, Span rows) {
    for (int64_t j = 0; j < padded; j += kColumns) {
      int64_t i = rows.begin;
      for (; i + kTall <= rows.end; i += kTall) tile<kTall>(i, j, frames, begun);
      for (; i + 2 <= rows.end; i += 2) tile<2>(i, j, frames, begun);
      if (i < rows.end) tile<1>(i, j, frames, begun);
    }
  }

  // edge (N, N) = A * sum in these rows of the sum, or += where it holds something. A forbidden arc gets nothing, whatever
  // its sum overflowed to. Where the frames came against the arcs (step -1), the sum and its panels are transposed.
  void finish(const Arcs<Real> &arcs, int step, Span rows, Real *edge, bool add) const {
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    const Real *panels = arcs.along(step), up = std::ldexp(Real(1), kTopBits), unscale = 1 / grad_scale;
    Vec<Real> square[W];
    for (int64_t i = rows.begin; i < rows.end; i += W)
      for (int64_t j = 0; j < N; j += W) {
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

// A thread's view of sums that its team fills: how far they are follows from the sequences' lengths, so that each thread
// keeps account for itself.
template <class Real> struct Counting {
  Counts<Real> *sums;   // null: nothing is counted
  int64_t filled = 0;   // slots
  bool begun = false;   // the sums hold earlier slots

  bool room(int slots) const { return !sums || filled + slots <= Counts<Real>::kDepth; }
  void flush(Span rows) const { sums->flush(filled, begun, rows); }
  void flushed() { filled = 0, begun = true; }

  // What was counted, into or onto edge.
  template <class Team> void finish(const Arcs<Real> &arcs, int step, Real *edge, bool add, Team &team) {
    if (!sums || (add && !begun && !filled)) return;
    team.together([&](int chunk) {
      const Span rows = chunk_of<Real>(sums->N, chunk, team.chunks());
      flush(rows);
      sums->finish(arcs, step, rows, edge, add);
    });
    flushed();
  }
};

}  // namespace
