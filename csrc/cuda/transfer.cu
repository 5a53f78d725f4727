// Transfer matrices: what is known at the ends of chunks of frames, so that all chunks can be walked at once.
//
//   B_t(i, j) = exp((phi_t(i, j) - max phi_t) + (e_t(j) - max e_t)),  phi_0 = 0, e_0 with initial, e_{L-1} with final scores
//   M_c       = B_s B_{s+1} ... B_{s+K-1}  for chunk c of the frames from s on, each row with a power of 2 of its own
//   a_{c+1}   = a_c M_c,  from any row of M_0;     log Z = log sum of the last one        (the frame before chunk c + 1)
//   f_{c-1}   = M_c f_c,  from ones                                                       (the last frame of chunk c - 1)
//
// With log a_c in place of initial scores and log f_c of final ones, chunk c is a chain of its own, which log_space.cu
// and log_space_back.cu walk as any other; a_c, f_c and log Z are of bridge_kernel, in log space, from the matrices'
// logarithms. transfer_kernel has a block a chunk. 16 x 16 threads or fewer each hold 4 x 4 numbers of M; the arcs of the
// next frame come to their registers while those of this one are multiplied. Rows are brought back to [2^90, 2^91)
// every fourth frame, by what their largest was a frame before: powers of 2 are exact.
//
//   cost     a frame: N^2 exponentials, N^3 products, 4 N^2 bytes read, two barriers; a product of 50 states is some
//            3,200 cycles (1,600 from sm_90 on). A chunk: 4 N^2 exponentials and four barriers in bridge_kernel.
//   limits   float32, N of at most 64 (a 4 x 4 tile a thread, 50 KB of shared memory). No other limit on T than the
//            number of chunks, 65535; (mixing) is proved for T up to 2^20.
//
// When are they exact? A number below 2^-126 is lost. Nothing grows beyond 2^122: B_t is at most 1, a row's entries grow
// by N <= 2^6 a frame, and there are 5 between two rescales that know of each other. Two certificates, either is enough,
// if it holds for all chunks of a sequence:
//  (entrywise) Every allowed B_t(i, j) is at least 2^-100 (69 nats), and no entry of a row that came out larger than 0 is
//     less than 2^-26. Then a product is at least 2^-126 or one of its factors is 0: by induction, an entry is 0 where
//     no path leads to it and nowhere else, nothing was lost, and all have the relative error of sums of numbers
//     larger than 0, N 2^-24 a frame at most.
//  (mixing) All arcs are allowed, and those of a frame differ by R = 26 bits (18 nats) at most. Let s be the sum of a row
//     and s' that of the next one before it is rescaled. For the state j with e_t(j) = max e_t, B_t(i, j) >= 2^-R for
//     all i, hence s' >= 2^-R s, whatever the emissions: after a rescale at least 2^(90 - R), and 2^(90 - 5 R) = 2^-40
//     before the next one. A B_t(i, j) that is lost takes s 2^-126 <= s' 2^(R - 126) out of each of N entries, and a
//     product N^2 2^-126 <= s' 2^-74 of all. So what is lost is less than 2^-73 of the row. What follows weighs two
//     entries differently by 2^R at most, since the arcs of the next frame do; after the last frame, whose final scores
//     B_{L-1} has, not at all. So a frame costs posteriors and Z 2^(R - 73) = 2^-47 of themselves, T frames 2^-27.
// NaN and +inf fail (entrywise), and the rows that they reach are NaN and so is log Z. Sequences with neither
// certificate, or whose log Z is not finite, are not done in chunks. a_c and f_c lose nothing, being logarithms.
//
// Compiled for sm_75 to sm_120 and executed on the CPU by the tests; not timed on a GPU.
#include "chunks.h"
#include "staging.h"

namespace hmm {
namespace {

constexpr int kMost = 256, kRows = 18, kEvery = 4;  // threads; arcs of a frame that a thread has; frames to a rescale
constexpr int kRowBits = 90, kMostUp = 120;         // where rows begin; more would be no float
constexpr float kMixingNats = 18, kArcNats = 69, kSmallestEntry = 0x1p-26f;
constexpr double kLn2 = 0.6931471805599453;

// How a block shares N states: a matrix in side x side tiles, rows of `pitch`; threads by columns in `groups`.
struct Sizes {
  int side, pitch, threads, groups;
};
Sizes sizes_of(int N) {
  Sizes o = {};
  o.side = (N + 3) / 4, o.pitch = 4 * o.side;
  o.threads = (max(o.side * o.side, N * ((N + kRows - 1) / kRows)) + kWarp - 1) / kWarp * kWarp;
  o.groups = o.threads / N;
  return o;
}

struct Memory {
  float *arcs, *even, *odd;  // B_t by rows; M by columns, of two frames
  float *weights;            // of the next frame: emissions, less what is taken out
  float *tallest;            // of a tile's rows, for each of its columns of tiles
  float *tops;               // of the next frame's arcs, one a warp
  int32_t *flags, *exponents;  // of a warp; of the rows, at the end

  __device__ Memory(unsigned char *&at, const Sizes &o, int warps)
      : arcs(carve<float>(at, o.pitch * o.pitch)),
        even(carve<float>(at, o.pitch * o.pitch)),
        odd(carve<float>(at, o.pitch * o.pitch)),
        weights(carve<float>(at, o.pitch)),
        tallest(carve<float>(at, o.side * o.pitch)),
        tops(carve<float>(at, warps)),
        flags(carve<int32_t>(at, warps)),
        exponents(carve<int32_t>(at, o.pitch)) {}
  static size_t bytes(const Sizes &o) {
    const int warps = o.threads / kWarp;
    return 3 * carved<float>(o.pitch * o.pitch) + carved<float>(o.pitch) + carved<float>(o.side * o.pitch) +
           carved<float>(warps) + carved<int32_t>(warps) + carved<int32_t>(o.pitch);
  }
};

// Scores of states lane and lane + 32, for whole warps.
struct Pair {
  float low, high;
  static __device__ __forceinline__ Pair of(const float *x, int N, float without) {
    const int lane = threadIdx.x % kWarp;
    const float none = negative_infinity<float>();
    return {lane >= N ? none : x ? x[lane] : without, lane + kWarp >= N ? none : x ? x[lane + kWarp] : without};
  }
  // Takes out the larger of all, and returns it: 0 where all are forbidden.
  __device__ __forceinline__ float centre() {
    const float top = or_zero(warp_max(fmax(low, high)));
    low -= top, high -= top;
    return top;
  }
  __device__ __forceinline__ void add(Pair x) { low += x.low, high += x.high; }
  __device__ __forceinline__ void put(float *to, int N) const {
    const int lane = threadIdx.x % kWarp;
    if (lane < N) to[lane] = low;
    if (lane + kWarp < N) to[lane + kWarp] = high;
  }
};

__device__ __forceinline__ Pair emission_of(const Sequence<float> &q, int64_t t) {
  return Pair::of(q.emission ? q.emission + t * q.states : nullptr, q.states, 0);
}

// What B_t has beside its arcs, to `weights`; returns what is taken out. For one warp.
__device__ __forceinline__ double weigh(const Sequence<float> &q, int64_t t, Pair scores, float *weights) {
  double taken = double(scores.centre());
  if (t == 0) {
    Pair initial = Pair::of(q.initial, q.states, 0);
    taken += double(initial.centre());
    scores.add(initial);
  }
  if (t == q.length - 1 && q.final) {
    Pair final = Pair::of(q.final, q.states, 0);
    taken += double(final.centre());
    scores.add(final);
  }
  taken += double(scores.centre());
  scores.put(weights, q.states);
  return taken;
}

// The arcs of a frame that are this thread's: of column `column`, every groups-th row.
struct Held {
  float scores[kRows];

  __device__ __forceinline__ void load(const Sequence<float> &q, int64_t t, int row, int column, int groups) {
    const int N = q.states;
    const float *arc = q.transition;
    if (t > 0) arc = q.arcs(t) + row * N + column;
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      scores[k] = row >= N ? negative_infinity<float>() : t > 0 ? *arc : 0.0f;
      row += groups, arc += groups * N;
    }
  }
  __device__ __forceinline__ float top() const {
    float found = scores[0];
#pragma unroll
    for (int k = 1; k < kRows; k++) found = fmax(found, scores[k]);
    return warp_max(found);
  }
  // B_t to shared memory; what it does to the certificates.
  __device__ __forceinline__ void exponentiate(float *arcs, int pitch, int N, int row, int column, int groups, float top,
                                               float weight, bool &mixes, bool &certain) const {
    const bool forbidden = weight == negative_infinity<float>();
    float *to = arcs + row * pitch + column;
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      if (row < N) {
        const float below = scores[k] - top, x = below + weight;
        mixes &= below >= -kMixingNats;
        certain &= forbidden || scores[k] == negative_infinity<float>() || x >= -kArcNats;
        *to = exp(x);
      }
      row += groups, to += groups * pitch;
    }
  }
};

// 4 x 4 numbers of M, of the rows from 4 row on and the columns from 4 column on.
struct Tile {
  float sums[4][4];  // row, column

  __device__ __forceinline__ void multiply(const float *matrix, const float *arcs, int N, int side, int row, int column) {
    const float4 *const left = reinterpret_cast<const float4 *>(matrix) + row,
                 *const right = reinterpret_cast<const float4 *>(arcs) + column;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[r][c] = 0;
#pragma unroll 4
    for (int k = 0; k < N; k++) {
      const float4 a = left[k * side], b = right[k * side];
      const float of_rows[4] = {a.x, a.y, a.z, a.w}, of_columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[r][c] += of_rows[r] * of_columns[c];
    }
  }
  __device__ __forceinline__ void rescale(const int (&up)[4], bool &certain) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float scale = ldexp(1.0f, up[r]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const bool reached = sums[r][c] > 0;
        sums[r][c] *= scale;
        certain &= !reached || sums[r][c] >= kSmallestEntry;
      }
    }
  }
  __device__ __forceinline__ void put(float *matrix, int side, int row, int column) const {
    float4 *const to = reinterpret_cast<float4 *>(matrix) + row;
#pragma unroll
    for (int c = 0; c < 4; c++) to[(4 * column + c) * side] = {sums[0][c], sums[1][c], sums[2][c], sums[3][c]};
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
__device__ __forceinline__ void exponents_of(const float *tallest, const Sizes &o, int row, int empty, int (&found)[4]) {
  float4 top = {};
#pragma unroll 1
  for (int column = 0; column < o.side; column++) {
    const float4 x = *reinterpret_cast<const float4 *>(tallest + column * o.pitch + 4 * row);
    top = {fmax(top.x, x.x), fmax(top.y, x.y), fmax(top.z, x.z), fmax(top.w, x.w)};
  }
  const float of[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
  for (int r = 0; r < 4; r++) found[r] = of[r] > 0 ? ilogb(of[r]) : empty;
}

// The logarithms of a matrix, each row's less 2^exponent, to (N, N) numbers and their transpose.
__device__ __forceinline__ void put_logs(const float *matrix, const int32_t *exponents, int N, int pitch, float *along,
                                         float *against) {
#pragma unroll 1
  for (int k = threadIdx.x; k < N * N; k += blockDim.x) {
    const int i = k / N, j = k - i * N;
    const float x = matrix[j * pitch + i];
    const int exponent = x > 0 ? ilogb(x) : 0;
    // Near 0 where x is near the row's largest, and as exact there.
    const float log_x = x == 0 ? negative_infinity<float>()
                               : log(ldexp(x, -exponent)) + float(exponent - exponents[i]) * float(kLn2);
    along[k] = log_x, against[j * N + i] = log_x;
  }
}

__global__ void __launch_bounds__(kMost, 2) transfer_kernel(hmm_problem p, Sizes o, Chunks chunks) {
  HMM_SHARED_MEMORY(at);
  const int N = int(p.states), thread = threadIdx.x, warp = thread / kWarp, warps = blockDim.x / kWarp;
  const int64_t b = blockIdx.x, which = b * chunks_of(p) + blockIdx.y;
  const Sequence<float> q(p, b);
  const Span span = span_of(p, q.length, blockIdx.y);
  if (span.frames <= 0 || q.length <= p.chunk_frames) return;  // the whole block
  const Memory held(at, o, warps);
  const bool has_tile = thread < o.side * o.side, has_arcs = thread < o.groups * N;
  const int tile_row = thread % o.side, tile_column = thread / o.side;
  const int column = thread % N, row = has_arcs ? thread / N : N;  // without any: behind all rows
#pragma unroll 1
  for (int k = thread; k < o.pitch * o.pitch; k += blockDim.x)
    held.arcs[k] = held.odd[k] = 0, held.even[k] = k % (o.pitch + 1) == 0 ? ldexp(1.0f, kRowBits) : 0.0f;

  bool mixes = true, certain = true;
  double taken = 0;  // thread 0's
  int shifts[4] = {kRowBits, kRowBits, kRowBits, kRowBits};
  Held arcs;
  Tile tile;
  Pair emission = {};
  // What the next frame needs of all threads, before a barrier.
  const auto share = [&](int64_t t) {
    const float top = arcs.top();
    if (thread % kWarp == 0) held.tops[warp] = top;
    if (warp == 0) taken += weigh(q, t, emission, held.weights);
  };
  arcs.load(q, span.first, row, column, o.groups);
  if (warp == 0) emission = emission_of(q, span.first);
  share(span.first);
  __syncthreads();
#pragma unroll 1
  for (int64_t c = 0; c < span.frames; c++) {
    const bool last = c + 1 == span.frames;
    const float top = or_zero(largest_of(held.tops, warps));
    taken += double(top);
    arcs.exponentiate(held.arcs, o.pitch, N, row, column, o.groups, top, held.weights[column], mixes, certain);
    int up[4] = {};
    if (c > 0 && c % kEvery == 0 && has_tile) {
      exponents_of(held.tallest, o, tile_row, kRowBits, up);
#pragma unroll
      for (int r = 0; r < 4; r++) up[r] = min(kRowBits - up[r], kMostUp), shifts[r] += HMM_MUTATION == 36 ? 0 : up[r];
    }
    if (!last) {
      arcs.load(q, span.first + c + 1, row, column, o.groups);
      if (warp == 0) emission = emission_of(q, span.first + c + 1);
    }
#if HMM_MUTATION != 31
    __syncthreads();
#endif
    if (has_tile) {
      tile.multiply(c % 2 ? held.odd : held.even, held.arcs, N, o.side, tile_row, tile_column);
      tile.rescale(up, certain);
      tile.put(c % 2 ? held.even : held.odd, o.side, tile_row, tile_column);
      if (last || c % kEvery == kEvery - 1)
        *reinterpret_cast<float4 *>(held.tallest + tile_column * o.pitch + 4 * tile_row) = tile.tallest();
    }
    if (!last) share(span.first + c + 1);
#if HMM_MUTATION != 32
    __syncthreads();
#endif
  }
  const bool any_far = __any_sync(kAllLanes, !mixes), any_lost = __any_sync(kAllLanes, !certain);
  if (thread % kWarp == 0) held.flags[warp] = (any_far ? kDoesNotMix : 0) | (any_lost ? kMayHaveLost : 0);
  if (has_tile && tile_column == 0) {
    int exponents[4];
    exponents_of(held.tallest, o, tile_row, 0, exponents);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      held.exponents[4 * tile_row + r] = exponents[r];
      if (4 * tile_row + r < N)
        chunks.rows[which * N + 4 * tile_row + r] = double(exponents[r] - shifts[r]) * kLn2;
    }
  }
  __syncthreads();
  put_logs(span.frames % 2 ? held.odd : held.even, held.exponents, N, o.pitch, chunks.along + which * N * N,
           chunks.against + which * N * N);
  if (thread != 0) return;  // no barrier follows
  int32_t flags = 0;
  for (int w = 0; w < warps; w++) flags |= held.flags[w];
  chunks.flags[which] = flags, chunks.taken[which] = taken;
}

constexpr int kBridge = 256, kShares = 4, kOwn = kBridge / kShares, kEach = kOwn / kShares;
static_assert(kOwn == kChunkStates);

// For warp 0. Logs and the doubles that belong to them, added and centred: returns what is taken out.
__device__ __forceinline__ double add_and_centre(Pair &logs, const double *rows, int N) {
  const int lane = threadIdx.x % kWarp;
  double low = lane < N ? double(logs.low) + rows[lane] : double(negative_infinity<float>());
  double high = lane + kWarp < N ? double(logs.high) + rows[lane + kWarp] : double(negative_infinity<float>());
  const double top = or_zero(warp_max(fmax(low, high)));
  logs = {float(low - top), float(high - top)};
  return top;
}

// From both ends of a sequence, a block each, from chunk to chunk: four threads a state, each a quarter of its arcs.
__global__ void __launch_bounds__(kBridge, 1)
    bridge_kernel(hmm_problem p, Chunks chunks, float *log_partition, int32_t *method) {
  HMM_SHARED_MEMORY(at);
  float *const message = carve<float>(at, kOwn), *const tops = carve<float>(at, kBridge),
               *const sums = carve<float>(at, kBridge);
  const int N = int(p.states), thread = threadIdx.x, lane = thread % kWarp, own = thread % kOwn, share = thread / kOwn;
  const int64_t b = blockIdx.x, P = chunks_of(p), length = p.lengths[b];
  const int64_t count = length > 0 ? (length + p.chunk_frames - 1) / p.chunk_frames : 0;
  const bool from_end = blockIdx.y == 1;
  if (count < 2) {  // the whole block
    if (thread == 0 && !from_end) chunks.done[b] = 0;
    return;
  }
  float arcs[kEach];
  const auto load = [&](int64_t chunk) {
    const float *const matrix = (from_end ? chunks.against : chunks.along) + (b * P + chunk) * N * N;
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const int i = share + k * kShares;
      arcs[k] = i < N && own < N ? matrix[i * N + own] : negative_infinity<float>();
    }
  };
  Pair logs = Pair::of(nullptr, from_end ? N : 1, 0);  // warp 0's; from the front, any row of the first matrix
  double taken = 0;
  const int64_t first = from_end ? count - 1 : 0, end = from_end ? 0 : count, step = from_end ? -1 : 1;
  load(first);
#pragma unroll 1
  for (int64_t chunk = first; chunk != end; chunk += step) {
    const double *const rows = chunks.rows + (b * P + chunk) * N;
    if (thread < kWarp) {
      if (!from_end) taken += add_and_centre(logs, rows, N) + chunks.taken[b * P + chunk];
      logs.put(message, N);
    }
    __syncthreads();
    float top = negative_infinity<float>(), sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const int i = share + k * kShares;
      if (i < N) top = fmax(top, arcs[k] += message[i]);
    }
    const float from = or_zero(top);
#pragma unroll
    for (int k = 0; k < kEach; k++)
      if (share + k * kShares < N) sum += exp(arcs[k] - from);
    tops[thread] = top, sums[thread] = sum;
    if (chunk + step != end) load(chunk + step);
#if HMM_MUTATION != 33
    __syncthreads();
#endif
    if (thread >= kWarp) continue;
    const auto log_sum = [&](int state) {
      float c = negative_infinity<float>(), total = 0;
#pragma unroll
      for (int s = 0; s < kShares; s++) c = fmax(c, tops[s * kOwn + state]);
#pragma unroll
      for (int s = 0; s < kShares; s++) total += sums[s * kOwn + state] * exp(tops[s * kOwn + state] - or_zero(c));
      return total == 0 ? negative_infinity<float>() : or_zero(c) + log(total);
    };
    logs = {log_sum(lane), log_sum(lane + kWarp)};
    if (from_end) {
      add_and_centre(logs, rows, N);
      logs.put(chunks.exit + (b * P + chunk - 1) * N, N);
    } else {
      taken += double(logs.centre());
      if (chunk + 1 != end) logs.put(chunks.entry + (b * P + chunk + 1) * N, N);
    }
  }
  if (from_end || thread >= kWarp) return;  // no barrier follows
  const double z = taken + log(double(warp_sum(exp(logs.low) + exp(logs.high))));
  int32_t flags = 0;
  for (int64_t chunk = lane; chunk < count; chunk += kWarp) flags |= chunks.flags[b * P + chunk];
  const bool far = __any_sync(kAllLanes, flags & kDoesNotMix), lost = __any_sync(kAllLanes, flags & kMayHaveLost);
  if (lane != 0) return;
  const bool done = (!(far && lost) || HMM_MUTATION == 35) && z - z == 0;
  chunks.done[b] = done;
  if (done) log_partition[b] = float(z), method[b] = HMM_CHUNKS;
}

}  // namespace

int transfer(const hmm_problem &p, const Chunks &chunks, float *log_partition, int32_t *method, void *stream) {
  const Sizes o = sizes_of(int(p.states));
  const int status = launch(transfer_kernel, dim3(unsigned(p.batch), unsigned(chunks_of(p))), o.threads,
                            Memory::bytes(o), stream, p, o, chunks);
  if (status) return status;
  return launch(bridge_kernel, dim3(unsigned(p.batch), 2), kBridge,
                carved<float>(kOwn) + 2 * carved<float>(kBridge), stream, p, chunks, log_partition, method);
}

}  // namespace hmm
