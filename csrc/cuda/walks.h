// The frames that a walk goes through: `first`, first + step, ... From both ends, those before meeting(L) belong to the
// first half, which goes on from frame 0, the others to the second one, which comes back from frame L-1; the backward
// pass's walks go from there to the ends.
#pragma once
#include "device.h"

namespace hmm {

struct Walk {
  int64_t first, frames;
  int step;
  bool meets;  // goes on from the other half's last message
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

}  // namespace hmm
