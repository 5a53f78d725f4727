// The k best paths: list Viterbi, the parallel algorithm (Seshadri and Sundberg 1994).
//
//   delta_t(j, 0..k-1) = the k highest of delta_{t-1}(i, r) + phi_t(i, j) over i and r, in falling order,
//                        + e_t(j), re-centred so that the largest is 0
//
// A back-pointer is i k + r; no path comes twice, since (j, r) at t names one path. Ties are broken by the order in which
// candidates come, which is the same every time: see by_falling_score; at the end, by the smaller state, then rank.
//
// Lanes hold columns j; for each of the N states, its candidates come by rank and stop at the first that enters no lane's
// list. Cost a frame: at least N^2 additions and comparisons (2/16 operations an arc), and 5 k operations for a candidate
// that enters some lane; k T N pointers of 1, 2 or 4 bytes, written once. The floor is Viterbi's N^2 / 16 / 2 cycles;
// measured on one core of an EPYC (Zen 5), float, k = 5: 1.0 us a frame for N = 50, 4.7 for 128, 64 for 512, some 30 times
// that floor, spent where candidates enter. Lists over 10 are in memory, and their cost grows as k^2: 80 us for N = 50,
// k = 50. Limits: k N below 2^31.
#pragma once
#include <utility>

#include "log_space.h"
#include "max_arcs.h"

namespace {

template <class Real> struct Extension {  // a candidate for each column of a vector
  Vec<Real> score;
  Int<Real> from;
};

// Puts s into each lane's falling list of k, where it is higher than the last; what is equal stays before it.
template <int K, class Real>
HMM_INLINE void insert(Extension<Real> *best, int64_t k, Vec<Real> s, int64_t from) {
  Int<Real> code = splat_integer<Real>(from);
  if constexpr (K > 0) {  // in registers: without a branch, from the top, what is displaced moving on
#pragma GCC unroll 16
    for (int q = 0; q < K; q++) {
      const Int<Real> higher = s > best[q].score, source = higher ? best[q].from : code;
      const Vec<Real> lower = higher ? best[q].score : s;
      best[q].score = larger(best[q].score, s);
      best[q].from = higher ? code : best[q].from;
      s = lower, code = source;
    }
  } else {  // in memory: from the bottom, until no lane moves
    Int<Real> above = s > best[k - 1].score;
    for (int64_t q = k - 1; any<Real>(above); q--) {
      const Int<Real> here = above;
      above = q > 0 ? s > best[q - 1].score : Int<Real>{};
      const Extension<Real> &next = best[q > 0 ? q - 1 : 0];
      const Vec<Real> moved = above ? next.score : s;
      const Int<Real> source = above ? next.from : code;
      best[q] = {here ? moved : best[q].score, here ? source : best[q].from};
    }
  }
}

// The states that have a path, those of high delta first, so that few of the later ones enter a list: a counting sort to
// a quarter of a nat, by state within. Returns their number.
template <class Real> int64_t by_falling_score(const Real *delta, int64_t N, int32_t *order) {
  constexpr int kBuckets = 64;
  int32_t place[kBuckets + 1] = {};
  auto bucket = [&](int64_t i) {
    return delta[i] > -(kBuckets - 1) / Real(4) ? int(delta[i] * -4) : delta[i] > kNegativeInfinity<Real> ? kBuckets - 1 : kBuckets;
  };
  for (int64_t i = 0; i < N; i++) place[bucket(i)]++;
  int32_t total = 0;
  for (int b = 0; b <= kBuckets; b++) {
    const int32_t count = place[b];
    if (b == kBuckets) N = total;
    place[b] = total;
    total += count;
  }
  for (int64_t i = 0; i < total; i++) order[place[bucket(i)]++] = int32_t(i);
  return N;
}

// The k best extensions into one vector of columns, of which `left` are there, from `states` states in this order.
// arcs: this vector's part of row 0, rows `stride` apart; delta (k, padded).
template <int K, class Real>
HMM_INLINE void extend(const Real *arcs, int64_t stride, int64_t left, const Real *delta, const int32_t *order,
                       int64_t states, int64_t padded, int64_t runtime_k, Extension<Real> *best) {
  const int64_t k = K ? K : runtime_k;
  const Real ninf = kNegativeInfinity<Real>;
  for (int64_t q = 0; q < k; q++) best[q] = {splat(ninf), Int<Real>{}};
  for (int64_t n = 0; n < states; n++) {
    const int64_t i = order[n];
    const Vec<Real> a = load_part(arcs + i * stride, left, ninf);
    for (int64_t r = 0; r < k; r++) {
      const Vec<Real> x = a + delta[r * padded + i];
      if (!any_greater(x, best[k - 1].score)) break;  // nor do those of the ranks below
      insert<K, Real>(best, k, x, i * k + r);
    }
  }
}

// The back-pointers of one sequence, (L, k, padded), in the smallest type that holds N k - 1.
class Pointers {
 public:
  Pointers(int64_t length, int64_t states, int64_t padded, int64_t k)
      : width(states * k <= 256 ? 1 : states * k <= 65536 ? 2 : 4), row(padded), k(k), data(length * k * padded * width) {}
  bool allocated() const { return data.data; }
  template <class Real> HMM_INLINE void put(int64_t t, int64_t rank, int64_t j, Int<Real> from) {
    constexpr int W = kLanes<Real>;
    unsigned char *const out = data + ((t * k + rank) * row + j) * width;
    if (width == 1) write<uint8_t, W>(out, from);
    else if (width == 2) write<uint16_t, W>(out, from);
    else write<uint32_t, W>(out, from);
  }
  int64_t get(int64_t t, int64_t rank, int64_t j) const {
    const int64_t at = (t * k + rank) * row + j;
    return width == 1 ? data[at] : width == 2 ? ((uint16_t *)data.data)[at] : int64_t(((uint32_t *)data.data)[at]);
  }

 private:
  template <class Narrow, int W, class V> HMM_INLINE static void write(void *out, V from) {
    typedef Narrow Row __attribute__((vector_size(W * sizeof(Narrow))));
    const Row narrow = __builtin_convertvector(from, Row);
    std::memcpy(out, &narrow, sizeof narrow);
  }
  const int64_t width, row, k;
  Scratch<unsigned char> data;
};

// ranks (k, padded) plus emission and final scores (null for none), centred to maximum 0, as log_space.h's centre_row does
// with one row, bit for bit. Returns false where no path is feasible, or where a score is NaN: `offset` is then, too.
template <class Real>
bool centre_ranks(Real *ranks, int64_t k, int64_t padded, const Real *scores, const Real *more, int64_t N, double &offset) {
  constexpr int W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  const Real top = scores ? row_max<Real, Real>(scores, N) : Real(0), top_more = more ? row_max<Real, Real>(more, N) : Real(0);
  Vec<Real> highest = splat(ninf);
  bool nan = false;
  for (int64_t j = 0; j < N; j += W) {
    const Vec<Real> e = scores ? load_part(scores + j, N - j, ninf) - top : Vec<Real>{};
    const Vec<Real> f = more ? load_part(more + j, N - j, ninf) - top_more : Vec<Real>{};
    for (int64_t r = 0; r < k; r++) {
      const Vec<Real> a = (load(ranks + r * padded + j) + e) + f;
      nan |= any<Real>(a != a);
      highest = larger(highest, a);
      store(ranks + r * padded + j, a);
    }
  }
  const Real middle = max_of<Real>(highest);
  offset += double(top) + double(top_more);
  if (nan) offset = std::numeric_limits<double>::quiet_NaN();
  if (nan || middle == ninf) return false;
  for (int64_t r = 0; r < k; r++)
    for (int64_t j = 0; j < N; j += W) store(ranks + r * padded + j, load(ranks + r * padded + j) - middle);
  offset += double(middle);
  return true;
}

// What the k paths of one sequence are written to; path n's score is score[n * score_stride], its states begin at
// states + n * states_stride.
template <class Real> struct Paths {
  Real *score;
  int64_t *states, score_stride, states_stride;
};

// The k highest of the last ranks: (score, state, rank), falling.
template <class Real> struct Ending {
  Real score;
  int64_t state, rank;
};
template <class Real>
int64_t best_endings(const Real *ranks, int64_t k, int64_t padded, int64_t N, Ending<Real> *best) {
  int64_t found = 0;
  for (int64_t j = 0; j < N; j++)
    for (int64_t r = 0; r < k; r++) {
      const Real x = ranks[r * padded + j];
      if (x == kNegativeInfinity<Real> || (found == k && !(x > best[k - 1].score))) break;
      int64_t q = found < k ? found++ : k - 1;
      for (; q > 0 && x > best[q - 1].score; q--) best[q] = best[q - 1];
      best[q] = {x, j, r};
    }
  return found;
}

// arcs: null where transitions vary over time. K: the length of the lists, 0 for k. Returns false when memory runs out.
template <int K, class Real>
bool topk_sequence(const Sequence<Real> &q, const MaxArcs<Real> *arcs, int64_t wanted, int64_t time, const Paths<Real> &paths) {
  constexpr int P = kPanel<Real>, W = kLanes<Real>;
  const Real ninf = kNegativeInfinity<Real>;
  const int64_t N = q.states, L = q.length, padded = round_up(N, W), k = K ? K : wanted;
  Scratch<int32_t> order(N);
  Scratch<Real> ranks(2 * k * padded);
  Pointers pointers(L, N, padded, k);
  Scratch<Extension<Real>> listed(K ? 0 : k);
  Scratch<Ending<Real>> endings(k);
  if (!order.data || !ranks.data || !pointers.allocated() || !listed.data || !endings.data) return false;
  Real *delta = ranks, *next = delta + k * padded;
  double offset = 0;
  bool feasible = true;
  for (int64_t t = 0; t < L && feasible; t++, std::swap(delta, next)) {
    if (t == 0) {
      const Real top = row_max<Real, Real>(q.initial, N);
      for (int64_t j = 0; j < k * padded; j += W) store(next + j, j < padded ? load_part(q.initial + j, N - j, ninf) - top : splat(ninf));
      offset = double(top);
    } else {
      const int64_t states = by_falling_score(delta, N, order);
      for (int64_t j = 0; j < N; j += W) {
        Extension<Real> fixed[K ? K : 1], *const best = K ? fixed : listed.data;
        if (arcs) extend<K, Real>(arcs->from(j), P, N - j, delta, order, states, padded, k, best);
        else extend<K, Real>(q.arcs(t) + j, N, N - j, delta, order, states, padded, k, best);
        for (int64_t r = 0; r < k; r++) {
          store(next + r * padded + j, best[r].score);
          pointers.put<Real>(t, r, j, best[r].from);
        }
      }
      if (arcs ? arcs->invalid : any_bad(q.arcs(t), N * N)) offset = std::numeric_limits<double>::quiet_NaN();
    }
    feasible = centre_ranks(next, k, padded, q.emission ? q.frame(t) : nullptr, t == L - 1 ? q.final : nullptr, N, offset) &&
               offset == offset;
  }
  const bool nan = offset != offset;
  const int64_t found = feasible && L > 0 ? best_endings<Real>(delta, wanted, padded, N, endings) : 0;
  for (int64_t n = 0; n < wanted; n++) {
    const double score = n < found ? offset + double(endings[n].score) : L == 0 && n == 0 ? 0 : ninf;
    paths.score[n * paths.score_stride] = Real(nan ? offset : score);
    for (int64_t t = n < found ? L : 0; t < time; t++) paths.states[n * paths.states_stride + t] = -1;
  }
  for (int64_t t = found ? L - 1 : -1; t >= 0; t--)
    for (int64_t n = 0; n < found; n++) {
      Ending<Real> &at = endings[n];
      paths.states[n * paths.states_stride + t] = at.state;
      if (t == 0) continue;
      const int64_t from = pointers.get(t, at.rank, at.state);
      at.state = from / k, at.rank = from % k;
    }
  return true;
}

template <class Real>
bool topk_sequence(const Sequence<Real> &q, const MaxArcs<Real> *arcs, int64_t k, int64_t time, const Paths<Real> &paths) {
  // Short lists stay in registers.
  if (k == 1) return topk_sequence<1>(q, arcs, k, time, paths);
  if (k == 2) return topk_sequence<2>(q, arcs, k, time, paths);
  if (k == 3) return topk_sequence<3>(q, arcs, k, time, paths);
  if (k <= 5) return topk_sequence<5>(q, arcs, k, time, paths);
  if (k <= 10) return topk_sequence<10>(q, arcs, k, time, paths);
  return topk_sequence<0>(q, arcs, k, time, paths);
}

}  // namespace
