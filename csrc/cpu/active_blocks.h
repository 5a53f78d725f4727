// What the kernels of an hmm_active_problem look at: the states that can emit a frame, and the block of the transition
// between those of two frames, as it is or as scaled probabilities.
//
// A frame is a run where its ids are consecutive and padded at the end alone, as those of blocked and cloned HMMs are.
// Between two runs a block is a window of the matrix, read in place by vectors; any other block is gathered, K^2 reads.
//
// Scaled probabilities A(i, j) = exp(phi(i, j) - c(j)), at least the smallest normal number where the arc is allowed and 0
// where it is not, come from a table of the whole matrix, c(j) = max_i phi(i, j): N^2 exps, 4 (N + 16) N bytes in float;
// or, where the frames have fewer arcs between them than the matrix has, block by block with c(j) the block's own.
#pragma once
#include <cmath>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "scaled_arcs.h"

namespace {

template <class Real> struct Frame {
  const int64_t *id;  // (K,), negative where a slot pads
  const Real *score;  // (K,), of no meaning where a slot pads
  int64_t count;      // slots to look at: of a run those with a state, else all K
  bool run;
};

template <class Real> struct ActiveSequence {
  const Real *initial, *transition, *score, *final;  // final may be null
  const int64_t *id;
  int64_t length, states, slots;

  ActiveSequence(const hmm_active_problem &p, int64_t b)
      : initial((const Real *)p.initial + b * p.initial_batch_stride),
        transition((const Real *)p.transition + b * p.transition_batch_stride),
        score((const Real *)p.emission + b * p.time * p.slots),
        final(p.final ? (const Real *)p.final + b * p.final_batch_stride : nullptr), id(p.active + b * p.time * p.slots),
        length(p.lengths[b]), states(p.states), slots(p.slots) {}

  Frame<Real> frame(int64_t t) const {
    const int64_t *row = id + t * slots, first = row[0];
    int64_t off = first >> 63;  // all ones for a negative first id
    for (int64_t k = 0; k < slots; k++) off |= row[k] ^ (first + k);
    if (!off) return {row, score + t * slots, slots, true};
    int64_t n = 0, end;
    while (n < slots && first >= 0 && row[n] == first + n) n++;
    for (end = n; end < slots && row[end] < 0;) end++;
    const bool run = n > 0 && end == slots;
    return {row, score + t * slots, run ? n : slots, run};
  }
};

// x(j) of the states j of a frame, `fill` where a slot pads; `out` holds K numbers.
template <class Real> HMM_INLINE void gather_row(const Real *x, const Frame<Real> &f, int64_t K, Real fill, Real *out) {
  for (int64_t k = 0; k < f.count; k++) out[k] = f.id[k] < 0 ? fill : x[f.id[k]];
  for (int64_t k = f.count; k < K; k++) out[k] = fill;
}

// The emission scores of a frame, -inf where a slot pads.
template <class Real> HMM_INLINE void gather_scores(const Frame<Real> &f, int64_t K, Real *out) {
  for (int64_t k = 0; k < f.count; k++) out[k] = f.id[k] < 0 ? kNegativeInfinity<Real> : f.score[k];
  for (int64_t k = f.count; k < K; k++) out[k] = kNegativeInfinity<Real>;
}

// matrix(i, j), rows `pitch` numbers apart, for i of one frame and j of the next: K rows of `width` >= K numbers, `fill`
// where a slot pads.
template <class Real>
void gather_block(const Real *matrix, int64_t pitch, const Frame<Real> &from, const Frame<Real> &to, Real fill, Real *out,
                  int64_t rows, int64_t width) {
  constexpr int W = kLanes<Real>;
  for (int64_t i = 0; i < rows; i++, out += width) {
    const bool used = i < from.count && from.id[i] >= 0;
    const Real *row = used ? matrix + from.id[i] * pitch : nullptr;
    int64_t j = 0;
    if (used && to.run)
      for (const Real *window = row + to.id[0]; j + W <= to.count; j += W) store(out + j, load(window + j));
    for (; used && j < to.count; j++) out[j] = to.id[j] < 0 ? fill : row[to.id[j]];
    for (; j < width; j++) out[j] = fill;
  }
}

// Asks for a block before it is needed: its rows are some lines each, far apart, which no hardware foresees. Of longer
// rows it catches up within the row.
template <bool Write, class Real>
HMM_INLINE void prefetch_window(const Real *matrix, int64_t pitch, const Frame<Real> &from, const Frame<Real> &to) {
  if (!from.run || !to.run || from.count > 64) return;
  const Real *row = matrix + from.id[0] * pitch + to.id[0];
  for (int64_t i = 0; i < from.count; i++, row += pitch) {
    __builtin_prefetch(row, Write, 3);
    __builtin_prefetch(row + (to.count < 32 ? to.count - 1 : 31), Write, 3);
  }
}

// Asks for what a frame brings in, kStreamed frames before it is needed: rows of arcs and counts come and go between, and the
// hardware loses the streams.
constexpr int64_t kStreamed = 24;
template <class Real>
HMM_INLINE void prefetch_frame(const ActiveSequence<Real> &q, int64_t t, const Real *alpha, const Real *state) {
  if (t < 0 || t >= q.length) return;
  const int64_t at = t * q.slots;
  __builtin_prefetch(q.score + at, 0, 3);
  __builtin_prefetch(q.id + at, 0, 3);
  __builtin_prefetch(q.id + at + (q.slots < 8 ? q.slots : 8) - 1, 0, 3);
  if (alpha) __builtin_prefetch(alpha + at, 0, 3);
  if (state) __builtin_prefetch(state + at, 1, 3);
}

// Memory that is written before it is read; huge pages where the system has them, since rows lie a page apart.
template <class Real> struct Pages {
  Real *data;
  explicit Pages(size_t numbers) {
    constexpr size_t huge = size_t(1) << 21;
    const size_t bytes = numbers * sizeof(Real), unit = bytes < huge ? 64 : huge, whole = (bytes + unit) / unit * unit;
    data = (Real *)std::aligned_alloc(unit, whole);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (data && unit == huge) madvise(data, whole, MADV_HUGEPAGE);  // only advice
#endif
  }
  ~Pages() { std::free(data); }
  Pages(const Pages &) = delete;
};

// Scaled probabilities of allowed arcs, whose scores lie below their origin, and 0 for forbidden ones.
template <class Real> HMM_INLINE Vec<Real> scaled_arcs(Vec<Real> score, Vec<Real> origin) {
  const Vec<Real> below = score - origin, x = exp<Real>(below), smallest = splat(std::numeric_limits<Real>::min());
  return score == kNegativeInfinity<Real> ? Vec<Real>{} : x < smallest ? smallest : x;
}

template <class Real> struct Table {
  static constexpr int W = kLanes<Real>, kLine = 64 / sizeof(Real);
  const int64_t N, pitch;  // an odd number of lines, so that the rows of a block do not fall into one set of the cache
  Pages<Real> arcs;        // (N, pitch): what pads holds 0
  Scratch<Real> shift;     // c(j)

  explicit Table(int64_t n) : N(n), pitch(((n + W + kLine - 1) / kLine | 1) * kLine), arcs(n * pitch), shift(pitch) {}
  bool allocated() const { return arcs.data && shift.data; }

  void fill(const Real *scores) {
    const Real ninf = kNegativeInfinity<Real>;
    for (int64_t j = 0; j < pitch; j++) shift[j] = ninf;
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < N; j += W)
        store(shift + j, larger(load(shift + j), load_part(scores + i * N + j, N - j, ninf)));
    for (int64_t i = 0; i < N; i++)
      for (int64_t j = 0; j < pitch; j += W)
        store(arcs.data + i * pitch + j, scaled_arcs<Real>(load_part(scores + i * N + j, N - j, ninf), load(shift + j)));
  }
};

// Rows of arcs from the slots of one frame to those of the next, and c of the latter. Past the next frame's count, numbers
// up to a whole vector may be read and mean nothing.
template <class Real> struct Block {
  const Real *data;
  int64_t pitch;
  const Real *shift;
};

template <class Real> struct Blocks {
  const Table<Real> *table;  // null: block by block
  const Real *scores;
  const int64_t N, K, width;
  Scratch<Real> data, shift;

  Blocks(const hmm_active_problem &p)
      : table(nullptr), scores(nullptr), N(p.states), K(p.slots), width(round_up(p.slots, kLanes<Real>)), data(K * width),
        shift(width) {}
  bool allocated() const { return data.data && shift.data; }
  void use(const Real *transition, const Table<Real> *whole) { scores = transition, table = whole; }

  void prefetch(const Frame<Real> &from, const Frame<Real> &to) const {
    if (table) prefetch_window<false>((const Real *)table->arcs.data, table->pitch, from, to);
    else prefetch_window<false>(scores, N, from, to);
  }

  Block<Real> operator()(const Frame<Real> &from, const Frame<Real> &to) {
    if (!table) return exponentiated(from, to);
    const Real *arcs = table->arcs.data;
    if (from.run && to.run) return {arcs + from.id[0] * table->pitch + to.id[0], table->pitch, table->shift + to.id[0]};
    gather_block(arcs, table->pitch, from, to, Real(0), (Real *)data, from.count, width);
    gather_row((const Real *)table->shift, to, width, Real(0), (Real *)shift);
    return {data, width, shift};
  }

 private:
  Block<Real> exponentiated(const Frame<Real> &from, const Frame<Real> &to) {
    constexpr int W = kLanes<Real>;
    gather_block(scores, N, from, to, kNegativeInfinity<Real>, (Real *)data, from.count, width);
    for (int64_t j = 0; j < width; j += W) {
      Vec<Real> top = splat(kNegativeInfinity<Real>);
      for (int64_t i = 0; i < from.count; i++) top = larger(top, load(data + i * width + j));
      store(shift + j, top);
      for (int64_t i = 0; i < from.count; i++)
        store(data + i * width + j, scaled_arcs<Real>(load(data + i * width + j), top));
    }
    return {data, width, shift};
  }
};

// Whether a table of the whole matrix costs less than the blocks of so many frames.
inline bool wants_table(const hmm_active_problem &p, int64_t frames) {
  return double(frames) * double(p.slots) * double(p.slots) >= double(p.states) * double(p.states);
}

}  // namespace
