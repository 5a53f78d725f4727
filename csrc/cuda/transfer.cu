// Transfer matrices: what is known at the ends of chunks of frames, so that all chunks can be walked at once.
//
//   B_t(i, j) = exp((phi_t(i, j) - max phi_t) + (e_t(j) - max e_t)),  phi_0 = 0; e_0 with initial, e_{L-1} final scores
//   M_c       = B_s B_{s+1} ... B_{s+K-1}  for chunk c of the frames from s on, each row with a power of 2 of its own
//
// From log M_c bridge.cu finds a_{c+1} = a_c M_c, the messages of the frame before chunk c + 1, f_{c-1} = M_c f_c,
// those into the last frame of chunk c - 1 from behind, and log Z. With log a_c and log f_c in place of what comes
// before and behind it, chunk c is a chain of its own, which log_space.cu and log_space_back.cu walk as any other.
//
// A block a chunk; 16 x 16 threads or fewer hold 4 x 4 numbers of M each. The arcs of the next frame come to their
// registers while those of this one are multiplied. Rows are brought back to 2^90 every fourth frame, by what their
// largest was a frame before: powers of 2 are exact.
//
//   cost     a frame: N^2 exponentials, N^3 products, 4 N^2 bytes read, two barriers: at N = 50 some 4,950 cycles,
//            3,900 from sm_90 on (README.md)
//   limits   float32, N of at most 64 (53 KB of shared memory); 65,535 chunks; (mixing) is proved for T up to 2^20
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
#include "chunks.h"
#include "staging.h"

namespace hmm {
namespace {

constexpr int kMost = 256, kRows = 16, kEvery = 4;  // threads; arcs of a frame that a thread has; frames to a rescale
constexpr int kPitch = int(kChunkStates), kWarps = kMost / kWarp;  // of a matrix's row in shared memory
constexpr int kRowBits = 90, kMostUp = 120;         // where rows begin; more would be no float
constexpr float kMixingNats = 18, kArcNats = 69, kSmallestEntry = 0x1p-26f;
constexpr double kLn2 = 0.6931471805599453;

// How a block shares N states: a matrix in side x side tiles, the threads by columns in `groups`, of kRows rows each.
struct Sizes {
  int side, threads, groups;
};
Sizes sizes_of(int N) {
  Sizes o = {};
  o.side = (N + 3) / 4;
  o.groups = (N + kRows - 1) / kRows;
  o.threads = (max(o.side * o.side, N * o.groups) + kWarp - 1) / kWarp * kWarp;
  return o;
}

struct Memory {
  float *arcs, *even, *odd;    // B_t by rows; M by columns, of two frames
  float *tallest;              // of a tile's rows, for each of its columns of tiles
  float *weights, *tops;       // of the next frame: emissions, less what is taken out; its arcs' largest, one a warp
  int32_t *shifts, *exponents, *flags;  // of the rows, what 2 they were multiplied with; at the end; of a warp

  __device__ explicit Memory(unsigned char *&at)
      : arcs(carve<float>(at, kPitch * kPitch)),
        even(carve<float>(at, kPitch * kPitch)),
        odd(carve<float>(at, kPitch * kPitch)),
        tallest(carve<float>(at, kPitch / 4 * kPitch)),
        weights(carve<float>(at, kPitch)),
        tops(carve<float>(at, kWarps)),
        shifts(carve<int32_t>(at, kPitch)),
        exponents(carve<int32_t>(at, kPitch)),
        flags(carve<int32_t>(at, kWarps)) {}
  static constexpr size_t bytes() {
    return 3 * carved<float>(kPitch * kPitch) + carved<float>(kPitch / 4 * kPitch) + 3 * carved<float>(kPitch) +
           2 * carved<float>(kWarps);
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

// The arcs of a frame that are this thread's: of column `column`, kRows rows from `row` on.
struct Held {
  float scores[kRows];

  // What is behind the last row is as the first one of the thread's: no extreme.
  __device__ __forceinline__ void load(const Sequence<float> &q, int64_t t, int row, int column) {
    const float *const arcs = t > 0 ? q.arcs(t) + row * q.states + column : nullptr;
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      scores[k] = k > 0 ? scores[0] : 0.0f;
      if (row + k < q.states && t > 0) scores[k] = arcs[k * q.states];
    }
  }
  __device__ __forceinline__ float top() const {
    float found = scores[0];
#pragma unroll
    for (int k = 1; k < kRows; k++) found = fmax(found, scores[k]);
    return found;
  }
  // B_t to shared memory, without a branch: there is room behind the last row. The lowest of the arcs below `top`, and
  // of the logarithms of allowed B_t(i, j).
  __device__ __forceinline__ void exponentiate(float *arcs, int row, int column, float top, float weight,
                                               float &lowest_arc, float &lowest) const {
    float *const to = arcs + row * kPitch + column;
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      const float below = scores[k] - top, x = below + weight;
      lowest_arc = fmin(lowest_arc, below);
      lowest = fmin(lowest, x == negative_infinity<float>() ? 0.0f : x);
      to[k * kPitch] = exp(x);
    }
  }
};

// 4 x 4 numbers of M, of the rows from 4 row on and the columns from 4 column on.
struct Tile {
  float sums[4][4];  // row, column

  __device__ __forceinline__ void multiply(const float *matrix, const float *arcs, int N, int row, int column) {
    const float4 *left = reinterpret_cast<const float4 *>(matrix) + row,
                 *right = reinterpret_cast<const float4 *>(arcs) + column;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[r][c] = 0;
#pragma unroll 2
    for (int k = 0; k < N; k++) {
      const float4 a = left[k * (kPitch / 4)], b = right[k * (kPitch / 4)];
      const float of_rows[4] = {a.x, a.y, a.z, a.w}, of_columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[r][c] += of_rows[r] * of_columns[c];
    }
  }
  // Times 2^up of each row; the smallest number that is not 0, or was not before.
  __device__ __forceinline__ void rescale(const int (&up)[4], float &smallest) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float scale = ldexp(1.0f, up[r]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float x = sums[r][c];
        sums[r][c] = x * scale;
        smallest = fmin(smallest, x > 0 ? sums[r][c] : 1.0f);
      }
    }
  }
  __device__ __forceinline__ float smallest() const {
    float found = 1;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) found = fmin(found, sums[r][c] > 0 ? sums[r][c] : 1.0f);
    return found;
  }
  __device__ __forceinline__ void put(float *matrix, int row, int column) const {
    float4 *const to = reinterpret_cast<float4 *>(matrix) + row;
#pragma unroll
    for (int c = 0; c < 4; c++)
      to[(4 * column + c) * (kPitch / 4)] = {sums[0][c], sums[1][c], sums[2][c], sums[3][c]};
  }
  // The largest of each row.
  __device__ __forceinline__ float4 tallest() const {
    float of[4];
#pragma unroll
    for (int r = 0; r < 4; r++) of[r] = fmax(fmax(sums[r][0], sums[r][1]), fmax(sums[r][2], sums[r][3]));
    return {of[0], of[1], of[2], of[3]};
  }
};

// Exponents of the largest numbers of a tile's rows; `empty`, where these are 0.
__device__ __forceinline__ void exponents_of(const float *tallest, int side, int row, int empty, int (&found)[4]) {
  float4 top = {};
#pragma unroll 1
  for (int column = 0; column < side; column++) {
    const float4 x = *reinterpret_cast<const float4 *>(tallest + column * kPitch + 4 * row);
    top = {fmax(top.x, x.x), fmax(top.y, x.y), fmax(top.z, x.z), fmax(top.w, x.w)};
  }
  const float of[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
  for (int r = 0; r < 4; r++) found[r] = of[r] > 0 ? ilogb(of[r]) : empty;
}

// The logarithms of a matrix, each row's less 2^exponent, to (N, N) numbers and their transpose.
__device__ __forceinline__ void put_logs(const float *matrix, const int32_t *exponents, int N, float *along,
                                         float *against) {
#pragma unroll 1
  for (int k = threadIdx.x; k < N * N; k += blockDim.x) {
    const int i = k / N, j = k - i * N;
    const float x = matrix[j * kPitch + i];
    const int exponent = x > 0 ? ilogb(x) : 0;
    // Near 0 where x is near the row's largest, and as exact there.
    const float log_x = x == 0 ? negative_infinity<float>()
                               : log(ldexp(x, -exponent)) + float(exponent - exponents[i]) * float(kLn2);
    along[k] = log_x, against[j * N + i] = log_x;
  }
}

// Which numbers are a thread's: a tile of M, and of the arcs kRows of a column.
struct Place {
  bool has_tile, has_arcs;
  int tile_row, tile_column, row, column;
  __device__ __forceinline__ Place(const Sizes &o, int N) {
    const int thread = threadIdx.x;
    has_tile = thread < o.side * o.side, has_arcs = thread < o.groups * N;
    tile_row = thread % o.side, tile_column = thread / o.side;
    column = thread % N, row = has_arcs ? thread / N * kRows : N;  // without any: behind all rows
  }
};

// The certificates' numbers, of a thread.
struct Extremes {
  float lowest_arc = 0, lowest = 0, smallest = 1;  // of arcs, below their largest; of log B_t; of M
  __device__ __forceinline__ int32_t flags() const {
    const bool far = !(lowest_arc >= -kMixingNats), lost = !(lowest >= -kArcNats && smallest >= kSmallestEntry);
    const bool any_far = __any_sync(kAllLanes, far), any_lost = __any_sync(kAllLanes, lost);
    return (any_far ? kDoesNotMix : 0) | (any_lost ? kMayHaveLost : 0);
  }
};

// Before the first frame: M is 2^kRowBits on its diagonal, and what pads is 0. A barrier.
__device__ __forceinline__ void begin(const Memory &held) {
#pragma unroll 1
  for (int k = threadIdx.x; k < kPitch * kPitch; k += blockDim.x)
    held.arcs[k] = held.odd[k] = 0, held.even[k] = k % (kPitch + 1) == 0 ? ldexp(1.0f, kRowBits) : 0.0f;
#pragma unroll 1
  for (int k = threadIdx.x; k < kPitch; k += blockDim.x) held.shifts[k] = kRowBits;
  if (threadIdx.x < kWarps) held.tops[threadIdx.x] = negative_infinity<float>();
  __syncthreads();
}

// What frame t needs of all threads, to be followed by a barrier: the largest of its arcs, and its emissions with what
// else B_t has, less what is taken out. All warps find the same about emissions; warp 0 returns what that is.
__device__ __forceinline__ double share(const Memory &held, const Sequence<float> &q, int64_t t, const Held &arcs,
                                        bool has_arcs, Pair &emission) {
  const float top = warp_max(has_arcs ? arcs.top() : negative_infinity<float>());
  double taken = double(emission.centre());
  if (t == 0) taken += add_centred(emission, q.initial, q.states);
  if (t == q.length - 1 && q.final) taken += add_centred(emission, q.final, q.states);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) held.tops[warp] = top;
  if (warp == 0) emission.put(held.weights, q.states);
  return warp == 0 ? taken : 0;
}
__device__ __forceinline__ float top_of_arcs(const Memory &held) {
  float top = held.tops[0];
#pragma unroll
  for (int w = 1; w < kWarps; w++) top = fmax(top, held.tops[w]);
  return or_zero(top);
}

// Powers of 2 for a tile's rows.
__device__ __forceinline__ void find_shifts(const Memory &held, int side, const Place &place, int (&up)[4]) {
  exponents_of(held.tallest, side, place.tile_row, kRowBits, up);
#pragma unroll
  for (int r = 0; r < 4; r++) {
    up[r] = min(kRowBits - up[r], kMostUp);
    if (place.tile_column == 0) held.shifts[4 * place.tile_row + r] += HMM_MUTATION == 36 ? 0 : up[r];
  }
}

// After the last frame: what is known of M, to chunk `which`. A barrier.
__device__ __forceinline__ void finish(const Memory &held, const float *matrix, int side, const Place &place, int N,
                                       int32_t flags, double taken, const Chunks &chunks, int64_t which) {
  if (threadIdx.x % kWarp == 0) held.flags[threadIdx.x / kWarp] = flags;
  if (place.has_tile && place.tile_column == 0) {
    int exponents[4];
    exponents_of(held.tallest, side, place.tile_row, 0, exponents);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = 4 * place.tile_row + r;
      held.exponents[i] = exponents[r];
      if (i < N) chunks.rows[which * N + i] = double(exponents[r] - held.shifts[i]) * kLn2;
    }
  }
  __syncthreads();
  put_logs(matrix, held.exponents, N, chunks.along + which * N * N, chunks.against + which * N * N);
  if (threadIdx.x != 0) return;  // no barrier follows
  for (int w = 1; w < int(blockDim.x) / kWarp; w++) flags |= held.flags[w];
  chunks.flags[which] = flags, chunks.taken[which] = taken;
}

__global__ void __launch_bounds__(kMost, 2) transfer_kernel(hmm_problem p, Sizes o, Chunks chunks) {
  HMM_SHARED_MEMORY(at);
  const int N = int(p.states);
  const int64_t b = blockIdx.x;
  const Sequence<float> q(p, b);
  const Span span = span_of(p, q.length, blockIdx.y);
  if (span.frames <= 0 || q.length <= p.chunk_frames) return;  // the whole block
  const Memory held(at);
  const Place place(o, N);
  begin(held);
  Held arcs;
  Tile tile;
  Extremes found;
  arcs.load(q, span.first, place.row, place.column);
  Pair emission = emission_of(q, span.first);
  double taken = share(held, q, span.first, arcs, place.has_arcs, emission);  // thread 0's
  __syncthreads();
  const float *now = held.even;
#pragma unroll 1
  for (int64_t c = 0; c < span.frames; c++) {
    const int64_t next = span.first + c + 1;
    const bool last = c + 1 == span.frames, rescales = c > 0 && c % kEvery == 0;
    const float top = top_of_arcs(held);
    if (threadIdx.x == 0) taken += double(top);
    if (place.has_arcs)
      arcs.exponentiate(held.arcs, place.row, place.column, top, held.weights[place.column], found.lowest_arc,
                        found.lowest);
    int up[4];
    if (rescales && place.has_tile) find_shifts(held, o.side, place, up);
    if (!last) arcs.load(q, next, place.row, place.column), emission = emission_of(q, next);
#if HMM_MUTATION != 31
    __syncthreads();
#endif
    float *const then = c % 2 ? held.even : held.odd;
    if (place.has_tile) {
      tile.multiply(now, held.arcs, N, place.tile_row, place.tile_column);
      if (rescales) tile.rescale(up, found.smallest);
      else found.smallest = fmin(found.smallest, tile.smallest());
      tile.put(then, place.tile_row, place.tile_column);
      if (last || c % kEvery == kEvery - 1)
        *reinterpret_cast<float4 *>(held.tallest + place.tile_column * kPitch + 4 * place.tile_row) = tile.tallest();
    }
    now = then;
    if (!last) taken += share(held, q, next, arcs, place.has_arcs, emission);
#if HMM_MUTATION != 32
    __syncthreads();
#endif
  }
  finish(held, now, o.side, place, N, found.flags(), taken, chunks, b * chunks_of(p) + blockIdx.y);
}

}  // namespace

int transfer(const hmm_problem &p, const Chunks &chunks, void *stream) {
  const Sizes o = sizes_of(int(p.states));
  return launch(transfer_kernel, dim3(unsigned(p.batch), unsigned(chunks_of(p))), o.threads, Memory::bytes(), stream, p,
                o, chunks);
}

}  // namespace hmm
