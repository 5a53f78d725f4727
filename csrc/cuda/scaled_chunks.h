// Scaled probabilities in chunks of p.chunk_frames frames, all at once, for transitions that do not vary over time.
//
// A message forgets where it came from: products with positive numbers bring any two closer in Hilbert's metric, d(a,
// b) = log max_ij a(i) b(j) / (a(j) b(i)), and no product with numbers that are not negative brings them apart
// (Birkhoff 1957). So the walk of a chunk begins p.warm_up frames before its own, from ones, and writes nothing until
// it comes to these. If the message that it arrives with is by then the last one of the chunk before, up to a factor
// and a relative 2^-kSameBits in each state, so are all that follow, and the factor corrects Z (join_chunks). Backward,
// posteriors go from a frame to the one before by p(z_t-1 | z_t, x_0..t-1), which brings no two apart in total
// variation: what a chunk arrives with may differ by 2^-kSameBits from the posterior of the chunk behind
// (join_chunks_back). What is not the same then, of chains that stay for long, is walked from the ends, as all
// sequences are without chunks; and so are chains that cannot forget, since they have a state that nothing but itself
// leads to (Certificate::forgets), without an attempt. P - 1 chunk ends add up to at most P 2^-kSameBits, and in
// practice to one: what a chunk begins with is forgotten in it.
//
// For the best path, Maleki, Musuvathi and Mytkowicz (PPoPP 2014) parallelise so, by the ranks of tropical products.
#pragma once
#include "scaled.h"

namespace hmm {

template <class Real> constexpr int kSameBits = Range<Real>::kPrecision - 4;  // 8 roundings, a step's sum of N terms

template <class Real> bool scaled_by_chunks(const hmm_problem &p) {
  return !p.time_varying && p.states <= scaled_states<Real>() && p.chunk_frames > 0 && p.warm_up > 0 &&
         p.time > p.chunk_frames && (p.time - 1) / p.chunk_frames < 65535 && p.time * p.states <= 0x7fffffff;
}

// P chunks a sequence; of a pass, in its workspace. Null without chunks.
template <class Real> struct ScaledChunks {
  Real *weights = nullptr;  // (B, T, N): w, which walks of two chunks read
  Real *arrived = nullptr;  // (B, P, N): what a chunk's walk arrives with
  Real *left = nullptr;  // (B, P, N): backward, posteriors of a chunk's first frame
  Carried *carried = nullptr;  // (B, P): forward, less the warm-up
  int32_t *done = nullptr;  // (B,): 1 for a sequence that is done in chunks

  static size_t bytes(const hmm_problem &p) {
    const size_t all = size_t(p.batch * chunks_of(p));
    return all * sizeof(Carried) + sizeof(Real) * size_t(p.states) * (size_t(p.batch * p.time) + 2 * all) +
           sizeof(int32_t) * size_t(p.batch);
  }
  ScaledChunks() = default;
  ScaledChunks(const hmm_problem &p, void *room) {
    const int64_t all = p.batch * chunks_of(p), N = p.states;
    carried = static_cast<Carried *>(room), weights = reinterpret_cast<Real *>(carried + all);
    arrived = weights + p.batch * p.time * N, left = arrived + all * N;
    done = reinterpret_cast<int32_t *>(left + all * N);
  }
};

// Zeros for a state of the frames past a sequence's end, or of those among a chunk's frames.
template <bool InChunks, class Real>
__device__ __forceinline__ void clear_past_end(const hmm_problem &p, int64_t b, int j, Real *messages) {
  const int64_t begin = InChunks ? blockIdx.y * p.chunk_frames : 0, end = InChunks ? begin + p.chunk_frames : p.time;
  for (int64_t t = max(begin, p.lengths[b]); t < min(end, p.time); t++) messages[(b * p.time + t) * p.states + j] = 0;
}

inline dim3 chunk_walks(const hmm_problem &p) { return dim3(unsigned(p.batch), unsigned(chunks_of(p))); }

// What the walks of all chunks come to (join.cu): `done`, and of the sequences that are done log Z, method (HMM_SCALED)
// and what norm needs for the backward pass; backward, `done` alone.
template <class Real>
int join_chunks(const hmm_problem &p, const ScaledChunks<Real> &chunks, Real *log_partition, const Real *alpha,
                Real *norm, const Real *centre, int32_t *method, void *workspace, void *stream);
template <class Real>
int join_chunks_back(const hmm_problem &p, const ScaledChunks<Real> &chunks, const int32_t *method, void *workspace,
                     void *stream);

}  // namespace hmm
