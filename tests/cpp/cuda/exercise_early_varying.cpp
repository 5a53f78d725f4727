// The C interface of the kernels for GPUs, with transitions that vary over time in chunks that begin early (interface.h).
#include "interface.h"

namespace {

// Scores that are small are forgotten soon: in 8 frames, twice as many in double precision.
template <class Real> void exercise(int64_t T, int64_t N, int32_t chunk_frames, int32_t warm_up, int32_t warm_up_back, double scale = 0.05) {
  Exercise<Real> e(T, N, kTimeVarying, scale, 0);
  e.chunk_frames = chunk_frames, e.warm_up = warm_up, e.warm_up_back = warm_up_back;
  e.run(false);
  const int32_t expected = warm_up > 1 ? HMM_LOG_SPACE : HMM_BOTH_ENDS;
  for (int b : {0, 3}) CHECK(e.method[b] == expected);
  CHECK(e.method[1] == HMM_BOTH_ENDS && e.method[2] == HMM_LOG_SPACE && e.method[4] == HMM_BOTH_ENDS);  // of one chunk; no path
}

}  // namespace

int main() {
  exercise<float>(14, 9, 4, 8, 8);
  exercise<float>(11, 3, 4, 1, 1, 1), exercise<float>(14, 3, 4, 8, 1, 0.1);  // neither meets, or not backward
  exercise<float>(5, 131, 3, 2, 2, 1e-4);
#ifndef __SANITIZE_THREAD__  // the same code, and ThreadSanitizer is slow
  exercise<float>(9, 50, 3, 5, 5, 0.005), exercise<float>(5, 1, 1, 2, 1), exercise<float>(5, 515, 3, 2, 2, 1e-5);
  exercise<double>(15, 5, 2, 9, 9, 0.005), exercise<double>(5, 131, 3, 2, 2, 1e-8), exercise<double>(5, 513, 3, 2, 2, 1e-9);
#endif
}
