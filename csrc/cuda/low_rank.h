// What the kernels of chains through two factors share (low_rank.cu, low_rank_redo.cu).
#pragma once
#include <type_traits>

#include "redo.h"
#include "scaled.h"

namespace hmm {

// A sequence's factors, as probabilities or as scores: L transposed, (R, N), and R (R, N).
template <class Real> struct Factors {
  const Real *left, *right;
  __device__ __forceinline__ Factors(const hmm_cuda_low_rank &p, const void *pairs, int64_t b)
      : left(static_cast<const Real *>(pairs) + b * p.chain.transition_batch_stride),
        right(left + p.rank * p.chain.states) {}
};

// What a pass works in.
template <class Real> struct LowRankWorkspace {
  Carried *carried;          // (B,)
  double *message, *classes;  // (B, N), (B, R): of a sequence in log space
  Real *w, *centre;          // backward: (B, T, N), (B, T)
  Real *half_low, *posterior;  // (B, T, R)
  size_t bytes;

  LowRankWorkspace(const hmm_cuda_low_rank &p, bool backward, void *workspace) {
    char *at = static_cast<char *>(workspace);
    const int64_t B = p.chain.batch, frames = backward ? B * p.chain.time : 0;
    const auto take = [&](auto *&x, int64_t n) {
      using Number = std::remove_reference_t<decltype(*x)>;
      x = reinterpret_cast<Number *>(at), at += carved<Number>(n);
    };
    take(carried, B), take(message, B * p.chain.states), take(classes, B * p.rank);
    take(w, frames * p.chain.states), take(centre, backward ? frames : B * p.chain.time);
    take(half_low, frames * p.rank), take(posterior, frames * p.rank);
    bytes = size_t(at - static_cast<char *>(workspace));
  }
};

}  // namespace hmm
