// The C interface of the kernels for GPUs, with transitions that vary over time in chunks of frames (interface.h).
#include "interface.h"

namespace {

void exercise(int64_t T, int64_t N, int32_t chunk_frames, double scale, double forbidden, int32_t method = HMM_CHUNKS) {
  Exercise<float> e(T, N, kTimeVarying, scale, forbidden);
  e.chunk_frames = chunk_frames;
  e.run(false);
  for (int b : {0, 3}) CHECK(e.method[b] == (e.lengths[b] > chunk_frames ? method : HMM_BOTH_ENDS));
  for (int b : {1, 2, 4}) CHECK(e.method[b] == HMM_BOTH_ENDS);  // shorter than a chunk; without any path
}

}  // namespace

int main() {
  exercise(7, 3, 2, 1, 0), exercise(2, 33, 1, 1, 0);
  exercise(9, 4, 3, 20, 0, HMM_BOTH_ENDS);  // without a certificate
#ifndef __SANITIZE_THREAD__  // the same code, and ThreadSanitizer is slow
  exercise(7, 5, 3, 1, 0.1), exercise(9, 1, 4, 1, 0), exercise(9, 33, 1, 1, 0);
  for (int64_t N : {50, 64}) exercise(12, N, 5, 1, 0.3);
#endif
}
