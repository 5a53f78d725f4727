// Runs a kernel's body on several threads and gathers what became of it.
#pragma once
#include "kernels.h"

namespace {

template <class Body> int run(Parallel parallel, int64_t items, int threads, Body &body) {
  const int workers = int(items < threads ? (items > 0 ? items : 1) : threads);
  parallel(workers, [](void *context, int worker, int count) { (*static_cast<Body *>(context))(worker, count); }, &body);
  return body.status;
}

struct Status {
  int status = HMM_OK;
  void out_of_memory() { __atomic_store_n(&status, int(HMM_OUT_OF_MEMORY), __ATOMIC_RELAXED); }
};

}  // namespace
