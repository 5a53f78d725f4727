// Typed views of one sequence of an hmm_problem, shared by all kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "hmm_speech.h"

namespace {

template <class Real> constexpr Real kNegativeInfinity = -std::numeric_limits<Real>::infinity();

template <class Real> struct Sequence {
  const Real *initial, *transition, *emission, *final;  // emission and final may be null
  int64_t length, states, transition_stride;

  Sequence() = default;
  Sequence(const hmm_problem &p, int64_t b)
      : initial((const Real *)p.initial + b * p.initial_batch_stride),
        transition((const Real *)p.transition + b * p.transition_batch_stride),
        emission(p.emission ? (const Real *)p.emission + b * p.time * p.states : nullptr),
        final(p.final ? (const Real *)p.final + b * p.final_batch_stride : nullptr),
        length(p.lengths[b]), states(p.states), transition_stride(p.transition_time_stride) {}

  // Scores of the arcs from frame t-1 to frame t, (N, N).
  const Real *arcs(int64_t t) const { return transition + (t - 1) * transition_stride; }
  const Real *frame(int64_t t) const { return emission + t * states; }
};

// Scratch memory, 64-byte aligned and (unless it is all written first) zeroed; null after a failed allocation. Large blocks ask for huge pages: a step of
// the recursion reads all packed arcs, and faulting 4 MB in by small pages (N = 1024) takes longer than packing them.
template <class Real> struct Scratch {
  Real *data;
  explicit Scratch(size_t n, bool zeroed = true) {
    constexpr size_t huge = size_t(1) << 21;
    size_t bytes = (n * sizeof(Real) + 127) / 64 * 64;
    const bool large = bytes >= huge / 2;
    if (large) bytes = (bytes + huge - 1) / huge * huge;
    data = (Real *)std::aligned_alloc(large ? huge : 64, bytes);
#if defined(MADV_HUGEPAGE)
    if (data && large) madvise(data, bytes, MADV_HUGEPAGE);  // only advice
#endif
    if (data && zeroed) __builtin_memset(data, 0, bytes);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch &) = delete;
  operator Real *() const { return data; }
};

// x[0..n) = 0; n may be 0, and x null then, which memset forbids.
template <class Real> inline void clear(Real *x, int64_t n) {
  if (n > 0) __builtin_memset(x, 0, size_t(n) * sizeof(Real));
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
