// What the kernels of scaled probabilities share: the arcs made ready, the ranges of the certificates, and how frames
// are weighed. The recursions are in scaled.cu.
//
// When are they exact? By the certificates of csrc/cpu/scaled_arcs.h, (mixing) or (entrywise), and (joined) where
// halves meet. Those hold messages whose sums are below 2^31; here a sum may grow to N 2^31 before it is corrected, a
// step late. So what they demand of sums grows by N:
//   (mixing)     s_t >= T N^3 2^(R - 95 + 24), in prepare.cu;
//   (entrywise)  an entry that is lost backward has a posterior below N 2^-47, 2^-40 for N = 128;
//   (joined)     Z' >= N^3 2^-65, in join.cu.
// Double precision: the same with the bits of Range<double>. What fails is done again by redo.cu.
#pragma once
#include "device.h"
#include "kernels.h"
#include "walks.h"

namespace hmm {

constexpr int kTopBits = 30, kLowestTopBits = 18;
constexpr double kLn2 = 0.6931471805599453;

template <class Real> struct Range;
template <> struct Range<float> {
  static constexpr int kSmallestBits = -126, kEntryBits = -94, kArcBits = -100, kLeastSumBits = -18, kPrecision = 24;
  static constexpr float kTiny = 1.17549435e-38f;
};
template <> struct Range<double> {
  static constexpr int kSmallestBits = -1022, kEntryBits = -960, kArcBits = -980, kLeastSumBits = -370, kPrecision = 53;
  static constexpr double kTiny = 2.2250738585072014e-308;
};

template <class Real> struct alignas(16) Four {
  Real x, y, z, w;
};

// Which certificate applies to the sequences of a matrix, and what it demands.
template <class Real> struct Certificate {
  Real least;      // sums of messages must not be less
  Real top;        // max c
  int32_t mixing;  // all arcs allowed and within range: entries need not be looked at
  int32_t usable;  // no allowed arc was flushed
  int32_t forgets;  // no state that nothing but itself leads to, as in left-to-right chains: scaled_chunks.h
};

// The arcs of one matrix, ready for use; and of their columns c(j), how far the lowest allowed arc lies below it, in
// nats, and whether one is forbidden.
template <class Real> struct Arcs {
  Real *arcs, *top, *spread, *forbidden;  // (N, N), (N,), (N,), (N,) 0, 1, or 2 for all but the state's own
  Certificate<Real> *certificate;
  static __host__ __device__ constexpr int64_t bytes(int64_t N) {
    return (int64_t(sizeof(Real)) * (N * N + 3 * N) + 15) / 16 * 16 + int64_t(sizeof(Certificate<Real>) + 15) / 16 * 16;
  }
  __device__ Arcs(void *workspace, int64_t matrix, int64_t N)
      : arcs(reinterpret_cast<Real *>(static_cast<char *>(workspace) + matrix * bytes(N))),
        top(arcs + N * N),
        spread(top + N),
        forbidden(spread + N),
        certificate(reinterpret_cast<Certificate<Real> *>(reinterpret_cast<char *>(arcs) +
                                                          (int64_t(sizeof(Real)) * (N * N + 3 * N) + 15) / 16 * 16)) {}
};
inline int64_t matrices(const hmm_problem &p) { return p.transition_batch_stride ? p.batch : 1; }
template <class Real>
__device__ __forceinline__ Arcs<Real> arcs_of(const hmm_problem &p, void *workspace, int64_t sequence) {
  return Arcs<Real>(workspace, p.transition_batch_stride ? sequence : 0, p.states);
}

// What a forward walk ends with; in steps.cu also what it carries from step to step. Two a sequence.
struct Carried {
  double total;       // of the last message
  int64_t exponents;  // sum of k
  int32_t lost, unused;
};

// The maximum over the block, for all threads; `part` holds a number a warp. Two barriers.
template <class Real> __device__ __forceinline__ Real block_max(Real x, Real *part) {
  const int warps = blockDim.x / kWarp;
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = part[0];
  for (int q = 1; q < warps; q++) x = fmax(x, part[q]);
  return x;
}

// The largest of n scores over the block, 0 where all are forbidden or there are none (null). Two barriers.
template <class Real> __device__ __forceinline__ Real top_of(const Real *scores, int n, Real *part) {
  Real top = negative_infinity<Real>();
  for (int j = threadIdx.x; scores && j < n; j += blockDim.x) top = fmax(top, scores[j]);
  top = block_max(top, part);
  return top == negative_infinity<Real>() ? Real(0) : top;
}

// c(j) - max c; 0 for a column without arcs.
template <class Real> __device__ __forceinline__ Real shift_of(Real c, Real top) {
  return c == negative_infinity<Real>() ? Real(0) : c - top;
}

// What is not 0 stays at least 2^-126 (float); NaN stays NaN.
template <class Real> __device__ __forceinline__ Real at_least_tiny(Real x) {
  return x < Range<Real>::kTiny ? Range<Real>::kTiny : x;
}

// Is a message suspect of not being what it should: too small, or by a weight that had to be lifted?
template <class Real> __device__ __forceinline__ bool is_suspect(Real a, Real w, Real smallest) {
  return w > 0 && (a < smallest || w <= Range<Real>::kTiny);
}

// exp(e + shift - top), 0 for a forbidden state and at least 2^-126 for others. Large scores may cancel: the sum is
// compensated (Knuth's two-sum).
template <class Real> __device__ __forceinline__ Real weight(Real e, Real shift, Real top) {
  if (e == negative_infinity<Real>()) return Real(0);
  const Real difference = e - top, part = difference - e, whole = difference + shift, other = whole - difference;
  const Real lost = ((e - (difference - part)) + (-top - part)) + ((difference - (whole - other)) + (shift - other));
  return at_least_tiny(exp(whole + lost));
}

// max over j of row[j] + (c[j] - top), c null for zeros; 0 where all are -inf. For all lanes of the warp.
template <class Real> __device__ __forceinline__ Real row_max(const Real *row, const Real *c, Real top, int N) {
  Real highest = negative_infinity<Real>();
  for (int j = threadIdx.x % kWarp; j < N; j += kWarp) {
    const Real x = c ? row[j] + shift_of(c[j], top) : row[j];
    highest = x > highest ? x : highest;
  }
  highest = warp_max(highest);
  return highest == negative_infinity<Real>() ? Real(0) : highest;
}

// w of frame t of sequence b, row = b T + t, by a warp; 0 past the end. c: what is added to emissions from frame 1 on,
// to c - c_top. The forward pass (Find) finds the centre, which the backward pass may read.
template <bool Find, class Real>
__device__ __forceinline__ void weigh_frame(const hmm_problem &p, int64_t row, const Real *c, Real c_top, Real *centre,
                                            Real *w) {
  const int N = p.states, lane = threadIdx.x % kWarp;
  const int64_t T = p.time, b = row / T, t = row % T, L = p.lengths[b];
  w += row * N;
  if (t >= L) {
    for (int j = lane; j < N; j += kWarp) w[j] = 0;
    if (Find && lane == 0) centre[row] = 0;
    return;
  }
  const Real *emission = static_cast<const Real *>(p.emission) + row * N, *none = nullptr;
  const Real *final = p.final && t == L - 1 ? static_cast<const Real *>(p.final) + b * p.final_batch_stride : nullptr;
  if (t == 0) c = nullptr;
  const Real final_top = final ? row_max(final, none, Real(0), N) : Real(0);
  const Real top = Find ? row_max(emission, c, c_top, N) : centre[row];
  if (Find && lane == 0) centre[row] = top;
  for (int j = lane; j < N; j += kWarp) {
    Real x = weight(emission[j], c ? shift_of(c[j], c_top) : Real(0), top);
    if (final) {
      const Real f = weight(final[j], Real(0), final_top);
      x = x == 0 || f == 0 ? Real(0) : at_least_tiny(x * f);
    }
    w[j] = x;
  }
}

// 2^k that brings a sum back to [2^30, 2^31), where it has left [2^18, 2^31).
template <class Real> __device__ __forceinline__ int correction(Real total) {
  if (total >= Real(1 << kLowestTopBits) && total < ldexp(Real(1), kTopBits + 1)) return 0;
  return total > 0 && total <= ldexp(Real(1), -Range<Real>::kSmallestBits) ? kTopBits - ilogb(total) : 0;
}

}  // namespace hmm
