// What the kernels of a walk that goes a step at a time read in device memory: a struct whose first member is `first`,
// the number of the step that is step 0 of a call. The call that begins a pass writes it, so that the launches of steps
// are the same whatever the pass is over, and a CUDA graph of them serves every pass over as many sequences and states
// (hmm_speech/hmm/cuda_graphs.py); behind its steps a graph adds their count to `first`.
#pragma once
#include "device.h"

namespace hmm {

template <class Walked> __global__ void __launch_bounds__(kWarp) begin_kernel(Walked walked, Walked *held) {
  if (threadIdx.x == 0) *held = walked;
}

template <class Walked> int begin_walk(const Walked &walked, void *held, void *stream) {
  static_assert(sizeof(Walked) <= HMM_CUDA_WALK_BYTES);
  return launch(begin_kernel<Walked>, dim3(1), kWarp, 0, stream, walked, static_cast<Walked *>(held));
}

}  // namespace hmm
