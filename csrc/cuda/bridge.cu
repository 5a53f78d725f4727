// From chunk to chunk by their transfer matrices (transfer.cu), in log space: the log messages that chunks begin and
// end with, and log Z.
//
//   log a_{c+1}(j) = log sum_i exp(log a_c(i) + log M_c(i, j)),  from any row of M_0;  log Z = log sum of the last a
//   log f_{c-1}(i) = log sum_j exp(log M_c(i, j) + log f_c(j)),  from log f = 0
//
// Two blocks a sequence, one from each end. log M_c(i, j) comes as a float, near 0 where it is near the largest of its
// row, and a double a row and one a matrix, which is what sums over frames are in; log a and log f are centred by them.
// What a chunk reads is asked for a chunk ahead.
// Cost a chunk: N^2 exponentials, 4 N^2 bytes, two barriers; 1,200 to 1,450 cycles (README.md). Limits: as transfer.cu.
// Compiled and executed on the CPU, not timed.
#include "chunks.h"

namespace hmm {
namespace {

constexpr int kBridge = 256, kShares = 4, kOwn = kBridge / kShares, kEach = kOwn / kShares;
static_assert(kOwn == kChunkStates);

// What a matrix has in double, for warp 0: of states lane and lane + 32, and of all. Loaded a chunk ahead.
struct Doubles {
  double low, high, taken;
  static __device__ __forceinline__ Doubles of(const Chunks &chunks, int64_t chunk, int N) {
    const double *const rows = chunks.rows + chunk * N, none = double(negative_infinity<float>());
    const int lane = threadIdx.x % kWarp;
    return {lane < N ? rows[lane] : none, lane + kWarp < N ? rows[lane + kWarp] : none, chunks.taken[chunk]};
  }
  // Adds them to logs, which are centred by their largest as a float: returns what is taken out.
  __device__ __forceinline__ double add_to(Pair &logs) const {
    const double x = double(logs.low) + low, y = double(logs.high) + high;
    const double top = double(or_zero(warp_max(float(fmax(x, y)))));
    logs = {float(x - top), float(y - top)};
    return top;
  }
};

// What a block keeps in shared memory: a message, and of each thread the largest and the sum of its part of a log-sum.
struct Room {
  float *message, *tops, *sums;
  __device__ explicit Room(unsigned char *&at)
      : message(carve<float>(at, kOwn)), tops(carve<float>(at, kBridge)), sums(carve<float>(at, kBridge)) {}
  static constexpr size_t bytes() { return carved<float>(kOwn) + 2 * carved<float>(kBridge); }

  // The log-sum of a state's parts; -inf for what is no state. Without a branch: a lane has two.
  __device__ __forceinline__ float log_sum(int state, int N) const {
    float c = negative_infinity<float>(), total = 0;
#pragma unroll
    for (int s = 0; s < kShares; s++) c = fmax(c, tops[s * kOwn + state]);
    const float from = or_zero(c);
#pragma unroll
    for (int s = 0; s < kShares; s++) total += sums[s * kOwn + state] * exp(tops[s * kOwn + state] - from);
    const float found = from + log(total);
    return state < N ? found : negative_infinity<float>();
  }
};

// A thread's quarter of a row or column of a matrix.
struct Quarter {
  float arcs[kEach];
  // In place of what pads, the last ones.
  __device__ __forceinline__ void load(const float *matrix, int N, int own, int share) {
#pragma unroll
    for (int k = 0; k < kEach; k++) arcs[k] = matrix[unsigned(min(share + k * kShares, N - 1) * N + min(own, N - 1))];
  }
  // Without a branch: what pads a message is -inf.
  __device__ __forceinline__ void sum(const Room &room, int share) {
    float top = negative_infinity<float>(), sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; k++) top = fmax(top, arcs[k] += room.message[share + k * kShares]);
    const float from = or_zero(top);
#pragma unroll
    for (int k = 0; k < kEach; k++) sum += exp(arcs[k] - from);
    room.tops[threadIdx.x] = top, room.sums[threadIdx.x] = sum;
  }
};

// Is a sequence whose log Z is `z` certain to be exact in chunks? For a warp.
__device__ __forceinline__ bool certified(const int32_t *flags, int64_t count, float z) {
  int32_t all = 0;
  for (int64_t chunk = threadIdx.x % kWarp; chunk < count; chunk += kWarp) all |= flags[chunk];
  const bool far = __any_sync(kAllLanes, all & kDoesNotMix), lost = __any_sync(kAllLanes, all & kMayHaveLost);
  return (!(far && lost) || HMM_DEFECT(35)) && z - z == 0;
}

// From both ends of a sequence, a block each: four threads a state, each a quarter of its arcs.
__global__ void __launch_bounds__(kBridge, 1)
    bridge_kernel(hmm_problem p, Chunks chunks, float *log_partition, int32_t *method) {
  HMM_SHARED_MEMORY(at);
  const Room room(at);
  const int N = int(p.states), thread = threadIdx.x, own = thread % kOwn, share = thread / kOwn;
  const int64_t b = blockIdx.x, P = chunks_of(p), length = p.lengths[b];
  const int64_t count = length > 0 ? (length + p.chunk_frames - 1) / p.chunk_frames : 0;
  const bool from_end = blockIdx.y == 1;
  if (count < 2) {  // the whole block
    if (thread == 0 && !from_end) chunks.done[b] = 0;
    return;
  }
  Pair logs = Pair::of(nullptr, from_end ? N : 1, 0);  // warp 0's; from the front, any row of the first matrix
  double taken = 0;
  const int64_t first = from_end ? count - 1 : 0, end = from_end ? 0 : count, step = from_end ? -1 : 1;
  const float *matrix = (from_end ? chunks.against : chunks.along) + (b * P + first) * N * N;
  Quarter arcs;
  Doubles ahead = {};
  const auto load = [&](int64_t chunk) {
    arcs.load(matrix, N, own, share);
    matrix += step * N * N;
    if (thread < kWarp) ahead = Doubles::of(chunks, b * P + chunk, N);
  };
  load(first);
#pragma unroll 1
  for (int64_t chunk = first; chunk != end; chunk += step) {
    const Doubles now = ahead;
    if (thread < kWarp) {
      if (!from_end) taken += now.add_to(logs) + now.taken;
      logs.put(room.message, kOwn);
    }
    __syncthreads();
    arcs.sum(room, share);
    if (chunk + step != end) load(chunk + step);
    if (!HMM_DEFECT(33)) __syncthreads();
    if (thread >= kWarp) continue;
    logs = {room.log_sum(thread, N), room.log_sum(thread + kWarp, N)};
    if (from_end) {
      now.add_to(logs);
      logs.put(chunks.exit + (b * P + chunk - 1) * N, N);
    } else {
      taken += double(logs.centre());
      if (chunk + 1 != end) logs.put(chunks.entry + (b * P + chunk + 1) * N, N);
    }
  }
  if (from_end || thread >= kWarp) return;  // no barrier follows
  const float z = float(taken + log(double(warp_sum(exp(logs.low) + exp(logs.high)))));
  const bool done = certified(chunks.flags + b * P, count, z);
  if (thread != 0) return;
  chunks.done[b] = done;
  if (done) log_partition[b] = z, method[b] = HMM_CHUNKS;
}

}  // namespace

int bridge(const hmm_problem &p, const Chunks &chunks, float *log_partition, int32_t *method, void *stream) {
  return launch(bridge_kernel, dim3(unsigned(p.batch), 2), kBridge, Room::bytes(), stream, p, chunks,
                log_partition, method);
}

}  // namespace hmm
