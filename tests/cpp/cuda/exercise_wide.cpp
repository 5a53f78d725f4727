// The walks of wide.cu (interface.h), on devices with more or less shared memory, and with one sequence a block or two.
#include "interface.h"
#include "on_cpu.h"

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr std::initializer_list<int64_t> kSizes = {129, 131, 160, 200, 255};

// A chain that stays in a state or goes to the next one. Far apart: in frame 1, between others that say nothing, states
// that can be reached have weights that scaled probabilities do not keep, which nothing but a search for them shows.
void chain(int64_t T, int64_t N, bool far_apart) {
  Exercise<float> e(T, N, kShared, 1, 0);
  for (int64_t i = 0; i < N; i++)
    for (int64_t j = 0; j < N; j++)
      if (j != i && j != i + 1) e.transition[i * N + j] = kForbidden;
  for (int64_t b = 0; b < 4; b++)
    for (int64_t t = 0; t < e.lengths[b]; t++)
      for (int64_t j = 0; far_apart && j < N; j++) e.emission[(b * T + t) * N + j] *= t == 1 ? 500 : 0;
  for (int64_t b = 0; b < e.B; b++)
    for (int64_t j = 1; !far_apart && j < N; j++) e.initial[b * N + j] = kForbidden;
  e.run(false);
  for (int64_t b = 0; b < 4; b++) CHECK(e.method[b] == (far_apart && e.lengths[b] > 1 ? HMM_REDONE : HMM_BOTH_ENDS));
}

void exercise(int kilobytes, int multiprocessors, std::initializer_list<int64_t> sizes = {}) {
  on_cpu::shared_memory_limit = kilobytes * 1024, on_cpu::multiprocessors = multiprocessors;
  chain(4, 131, true);
  Exercise<float>(3, 256, kShared, 1, 0).run(false);
#ifndef __SANITIZE_THREAD__  // the same code, and ThreadSanitizer is slow
  for (int64_t N : sizes) Exercise<float>(4, N, kShared, 1, N % 2 ? 0.3 : 0).run(false);
  Exercise<float>(3, 210, kPerSequence, 1, 0.3).run(false);
  Exercise<float>(3, 170, kShared, 300, 0.3).run(false);
  chain(5, 177, false);
#endif
}

}  // namespace

int main() {
  exercise(64, 68, kSizes);
  exercise(99, 1, kSizes);
#ifndef __SANITIZE_THREAD__
  exercise(163, 5), exercise(99, 68), exercise(227, 68), exercise(32, 68), exercise(64, 1);
#endif
}
