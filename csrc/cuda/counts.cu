// Expected transition counts of a scaled sweep, from its messages: one matrix product over frames.
//
//   counts(i, j) = A(i, j) sum_t a_{t-1}(i) u_t(j) grad,      u_t = 2^k_t w_t b_t
//
// In the second half of a sequence that was walked from both ends, messages from the end stand for u_t, and 2^k_t w_t
// a_t, which the backward pass leaves, for a_t; where the halves meet both are as they were, and 1 / Z' makes them a
// posterior.
//
// A block computes a tile of 64 by 64, a thread 4 by 4, from 16 frames at a time in shared memory. The grid's second
// axis takes ranges of frames of all sequences, whose blocks are added up afterwards, in order; or a sequence each,
// where each has transitions of its own. 2 N^2 flops and 8 N bytes a frame (float); 32 flops a number read from shared
// memory. Frames of sequences that were not scaled count nothing. Limits: none on N or T.
#include "scaled.h"

namespace hmm {
namespace {

constexpr int kSide = 64, kDepth = 16;

template <class Real>
__global__ void __launch_bounds__(256)
    counts_kernel(hmm_problem p, void *workspace, int64_t frames, const Real *grad, const Real *alpha, const Real *norm,
                  const Real *u, const int32_t *method, Real *edge) {
  HMM_SHARED_MEMORY(at);
  Real *left = carve<Real>(at, kDepth * kSide), *right = carve<Real>(at, kDepth * kSide),
       *part = carve<Real>(at, 256 / kWarp);
  const int N = p.states, tiles = (N + kSide - 1) / kSide, i0 = blockIdx.x / tiles * kSide,
            j0 = blockIdx.x % tiles * kSide;
  const int64_t T = p.time, begin = blockIdx.y * frames, end = min(begin + frames, p.batch * T);
  const Arcs<Real> packed = arcs_of<Real>(p, workspace, blockIdx.y);
  // A power of two that brings the largest |grad| near 1, so that products stay in range.
  Real largest = 0;
  for (int64_t b = threadIdx.x; b < p.batch; b += blockDim.x) largest = fmax(largest, fabs(grad[b]));
  largest = block_max(largest, part);
  const int exponent = largest > 0 && largest <= ldexp(Real(1), -Range<Real>::kSmallestBits) ? ilogb(largest) : 0;
  const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
  Real sum[4][4];
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int n = 0; n < 4; n++) sum[m][n] = 0;
  for (int64_t first = begin; first < end; first += kDepth) {
    __syncthreads();
    for (int k = threadIdx.x; k < kDepth * kSide; k += blockDim.x) {
      const int64_t row = first + k / kSide, b = row / T, t = row % T;
      const int column = k % kSide;
      const int32_t how = row < end ? method[b] : HMM_REDONE;
      const int64_t L = row < end ? p.lengths[b] : 0, middle = meeting(L, how == HMM_BOTH_ENDS);
      const bool counted = t > 0 && t < L && (how == HMM_SCALED || how == HMM_BOTH_ENDS);
      const Real *from = t <= middle + HMM_DEFECT(17) ? alpha : u, *to = t < middle ? u : alpha;
      left[k + HMM_DEFECT(13)] = counted && i0 + column < N ? from[(row - 1) * N + i0 + column] : Real(0);
      const Real factor = counted ? ldexp(grad[b], -exponent) * (t == middle ? norm[b * T * N] : Real(1)) : Real(0);
      right[k] = counted && j0 + column < N ? to[row * N + j0 + column] * factor : Real(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const Four<Real> x = *reinterpret_cast<const Four<Real> *>(left + k * kSide + i);
      const Four<Real> y = *reinterpret_cast<const Four<Real> *>(right + k * kSide + j);
      const Real xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) sum[m][n] = fma(xs[m], ys[n], sum[m][n]);
    }
  }
  Real *out = edge + int64_t(blockIdx.y) * N * N;
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int n = 0; n < 4; n++)
      if (i0 + i + m < N && j0 + j + n < N) {
        const int64_t arc = int64_t(i0 + i + m) * N + j0 + j + n;
        out[arc] = packed.arcs[arc] > 0 ? ldexp(sum[m][n] * packed.arcs[arc], exponent) : Real(0);
      }
}

constexpr int64_t kMostBlocks = 1024, kMostRanges = 64, kFewestFrames = 256;  // of counts over all sequences

}  // namespace

// As many ranges as keep a GPU busy: 64 for N up to 256, then fewer, and one for N above 1,448, whose tiles are enough.
int64_t frames_a_block(const hmm_problem &p) {
  if (p.transition_batch_stride) return p.time;
  const int64_t tiles = (p.states + kSide - 1) / kSide, wanted = kMostBlocks / (tiles * tiles);
  const int64_t ranges = wanted > kMostRanges ? kMostRanges : wanted > 1 ? wanted : 1;
  const int64_t frames = (p.batch * p.time + ranges - 1) / ranges;
  return frames < kFewestFrames ? kFewestFrames : frames;
}

int64_t count_blocks(const hmm_problem &p) {
  const int64_t frames = frames_a_block(p);
  return frames > 0 ? (p.batch * p.time + frames - 1) / frames : 0;
}

template <class Real>
int counts(const hmm_problem &p, const Real *grad, const Real *alpha, const Real *norm, const Real *u,
           const int32_t *method, Real *edge, void *workspace, void *stream) {
  const unsigned tiles = unsigned((p.states + kSide - 1) / kSide);
  const size_t shared = 2 * carved<Real>(kDepth * kSide) + carved<Real>(256 / kWarp);
  return launch(counts_kernel<Real>, dim3(tiles * tiles, unsigned(count_blocks(p))), 256, shared, stream, p, workspace,
                frames_a_block(p), grad, alpha, norm, u, method, edge);
}

template int counts<float>(const hmm_problem &, const float *, const float *, const float *, const float *,
                           const int32_t *, float *, void *, void *);
template int counts<double>(const hmm_problem &, const double *, const double *, const double *, const double *,
                            const int32_t *, double *, void *, void *);

}  // namespace hmm
