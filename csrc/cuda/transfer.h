// What the threads of transfer.cu have in registers: arcs of a frame on their way to B_t, a tile of M, and the extremes
// that its certificates rest on.
#pragma once
#include "chunks.h"

namespace hmm {
namespace {

constexpr int kMost = 256, kWarps = kMost / kWarp, kEvery = 4;  // threads, warps; frames to a rescale
constexpr int kRowBits = 90, kMostUp = 120;  // where rows begin; more would be no float
constexpr float kMixingNats = 18, kArcNats = 69, kSmallestEntry = 0x1p-26f;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kFewStates = 52;  // whose tiles have three rows

// What up to `States` states, kFewStates or kChunkStates, take. B_t lies by rows; M by columns, in which a tile's rows
// are four numbers.
template <int States> struct Shape {
  static constexpr int kRows = States / 4;                   // of a column of B_t, a thread's
  static constexpr int kTall = States <= kFewStates ? 3 : 4;  // rows of a tile of M, which has four columns
  static constexpr int kTiles = (States - 1) / kTall + 1;    // one above the other
  static constexpr int kPitch = States, kColumn = 4 * kTiles;  // numbers to the next row of B_t, column of M
  static __device__ __forceinline__ int place(int row) { return row / kTall * 4 + row % kTall; }  // in a column

  // How a block shares N states: M in tiles, B_t by columns in `groups`, of kRows rows each.
  struct Sizes {
    int tile_rows, tile_columns, groups, threads;
  };
  static Sizes sizes_of(int N) {
    Sizes o = {};
    o.tile_rows = (N - 1) / kTall + 1, o.tile_columns = (N - 1) / 4 + 1, o.groups = (N - 1) / kRows + 1;
    o.threads = (max(o.tile_rows * o.tile_columns, N * o.groups) + kWarp - 1) / kWarp * kWarp;
    return o;
  }
};

// The certificates' numbers, of a thread.
struct Extremes {
  float lowest_arc = 0;  // below the largest of its frame
  // As bits, which are in the order of numbers of one sign: of allowed log B_t, the lowest less -inf; of the entries
  // of M above 0, the smallest, less one, which makes 0 the largest.
  unsigned lowest = 0, smallest = 0xffffffffu;

  static __device__ __forceinline__ unsigned bits(float x) { return unsigned(__float_as_int(x)); }
  static __device__ __forceinline__ unsigned above_forbidden(float x) { return bits(x) - 0xff800000u; }
  static __device__ __forceinline__ unsigned zero_above_all(float x) { return bits(x) - 1u; }
  __device__ __forceinline__ void arc(float below, float log_b) {
    lowest_arc = fmin(lowest_arc, below), lowest = max(lowest, above_forbidden(log_b));
  }
  __device__ __forceinline__ void entry(float x) { smallest = min(smallest, zero_above_all(x)); }
  __device__ __forceinline__ int32_t flags() const {
    const bool far = !(lowest_arc >= -kMixingNats),
               lost = lowest > above_forbidden(-kArcNats) || smallest < zero_above_all(kSmallestEntry);
    const bool any_far = __any_sync(kAllLanes, far), any_lost = __any_sync(kAllLanes, lost);
    return (any_far ? kDoesNotMix : 0) | (any_lost ? kMayHaveLost : 0);
  }
};

// The arcs of a frame that are this thread's: of column `column`, kRows rows from `row` on.
template <int kRows> struct Held {
  float scores[kRows];

  // In place of what is behind the last row, that: no extreme.
  __device__ __forceinline__ void load(const float *arcs, int N, int row, int column) {
#pragma unroll
    for (int k = 0; k < kRows; k++) scores[k] = arcs[unsigned(min(row + k, N - 1) * N + column)];
  }
  __device__ __forceinline__ void none() {
#pragma unroll
    for (int k = 0; k < kRows; k++) scores[k] = 0;
  }
  __device__ __forceinline__ float top() const {
    float found = scores[0];
#pragma unroll
    for (int k = 1; k < kRows; k++) found = fmax(found, scores[k]);
    return found;
  }
  // B_t to shared memory, without a branch: there is room behind the last row.
  __device__ __forceinline__ void exponentiate(float *to, int pitch, float top, float weight, Extremes &found) const {
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      const float below = scores[k] - top, x = below + weight;
      found.arc(below, x);
      to[k * pitch] = exp(x);
    }
  }
};

// Of numbers that are not negative: 2^exponent is at most x, -127 for those below 2^-126; and 2^k, k from -126 to 127.
__device__ __forceinline__ int exponent_of(float x) { return (__float_as_int(x) >> 23) - 127; }
__device__ __forceinline__ float power_of_2(int k) { return __int_as_float((k + 127) << 23); }

// kTall x 4 numbers of M. Tiles are counted: `row` of them are above it, and `column` to its left.
template <int States> struct Tile {
  using S = Shape<States>;
  static constexpr int kTall = S::kTall;
  float sums[kTall][4];  // row, column

  static __device__ __forceinline__ float4 together(const float (&x)[kTall]) {
    return {x[0], x[1], x[2], kTall > 3 ? x[kTall - 1] : 0.0f};
  }
  __device__ __forceinline__ void multiply(const float *matrix, const float *arcs, int N, int row, int column) {
    const float4 *left = reinterpret_cast<const float4 *>(matrix) + row,
                 *right = reinterpret_cast<const float4 *>(arcs) + column;
#pragma unroll
    for (int r = 0; r < kTall; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[r][c] = 0;
#pragma unroll 4
    for (int k = 0; k < N; k++) {
      const float4 a = left[k * (S::kColumn / 4)], b = right[k * (S::kPitch / 4)];
      const float of_rows[4] = {a.x, a.y, a.z, a.w}, of_columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < kTall; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[r][c] += of_rows[r] * of_columns[c];
    }
  }
  // Times 2^up of each row. A number that is lost by that counts as it was.
  __device__ __forceinline__ void rescale(const int (&up)[kTall], Extremes &found) {
#pragma unroll
    for (int r = 0; r < kTall; r++) {
      const float scale = power_of_2(up[r]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float x = sums[r][c];
        sums[r][c] = x * scale;
        found.entry(sums[r][c] > 0 ? sums[r][c] : x);
      }
    }
  }
  __device__ __forceinline__ void note(Extremes &found) const {
#pragma unroll
    for (int r = 0; r < kTall; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) found.entry(sums[r][c]);
  }
  __device__ __forceinline__ void put(float *matrix, int row, int column) const {
    float4 *const to = reinterpret_cast<float4 *>(matrix) + row;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float of_rows[kTall];
#pragma unroll
      for (int r = 0; r < kTall; r++) of_rows[r] = sums[r][c];
      to[(4 * column + c) * (S::kColumn / 4)] = together(of_rows);
    }
  }
  // The largest of each row.
  __device__ __forceinline__ void put_tallest(float *tallest, int row, int column) const {
    float of_rows[kTall];
#pragma unroll
    for (int r = 0; r < kTall; r++) of_rows[r] = fmax(fmax(sums[r][0], sums[r][1]), fmax(sums[r][2], sums[r][3]));
    *reinterpret_cast<float4 *>(tallest + column * S::kColumn + 4 * row) = together(of_rows);
  }
};

}  // namespace
}  // namespace hmm
