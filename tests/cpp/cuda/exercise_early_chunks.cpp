// The C interface of the kernels for GPUs, with transitions that do not vary in chunks that begin early (interface.h).
#include "interface.h"

namespace {

// Scores that are small are forgotten soon: in 8 frames, twice as many in double precision.
template <class Real> void exercise(int64_t N, Kind kind, int32_t chunk_frames, int32_t warm_up, int32_t warm_up_back, double scale = 0.05) {
  Exercise<Real> e(3 * chunk_frames + 2, N, kind, scale, 0);
  e.chunk_frames = chunk_frames, e.warm_up = warm_up, e.warm_up_back = warm_up_back;
  e.run(false);
  const int32_t expected = warm_up > 1 ? HMM_SCALED : HMM_BOTH_ENDS;
  for (int b : {0, 3}) CHECK(e.method[b] == expected);
  CHECK(e.method[2] == HMM_SCALED);  // of one chunk
}

}  // namespace

int main() {
  exercise<float>(9, kShared, 4, 8, 8);
  exercise<float>(3, kShared, 4, 1, 1, 1), exercise<float>(3, kShared, 4, 8, 1, 0.1);  // neither meets, or not backward
  exercise<float>(131, kShared, 1, 4, 4, 0.005);
#ifndef __SANITIZE_THREAD__  // the same code, and ThreadSanitizer is slow
  exercise<float>(33, kPerSequence, 3, 8, 8), exercise<float>(128, kShared, 2, 7, 7), exercise<float>(1, kShared, 1, 2, 1);
  for (int64_t N : {5, 50, 96}) exercise<double>(N, kShared, 5, 16, 16);
#endif
}
