// Transfer matrices: what is known at the ends of chunks of frames, so that all chunks can be walked at once.
//
//   B_t(i, j) = exp((phi_t(i, j) - max phi_t) + (e_t(j) - max e_t)),  phi_0 = 0; e_0 with initial, e_{L-1} final scores
//   M_c       = B_s B_{s+1} ... B_{s+K-1}  for chunk c of the frames from s on, each row with a power of 2 of its own
//
// From log M_c bridge.cu finds a_{c+1} = a_c M_c, the messages of the frame before chunk c + 1, f_{c-1} = M_c f_c,
// those into the last frame of chunk c - 1 from behind, and log Z. With log a_c and log f_c in place of what comes
// before and behind it, chunk c is a chain of its own, which log_space.cu and log_space_back.cu walk as any other.
//
// A block a chunk, of 256 threads or fewer. Each holds 3 x 4 numbers of M, of more than 52 states 4 x 4: seven or eight
// warps then, where 4 x 4 would leave six to N = 50, two of them on two of four schedulers. The arcs of the next frame
// come to their registers while those of this one are multiplied. Rows are brought back to 2^90 every fourth frame, by
// what their largest was a frame before: powers of 2 are exact.
//
//   cost     a frame: N^2 exponentials, N^3 products, 4 N^2 bytes read, two barriers: at N = 50 some 3,700 cycles,
//            2,800 from sm_90 on (README.md)
//   limits   float32, N of at most 64 (53 KB of shared memory; up to 52 45); 65,535 chunks; (mixing) is proved for T up
//            to 2^20
//
// When are they exact? A number below 2^-126 is lost. Nothing grows beyond 2^122: B_t is at most 1, a row's entries
// grow by N <= 2^6 a frame, from 2^91 on for five frames, of which the first one is behind what the rescale knows. Two
// certificates, either is enough, if it holds for all chunks of a sequence:
//  (entrywise) Every allowed B_t(i, j) is at least 2^-100 (69 nats), and no entry of a row that came out larger than 0
//     is less than 2^-26. Then a product is at least 2^-126 or one of its factors is 0: by induction, an entry is 0
//     where no path leads to it and nowhere else, nothing was lost, and all have the relative error of sums of numbers
//     larger than 0, N 2^-24 a frame at most.
//  (mixing) All arcs are allowed, and those of a frame differ by R = 26 bits (18 nats) at most. Let s be the sum of a
//     row and s' that of the next one before it is rescaled. For the j with e_t(j) = max e_t, B_t(i, j) >= 2^-R for all
//     i, hence s' >= 2^-R s, whatever the emissions: after a rescale at least 2^(90 - R), and 2^(90 - 5 R) = 2^-40
//     before the next one. A B_t(i, j) that is lost takes s 2^-126 <= s' 2^(R - 126) out of each of N entries, and a
//     product N^2 2^-126 <= s' 2^-74 of all. So what is lost is less than 2^-73 of the row. What follows weighs two
//     entries differently by 2^R at most, since the arcs of the next frame do; after the last frame, whose final scores
//     B_{L-1} has, not at all. So a frame costs posteriors and Z 2^(R - 73) = 2^-47 of themselves, 2^20 frames 2^-27.
// NaN reaches all rows, and with them log Z, as +inf does, less itself. Sequences with neither certificate, or whose
// log Z is not finite, are not done in chunks. a_c and f_c are logarithms: nothing is lost where they are found.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "transfer.h"

namespace hmm {
namespace {

template <int States> struct Memory {
  using S = Shape<States>;
  static constexpr int kArcs = States * S::kPitch, kMatrix = States * S::kColumn, kTallest = States / 4 * S::kColumn;
  float *arcs, *even, *odd;    // B_t; M, of two frames
  float *tallest;              // of a tile's rows, for each of its columns of tiles
  float *weights, *tops;       // of the next frame: emissions, less what is taken out; its arcs' largest, one a warp
  int32_t *shifts, *exponents, *flags;  // of the rows, what 2 they were multiplied with; at the end; of a warp

  __device__ explicit Memory(unsigned char *&at)
      : arcs(carve<float>(at, kArcs)),
        even(carve<float>(at, kMatrix)),
        odd(carve<float>(at, kMatrix)),
        tallest(carve<float>(at, kTallest)),
        weights(carve<float>(at, States)),
        tops(carve<float>(at, kWarps)),
        shifts(carve<int32_t>(at, S::kColumn)),
        exponents(carve<int32_t>(at, S::kColumn)),
        flags(carve<int32_t>(at, kWarps)) {}
  static constexpr size_t bytes() {
    return carved<float>(kArcs) + 2 * carved<float>(kMatrix) + carved<float>(kTallest) + carved<float>(States) +
           2 * carved<float>(S::kColumn) + 2 * carved<float>(kWarps);
  }
};

__device__ __forceinline__ Pair emission_of(const Sequence<float> &q, int64_t t) {
  return Pair::of(q.emission ? q.emission + t * q.states : nullptr, q.states, 0);
}

// Adds the scores of a sequence's first or last state, less their largest; returns that.
__device__ __forceinline__ double add_centred(Pair &scores, const float *ends, int N) {
  Pair end = Pair::of(ends, N, 0);
  const double taken = double(end.centre());
  scores.add(end);
  return taken + double(scores.centre());
}

// Exponents of the largest numbers of a tile's rows; `empty`, where these are 0.
template <int States, int kTall>
__device__ __forceinline__ void exponents_of(const float *tallest, int columns, int row, int empty,
                                             int (&found)[kTall]) {
  float4 top = {};
#pragma unroll 4
  for (int column = 0; column < columns; column++) {
    const float4 x = *reinterpret_cast<const float4 *>(tallest + column * Shape<States>::kColumn + 4 * row);
    top = {fmax(top.x, x.x), fmax(top.y, x.y), fmax(top.z, x.z), fmax(top.w, x.w)};
  }
  const float of[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
  for (int r = 0; r < kTall; r++) found[r] = of[r] > 0 ? exponent_of(of[r]) : empty;
}

// The logarithms of a matrix, each row's less 2^exponent, to (N, N) numbers and their transpose.
template <int States>
__device__ __forceinline__ void put_logs(const float *matrix, const int32_t *exponents, int N, float *along,
                                         float *against) {
#pragma unroll 1
  for (int k = threadIdx.x; k < N * N; k += blockDim.x) {
    const int i = k / N, j = k - i * N;
    const float x = matrix[j * Shape<States>::kColumn + Shape<States>::place(i)];
    const int exponent = x > 0 ? ilogb(x) : 0;
    // Near 0 where x is near the row's largest, and as exact there.
    const float log_x = x == 0 ? negative_infinity<float>()
                               : log(ldexp(x, -exponent)) + float(exponent - exponents[i]) * float(kLn2);
    along[k] = log_x, against[j * N + i] = log_x;
  }
}

// Which numbers are a thread's: a tile of M, and of B_t kRows rows of a column.
template <int States> struct Place {
  bool has_tile, has_arcs;
  int tile_row, tile_column, row, column;
  __device__ __forceinline__ Place(const typename Shape<States>::Sizes &o, int N) {
    const int thread = threadIdx.x;
    has_tile = thread < o.tile_rows * o.tile_columns, has_arcs = thread < o.groups * N;
    tile_row = thread % o.tile_rows, tile_column = thread / o.tile_rows;
    column = thread % N, row = has_arcs ? thread / N * Shape<States>::kRows : N;  // without any: behind all rows
  }
};

// Before the first frame: M is 2^kRowBits on its diagonal, and what pads B_t is 0. A barrier.
template <int States> __device__ __forceinline__ void begin(const Memory<States> &held) {
  using S = Shape<States>;
#pragma unroll 1
  for (int k = threadIdx.x; k < held.kArcs; k += blockDim.x) held.arcs[k] = 0;
#pragma unroll 1
  for (int k = threadIdx.x; k < held.kMatrix; k += blockDim.x)
    held.even[k] = k % S::kColumn == S::place(k / S::kColumn) ? power_of_2(kRowBits) : 0.0f;
#pragma unroll 1
  for (int k = threadIdx.x; k < S::kColumn; k += blockDim.x) held.shifts[k] = kRowBits;
  if (threadIdx.x < kWarps) held.tops[threadIdx.x] = negative_infinity<float>();
  __syncthreads();
}

// What frame t needs of all threads, to be followed by a barrier: the largest of its arcs, and, by warp 0, which has
// `emission`, its emissions with what else B_t has, less what is taken out; adds that to thread 0's `taken`.
template <int States>
__device__ __forceinline__ void share(const Memory<States> &held, const Sequence<float> &q, int64_t t, float top,
                                      Pair &emission, double &taken) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  top = warp_max(top);
  if (lane == 0) held.tops[warp] = top;
  if (warp != 0) return;  // the whole warp
  double found = double(emission.centre());
  if (t == 0) found += add_centred(emission, q.initial, q.states);
  if (t == q.length - 1 && q.final) found += add_centred(emission, q.final, q.states);
  if (lane == 0) taken += found;
  emission.put(held.weights, q.states);
}
__device__ __forceinline__ float top_of_arcs(const float *tops) {
  const float4 *const of = reinterpret_cast<const float4 *>(tops);
  static_assert(kWarps == 8, "two pieces");
  const float4 x = of[0], y = of[1];
  return or_zero(fmax(fmax(fmax(x.x, x.y), fmax(x.z, x.w)), fmax(fmax(y.x, y.y), fmax(y.z, y.w))));
}

// Powers of 2 for a tile's rows.
template <int States, int kTall>
__device__ __forceinline__ void find_shifts(const Memory<States> &held, int columns, const Place<States> &place,
                                            int (&up)[kTall]) {
  exponents_of<States>(held.tallest, columns, place.tile_row, kRowBits, up);
#pragma unroll
  for (int r = 0; r < kTall; r++) {
    up[r] = min(kRowBits - up[r], kMostUp);
    if (place.tile_column == 0) held.shifts[4 * place.tile_row + r] += HMM_DEFECT(36) ? 0 : up[r];
  }
}

// After the last frame: what is known of M, to chunk `which`. A barrier.
template <int States>
__device__ __forceinline__ void finish(const Memory<States> &held, const float *matrix, int columns,
                                       const Place<States> &place, int N, int32_t flags, double taken,
                                       const Chunks &chunks, int64_t which) {
  constexpr int kTall = Shape<States>::kTall;
  if (threadIdx.x % kWarp == 0) held.flags[threadIdx.x / kWarp] = flags;
  if (place.has_tile && place.tile_column == 0) {
    int exponents[kTall];
    exponents_of<States>(held.tallest, columns, place.tile_row, 0, exponents);
#pragma unroll
    for (int r = 0; r < kTall; r++) {
      const int i = kTall * place.tile_row + r;
      if (i >= N) break;
      held.exponents[i] = exponents[r];
      chunks.rows[which * N + i] = double(exponents[r] - held.shifts[4 * place.tile_row + r]) * kLn2;
    }
  }
  __syncthreads();
  put_logs<States>(matrix, held.exponents, N, chunks.along + which * N * N, chunks.against + which * N * N);
  if (threadIdx.x != 0) return;  // no barrier follows
  for (int w = 1; w < int(blockDim.x) / kWarp; w++) flags |= held.flags[w];
  chunks.flags[which] = flags, chunks.taken[which] = taken;
}

template <int States>
__global__ void __launch_bounds__(kMost, 2)
    transfer_kernel(hmm_problem p, typename Shape<States>::Sizes o, Chunks chunks) {
  using S = Shape<States>;
  HMM_SHARED_MEMORY(at);
  const int N = int(p.states);
  const int64_t b = blockIdx.x;
  const Sequence<float> q(p, b);
  const Span span = span_of(p, q.length, blockIdx.y);
  if (span.frames <= 0 || q.length <= p.chunk_frames) return;  // the whole block
  const Memory<States> held(at);
  const Place<States> place(o, N);
  begin(held);
  Held<S::kRows> arcs;
  Tile<States> tile;
  Extremes found;
  Pair emission = {};
  double taken = 0;  // thread 0's
  const float *scores = q.arcs(span.first);  // of the frame that comes next
  if (span.first > 0) arcs.load(scores, N, place.row, place.column);
  else arcs.none();
  if (threadIdx.x < kWarp) emission = emission_of(q, span.first);
  const auto put = [&](int64_t t) {
    share(held, q, t, place.has_arcs ? arcs.top() : negative_infinity<float>(), emission, taken);
  };
  put(span.first);
  __syncthreads();
  const float *now = held.even;
  const int frames = int(span.frames);
#pragma unroll 1
  for (int c = 0; c < frames; c++) {
    const bool last = c + 1 == frames, rescales = c > 0 && c % kEvery == 0;
    const float top = top_of_arcs(held.tops);
    if (threadIdx.x == 0) taken += double(top);
    if (place.has_arcs)
      arcs.exponentiate(held.arcs + place.row * S::kPitch + place.column, S::kPitch, top, held.weights[place.column],
                        found);
    int up[S::kTall];
    if (rescales && place.has_tile) find_shifts(held, o.tile_columns, place, up);
    if (!last) {
      arcs.load(scores += q.stride, N, place.row, place.column);
      if (threadIdx.x < kWarp) emission = emission_of(q, span.first + c + 1);
    }
    if (!HMM_DEFECT(31)) __syncthreads();
    float *const then = c % 2 ? held.even : held.odd;
    if (place.has_tile) {
      tile.multiply(now, held.arcs, N, place.tile_row, place.tile_column);
      if (rescales) tile.rescale(up, found);
      else tile.note(found);
      tile.put(then, place.tile_row, place.tile_column);
      if (last || c % kEvery == kEvery - 1) tile.put_tallest(held.tallest, place.tile_row, place.tile_column);
    }
    now = then;
    if (!last) put(span.first + c + 1);
    if (!HMM_DEFECT(32)) __syncthreads();
  }
  finish(held, now, o.tile_columns, place, N, found.flags(), taken, chunks, b * chunks_of(p) + blockIdx.y);
}

template <int States> int run(const hmm_problem &p, const Chunks &chunks, void *stream) {
  const auto o = Shape<States>::sizes_of(int(p.states));
  return launch(transfer_kernel<States>, dim3(unsigned(p.batch), unsigned(chunks_of(p))), o.threads,
                Memory<States>::bytes(), stream, p, o, chunks);
}

}  // namespace

int transfer(const hmm_problem &p, const Chunks &chunks, void *stream) {
  return p.states <= kFewStates ? run<kFewStates>(p, chunks, stream) : run<kChunkStates>(p, chunks, stream);
}

}  // namespace hmm
