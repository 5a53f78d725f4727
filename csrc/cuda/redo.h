// What is done in log space with messages in float64 (redo.cu, low_rank_redo.cu): a float64 as two Reals, the scores of
// a frame, log-sums, and what an arriving arc's posterior is taken from.
#pragma once
#include "staging.h"

namespace hmm {

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0; }

// A float64 in two Reals.
template <class Real> __device__ __forceinline__ void split(double x, Real &high, Real &low) {
  high = Real(x);
  low = is_finite(x) ? Real(x - double(high)) : Real(0);
}
template <class Real> __device__ __forceinline__ double joined(Real high, Real low) {
  return double(high) + double(low);
}

// The scores of a frame beside those of arcs: emission, initial and final.
template <class Real> struct Local {
  const Real *emission, *initial, *final;  // null for none
  __device__ __forceinline__ Local(const Sequence<Real> &q, int64_t t)
      : emission(q.emission ? q.emission + t * q.states : nullptr), initial(t == 0 ? q.initial : nullptr),
        final(t == q.length - 1 ? q.final : nullptr) {}
  __device__ __forceinline__ double operator()(int j) const {
    return (emission ? double(emission[j]) : 0) + (initial ? double(initial[j]) : 0) + (final ? double(final[j]) : 0);
  }
};

// sum * exp(top), to which rows are added.
template <class Real> struct LogSum {
  double top = negative_infinity<double>();
  Real sum = 0;

  // Rows `group`, group + groups, ... of `rows`; arcs: column j of the first of them, N apart.
  __device__ __forceinline__ void add(const Real *arcs, int64_t N, const double *messages, int rows, int group,
                                      int groups) {
    constexpr int kBatch = sizeof(Real) == 4 ? 8 : 4;
#pragma unroll 1
    for (int first = group; first < rows; first += kBatch * groups) {
      double x[kBatch], larger = top;
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int r = first + k * groups;
        x[k] = r < rows ? double(arcs[r * N]) + messages[r] : negative_infinity<double>();
        larger = fmax(larger, x[k]);
      }
      const double from = or_zero(larger);
      sum *= exp(Real(top - from));
#pragma unroll
      for (int k = 0; k < kBatch; k++) sum += exp(Real(x[k] - from));
      top = larger;
    }
  }
};

// The largest over the block, NaN where one is NaN; a barrier.
__device__ __forceinline__ double block_larger_or_nan(double x, double *tops) {
  x = warp_larger_or_nan(x);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = x;
  __syncthreads();
  return largest_of(tops, blockDim.x / kWarp);
}

// n_t of a state; where it has no posterior, what makes every p(i | j) zero.
template <class Real>
__device__ __forceinline__ double entry(const Local<Real> &local, Real alpha, Real norm, Real centre, Real gamma,
                                        int j) {
  return gamma == 0 ? -negative_infinity<double>() : joined(alpha, norm) + double(centre) - local(j);
}

}  // namespace hmm
