// What a scaled sweep needs of all frames at once: the arcs exponentiated, with what their certificate demands, and the
// emissions' weights.
//
//   c(j) = max_i phi(i, j),  A(i, j) = exp(phi(i, j) - c(j));     w_t(j) = exp(e_t(j) + c(j) - max over j of the same)
//
// c is left out of w_0, and the final scores come into w_{L-1}. Bound by memory: 4 N^2 bytes read and written for the
// arcs
// (float), 4 N read and written a frame, one exponential each. Limits: none on N or T.
#include "scaled.h"

namespace hmm {
namespace {

// A block does 32 columns of a matrix, 8 threads a column.
constexpr int kSlices = 8;
template <class Real>
__global__ void __launch_bounds__(kWarp *kSlices)
    arcs_kernel(const Real *transition, int64_t stride, int N, void *workspace) {
  HMM_SHARED_MEMORY(at);
  Real *found = carve<Real>(at, kSlices * kWarp);
  const Arcs<Real> out(workspace, blockIdx.y, N);
  const Real *phi = transition + blockIdx.y * stride, ninf = negative_infinity<Real>();
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp, j = blockIdx.x * kWarp + lane,
            rows = j < N ? N : 0;
  // f combined over the 8 threads of the column, in order.
  const auto combine = [&](Real x, auto f) {
    __syncthreads();
    found[threadIdx.x] = x;
    __syncthreads();
    x = found[lane];
#pragma unroll
    for (int q = 1; q < kSlices; q++) x = f(x, found[q * kWarp + lane]);
    return x;
  };
  Real c = ninf;
  for (int i = slice; i < rows; i += kSlices) c = phi[i * N + j] > c ? phi[i * N + j] : c;
  c = combine(c, [](Real x, Real y) { return x > y ? x : y; });
  // On a grid, differences of any two c are exact, and so is the shift that the emissions get.
  c = c == ninf ? ninf : rint(c * 64) / 64;
  Real lowest = 0, forbidden = 0, entered = N == 1;
  for (int i = slice; i < rows; i += kSlices) {
    const Real s = c == ninf ? phi[i * N + j] : phi[i * N + j] - c;
    out.arcs[i * N + j] = exp(s);
    if (s == ninf) forbidden = 1;
    else lowest = s < lowest ? s : lowest, entered = i == j ? entered : Real(1);
  }
  lowest = combine(lowest, [](Real x, Real y) { return x < y ? x : y; });
  forbidden = combine(forbidden, [](Real x, Real y) { return x > y ? x : y; });
  entered = combine(entered, [](Real x, Real y) { return x > y ? x : y; });
  if (slice == 0 && j < N) out.top[j] = c, out.spread[j] = -lowest, out.forbidden[j] = entered > 0 ? forbidden : Real(2);
}

// One block a matrix: which certificate its sequences need, and the least sum (scaled.h).
template <class Real> __global__ void __launch_bounds__(256) certificate_kernel(int N, int64_t T, void *workspace) {
  using R = Range<Real>;
  HMM_SHARED_MEMORY(at);
  Real *part = carve<Real>(at, 256 / kWarp);
  const Arcs<Real> arcs(workspace, blockIdx.x, N);
  Real top = negative_infinity<Real>(), spread = 0, forbidden = 0;
  for (int j = threadIdx.x; j < N; j += blockDim.x) {
    top = fmax(top, arcs.top[j]);
    spread = arcs.spread[j] > spread ? arcs.spread[j] : spread;
    forbidden = fmax(forbidden, arcs.forbidden[j]);
  }
  top = block_max(top, part), spread = block_max(spread, part), forbidden = block_max(forbidden, part);
  if (threadIdx.x != 0) return;  // no barrier follows
  const double bits = double(spread) * 1.4426950408889634;
  const double demanded =
      bits + 3 * log2(double(N)) + log2(double(T)) + R::kSmallestBits + kTopBits + 1 + R::kPrecision;
  const bool mixing = !(forbidden > 0) && demanded <= kLowestTopBits - 4;  // beyond that, benign frames would fail it
  arcs.certificate->least = Real(exp2(mixing && demanded > R::kLeastSumBits ? demanded : double(R::kLeastSumBits)));
  arcs.certificate->top = top == negative_infinity<Real>() ? Real(0) : top;
  arcs.certificate->forgets = forbidden < 2;
  arcs.certificate->mixing = mixing, arcs.certificate->usable = bits <= -R::kArcBits;
}

// w of all frames, a warp a frame.
template <bool Find, class Real>
__global__ void __launch_bounds__(256) weights_kernel(hmm_problem p, void *workspace, Real *centre, Real *w) {
  const int64_t row = int64_t(blockIdx.x) * (256 / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch * p.time) return;  // a whole warp
  const Arcs<Real> arcs = arcs_of<Real>(p, workspace, row / p.time);
  weigh_frame<Find>(p, row, arcs.top, arcs.certificate->top, centre, w);
}

template <bool Find, class Real> int weigh(const hmm_problem &p, void *workspace, Real *centre, Real *w, void *stream) {
  const int64_t blocks = (p.batch * p.time + 256 / kWarp - 1) / (256 / kWarp);
  return launch(weights_kernel<Find, Real>, dim3(unsigned(blocks)), 256, 0, stream, p, workspace, centre, w);
}

}  // namespace

template <class Real>
int prepare(const hmm_problem &p, bool find_centres, Real *centre, Real *w, void *workspace, void *stream) {
  const dim3 columns(unsigned((p.states + kWarp - 1) / kWarp), unsigned(matrices(p)));
  int status = launch(arcs_kernel<Real>, columns, kWarp * kSlices, carved<Real>(kWarp * kSlices), stream,
                      static_cast<const Real *>(p.transition), p.transition_batch_stride, int(p.states), workspace);
  if (!status)
    status = launch(certificate_kernel<Real>, dim3(unsigned(matrices(p))), 256, carved<Real>(256 / kWarp), stream,
                    int(p.states), p.time, workspace);
  if (status) return status;
  return find_centres ? weigh<true>(p, workspace, centre, w, stream) : weigh<false>(p, workspace, centre, w, stream);
}

template int prepare<float>(const hmm_problem &, bool, float *, float *, void *, void *);
template int prepare<double>(const hmm_problem &, bool, double *, double *, void *, void *);

}  // namespace hmm
