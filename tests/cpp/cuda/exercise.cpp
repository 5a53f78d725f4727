// The C interface of the kernels for GPUs, with every kind of transitions (interface.h).
#include "interface.h"

namespace {

template <class Real> void exercise() {
  for (Kind kind : {kShared, kPerSequence, kTimeVarying}) {
    for (int64_t N : {1, 33}) Exercise<Real>(3, N, kind, 1, 0).run();
    Exercise<Real>(6, 3, kind, 1, 0.3).run(), Exercise<Real>(5, 3, kind, 200, 0.3).run();
  }
  Exercise<Real>(3, 70, kShared, 1, 0.3).run();
}

}  // namespace

int main() {
  exercise<float>();
#ifndef __SANITIZE_THREAD__  // the same code, and ThreadSanitizer is slow
  exercise<double>();
#endif
}
