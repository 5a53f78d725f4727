// Transitions shared over time, ready for max-plus products (viterbi.h) and for walks back along them.
#pragma once
#include "scaled_arcs.h"

namespace {

constexpr int kBlockVectors = 4;  // of columns that share bounds (pruned_max.h)

template <class Real> struct MaxArcs {
  const int64_t N, padded;
  Scratch<Real> packed, columns;  // panels of kPanel columns, (panels, N, kPanel); the transpose, (N, padded). -inf pads
  const int64_t blocks;           // of columns that share bounds
  Scratch<Real> tops;             // (blocks, padded): the greatest score of a row in a block, -inf for rows past N
  bool invalid = false;           // some score is NaN or +inf

  MaxArcs(const Real *scores, int64_t n, bool with_tops = false)
      : N(n), padded(round_up(n, kPanel<Real>)), packed(padded * n), columns(padded * n),
        blocks(round_up(n, kBlockVectors * kLanes<Real>) / (kBlockVectors * kLanes<Real>)),
        tops(with_tops ? blocks * padded : 0) {
    if (!allocated()) return;
    constexpr int P = kPanel<Real>, W = kLanes<Real>;
    constexpr int64_t kBlock = 64 / sizeof(Real);  // of a transposed row: one cache line at a time
    const Real ninf = kNegativeInfinity<Real>;
    for (int64_t i = 0; i < N; i++) {
      Int<Real> wrong = {};
      for (int64_t j = 0; j < padded; j += W) {
        const Vec<Real> x = load_part(scores + i * N + j, N - j, ninf);
        wrong |= is_bad<Real>(x);
        store(packed + j / P * P * N + i * P + j % P, x);
      }
      invalid |= any<Real>(wrong);
    }
    for (int64_t i0 = 0; i0 < N; i0 += kBlock)
      for (int64_t j = 0; j < N; j++) {  // from the panels, whose rows are not a power of two apart
        const Real *column = from(j);
        for (int64_t i = i0; i < i0 + kBlock && i < N; i++) columns[j * padded + i] = column[i * P];
      }
    for (int64_t j = 0; j < N; j++)
      for (int64_t i = N; i < padded; i++) columns[j * padded + i] = ninf;
    if (with_tops) find_tops();
  }
  bool allocated() const { return packed.data && columns.data && tops.data; }
  // The packed vector of columns that begins with column j, of row 0; rows are kPanel apart.
  const Real *from(int64_t j) const { return packed + j / kPanel<Real> * kPanel<Real> * N + j % kPanel<Real>; }

 private:
  void find_tops() {
    constexpr int W = kLanes<Real>, B = kBlockVectors * W;
    const Real ninf = kNegativeInfinity<Real>;
    for (int64_t k = 0; k < blocks; k++)
      for (int64_t i = 0; i < padded; i++) {
        Vec<Real> top = splat(ninf);
        for (int64_t j = k * B; i < N && j < (k + 1) * B && j < padded; j += W)
          top = larger(top, load(from(j) + i * kPanel<Real>));
        tops[k * padded + i] = max_of<Real>(top);
      }
  }
};

}  // namespace
