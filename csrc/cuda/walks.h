// The frames that a walk goes through: `first`, first + step, ... From both ends, those before meeting(L) belong to the
// first half, which goes on from frame 0, the others to the second one, which comes back from frame L-1; the backward
// pass's walks go from there to the ends. In chunks of p.chunk_frames, each begins p.warm_up frames before its own.
#pragma once
#include "device.h"

namespace hmm {

struct Walk {
  int64_t first, frames;
  int step;
  bool meets;  // goes on from the other half's last message
  int64_t warm_up = 0;  // frames of another chunk, which come first
};
__host__ __device__ inline int64_t meeting(int64_t length, bool both) { return both ? (length + 1) / 2 : length; }
__device__ __forceinline__ Walk walk_from_ends(int64_t length, bool both, bool second) {
  const int64_t middle = meeting(length, both);
  return second ? Walk{length - 1, length - middle, -1, false} : Walk{0, middle, 1, false};
}
__device__ __forceinline__ Walk walk_to_ends(int64_t length, bool both, bool second) {
  const int64_t middle = meeting(length, both);
  return second ? Walk{middle, length - middle, 1, true} : Walk{middle - 1, middle, -1, middle < length};
}

// Of p.time frames; a sequence may have fewer, and a walk no frames where it has none.
__host__ __device__ inline int64_t chunks_of(const hmm_problem &p) {
  return (p.time + p.chunk_frames - 1) / p.chunk_frames;
}
__device__ __forceinline__ Walk walk_along_chunk(const hmm_problem &p, int64_t length, int64_t chunk) {
  const int64_t own = chunk * p.chunk_frames, end = min(own + p.chunk_frames, length);
  const int64_t first = own > p.warm_up ? own - p.warm_up : 0;
  return Walk{first, own < end ? end - first : 0, 1, false, own - first};
}
__device__ __forceinline__ Walk walk_back_in_chunk(const hmm_problem &p, int64_t length, int64_t chunk) {
  const int64_t last = chunk * p.chunk_frames, own = min(last + p.chunk_frames, length) - 1;
  const int64_t first = min(own + p.warm_up, length - 1);
  return Walk{first, last <= own ? first - last + 1 : 0, -1, false, first - own};
}

}  // namespace hmm
