// The C interface: checks sizes, picks the instruction set once, sorts the batch by length, runs threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "kernels.h"

namespace {

const InstructionSet &chosen() {
  static const InstructionSet *set = [] {
    // HMM_SPEECH_ISA=avx2 or portable runs less than the CPU has, for tests and comparisons.
    const char *named = std::getenv("HMM_SPEECH_ISA");
    [[maybe_unused]] const std::string wish = named ? named : "";
#ifdef HMM_AVX512
    if ((wish.empty() || wish == "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return &hmm_avx512;
#endif
#ifdef HMM_AVX2
    if (wish != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &hmm_avx2;
#endif
    return &hmm_portable;
  }();
  return *set;
}

// libgomp's entry to a parallel region, which LLVM's and Intel's OpenMP have under the same name. This library links no OpenMP:
// torch has brought one, and its idle threads spin for milliseconds after each of torch's own regions. Threads beside them
// would wait for a core; asking those very threads costs a microsecond. 0 where the process has none, and after a fork, which
// leaves a child a team without its threads.
using Region = void (*)(void (*)(void *), void *, unsigned, unsigned);

bool forked = false;

Region torchs_region() {
#if defined(__unix__) || defined(__APPLE__)
  static const Region region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const bool registered = [] { return !pthread_atfork(nullptr, nullptr, [] { forked = true; }); }();
  return registered && !forked ? region : nullptr;
#else
  return nullptr;
#endif
}

// Each share of the work is claimed by whichever thread is free, so that a thread that the system starts late costs no more
// than its help, and a team that has fewer threads than asked for (a region within a region) does all of it. Who computes a
// share does not change its numbers.
void parallel(int workers, void (*body)(void *, int, int), void *context) {
  std::atomic<int> next{0};
  auto work = [&] {
    for (int worker; (worker = next.fetch_add(1, std::memory_order_relaxed)) < workers;) body(context, worker, workers);
  };
  if (workers < 2) return work();
  if (const Region region = torchs_region())
    return region([](void *w) { (*static_cast<decltype(work) *>(w))(); }, &work, unsigned(workers), 0);
  std::vector<std::thread> others;  // for one call: starting one takes about 10 us, and a fork finds none
  others.reserve(workers);
  try {
    for (int k = 1; k < workers; k++) others.emplace_back(work);
  } catch (...) {  // no thread or no memory to be had: the threads that there are do the rest
  }
  work();
  for (std::thread &t : others) t.join();
}

bool valid(const hmm_problem *p) {
  if (!p || p->batch < 0 || p->time < 0 || p->states < 1 || p->threads < 1) return false;
  if (p->batch > 0 && (!p->initial || !p->lengths || (p->time > 1 && !p->transition))) return false;
  return std::all_of(p->lengths, p->lengths + p->batch, [&](int64_t n) { return n >= 0 && n <= p->time; });
}

bool valid(const hmm_semi_markov *p) {
  if (!p || p->batch < 0 || p->time < 0 || p->states < 1 || p->max_duration < 1 || p->threads < 1) return false;
  if (p->batch > 0 && (!p->initial || !p->lengths || !p->transition || !p->durations || (p->time > 0 && !p->emission))) return false;
  return std::all_of(p->lengths, p->lengths + p->batch, [&](int64_t n) { return n >= 0 && n <= p->time; });
}

// Whether all ids within the lengths are below N. They are addresses, and not every caller has looked at them: a graph that
// was compiled cannot. One sweep without a branch, 8 bytes a slot beside K reads of arcs.
bool names_states(const hmm_active_problem &p) {
  uint64_t wrong = 0;  // its sign
  for (int64_t b = 0; b < p.batch; b++) {
    const int64_t *id = p.active + b * p.time * p.slots;
    for (int64_t k = 0; k < p.lengths[b] * p.slots; k++) wrong |= id[k] < 0 ? 0 : uint64_t(p.states - 1) - uint64_t(id[k]);
  }
  return wrong >> 63 == 0;
}

bool valid(const hmm_active_problem *p) {
  if (!p || p->batch < 0 || p->time < 0 || p->states < 1 || p->slots < 1 || p->threads < 1) return false;
  if (p->batch > 0 && (!p->initial || !p->lengths || !p->transition)) return false;
  if (p->batch > 0 && p->time > 0 && (!p->active || !p->emission)) return false;
  return std::all_of(p->lengths, p->lengths + p->batch, [&](int64_t n) { return n >= 0 && n <= p->time; }) &&
         names_states(*p);
}

template <class Problem> std::vector<int64_t> by_falling_length(const Problem &p) {
  std::vector<int64_t> order(p.batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.lengths[a] > p.lengths[b]; });
  return order;
}

// Asks for huge pages before the first touch of fresh memory. Faulting in 4 kB pages is otherwise the largest cost of a
// dense backward pass: its gradient of 240 MB at B=8, T=3000, N=50 takes 60,000 faults. The pages at both ends are asked
// for as a whole: the system gives them where nothing else lies there yet, and where something does it stays as it is.
void advise_huge_pages(void *data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const uintptr_t begin = uintptr_t(data) / huge * huge, end = (uintptr_t(data) + bytes + huge - 1) / huge * huge;
  if (data && bytes >= huge / 2) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);  // only advice
#endif
}

size_t messages(const hmm_problem &p) { return size_t(p.batch) * size_t(p.time) * size_t(p.states); }

size_t messages(const hmm_active_problem &p) { return size_t(p.batch) * size_t(p.time) * size_t(p.slots); }

bool valid(const hmm_banded *p) {
  return p && valid(&p->chain) && p->diagonals >= 1 && p->offsets && (!p->chain.batch || !p->chain.time || p->chain.emission);
}

bool valid(const hmm_low_rank *p) {
  return p && valid(&p->chain) && p->rank >= 1 && (!p->chain.batch || (p->shift && (!p->chain.time || p->chain.emission)));
}

size_t edge_numbers(const hmm_problem &p) {
  const size_t arcs = size_t(p.states) * size_t(p.states);
  if (p.time_varying) return p.time > 1 ? size_t(p.batch) * size_t(p.time - 1) * arcs : 0;
  return p.transition_batch_stride ? size_t(p.batch) * arcs : arcs;
}

template <class Problem, class Body> int guarded(const Problem *p, Body body) {
  if (!valid(p)) return HMM_INVALID_ARGUMENT;
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return HMM_OUT_OF_MEMORY;
  }
}

}  // namespace

#define HMM_DEFINE(suffix, Real)                                                                                        \
  int hmm_forward_##suffix(const hmm_problem *p, Real *log_partition, Real *alpha, Real *norm, Real *centre,            \
                           int32_t *method) {                                                                           \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(alpha, messages(*p) * sizeof(Real));                                                            \
      if (p->time_varying) advise_huge_pages(norm, messages(*p) * sizeof(Real));                                        \
      return chosen().suffix.forward(*p, by_falling_length(*p).data(), parallel, log_partition, alpha, norm, centre,    \
                                     method);                                                                           \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_backward_##suffix(const hmm_problem *p, const Real *grad, const Real *log_partition, const Real *alpha,       \
                            const Real *norm, const Real *centre, const int32_t *method, Real *state, Real *edge) {     \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(state, messages(*p) * sizeof(Real));                                                            \
      if (edge) advise_huge_pages(edge, edge_numbers(*p) * sizeof(Real));                                               \
      return chosen().suffix.backward(*p, by_falling_length(*p).data(), parallel, grad, log_partition, alpha, norm,     \
                                      centre, method, state, edge);                                                     \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_viterbi_##suffix(const hmm_problem *p, Real *score, Real *delta, int64_t *states) {                           \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(delta, messages(*p) * sizeof(Real));                                                            \
      return chosen().suffix.viterbi(*p, by_falling_length(*p).data(), parallel, score, delta, states);                 \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_topk_##suffix(const hmm_problem *p, int64_t k, Real *score, int64_t *states) {                                \
    return guarded(p, [&] {                                                                                             \
      return chosen().suffix.topk(*p, by_falling_length(*p).data(), parallel, k, score, states);                        \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_sample_##suffix(const hmm_problem *p, int64_t samples, const Real *log_partition, const Real *alpha,          \
                          const int32_t *method, const Real *uniform, int64_t *states) {                                \
    return guarded(p, [&] {                                                                                             \
      return chosen().suffix.sample(*p, parallel, samples, log_partition, alpha, method, uniform, states);              \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_tangent_##suffix(const hmm_problem *p, const Real *grad, const Real *direction_state,                         \
                           const Real *direction_edge, Real *expected, Real *state, Real *edge) {                       \
    return guarded(p, [&] {                                                                                             \
      if (edge) advise_huge_pages(edge, edge_numbers(*p) * sizeof(Real));                                               \
      return chosen().suffix.tangent(*p, parallel, grad, direction_state, direction_edge, expected, state, edge);       \
    });                                                                                                                 \
  }

#define HMM_DEFINE_SEMI_MARKOV(suffix, Real)                                                                            \
  int hmm_semi_markov_forward_##suffix(const hmm_semi_markov *p, Real *log_partition, double *messages, double *centre) { \
    return guarded(p, [&] {                                                                                             \
      return chosen().semi_markov_##suffix.forward(*p, by_falling_length(*p).data(), parallel, log_partition, messages, \
                                                   centre);                                                             \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_semi_markov_backward_##suffix(const hmm_semi_markov *p, const Real *grad, const Real *log_partition,          \
                                        const double *messages, const double *centre, Real *state, Real *starts,        \
                                        Real *arcs, Real *durations) {                                                  \
    return guarded(p, [&] {                                                                                             \
      return chosen().semi_markov_##suffix.backward(*p, by_falling_length(*p).data(), parallel, grad, log_partition,    \
                                                    messages, centre, state, starts, arcs, durations);                  \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_semi_markov_viterbi_##suffix(const hmm_semi_markov *p, Real *score, double *messages, double *centre,         \
                                       int64_t *states, uint8_t *starts) {                                              \
    return guarded(p, [&] {                                                                                             \
      return chosen().semi_markov_##suffix.viterbi(*p, by_falling_length(*p).data(), parallel, score, messages, centre, \
                                                   states, starts);                                                     \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_semi_markov_sample_##suffix(const hmm_semi_markov *p, int64_t samples, const Real *log_partition,             \
                                      const double *messages, const double *centre, const double *uniform,              \
                                      int64_t *states, uint8_t *starts) {                                               \
    return guarded(p, [&] {                                                                                             \
      return chosen().semi_markov_##suffix.sample(*p, parallel, samples, log_partition, messages, centre, uniform,      \
                                                  states, starts);                                                      \
    });                                                                                                                 \
  }

#define HMM_DEFINE_ACTIVE(suffix, Real)                                                                                 \
  int hmm_active_forward_##suffix(const hmm_active_problem *p, Real *log_partition, Real *alpha, int32_t *method) {     \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(alpha, messages(*p) * sizeof(Real));                                                            \
      return chosen().active_##suffix.forward(*p, by_falling_length(*p).data(), parallel, log_partition, alpha, method); \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_active_backward_##suffix(const hmm_active_problem *p, const Real *grad, const Real *alpha,                    \
                                   const int32_t *method, Real *state, Real *edge, int64_t edge_batch_stride) {         \
    return guarded(p, [&] {                                                                                             \
      const size_t blocks = edge_batch_stride ? size_t(p->batch) : 1;                                                   \
      advise_huge_pages(state, messages(*p) * sizeof(Real));                                                            \
      if (edge) advise_huge_pages(edge, blocks * size_t(p->states) * size_t(p->states) * sizeof(Real));                 \
      return chosen().active_##suffix.backward(*p, by_falling_length(*p).data(), parallel, grad, alpha, method, state,  \
                                               edge, edge_batch_stride);                                                \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_active_viterbi_##suffix(const hmm_active_problem *p, Real *score, Real *back, int64_t *states) {              \
    return guarded(p, [&] {                                                                                             \
      return chosen().active_##suffix.viterbi(*p, by_falling_length(*p).data(), parallel, score, back, states);         \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_active_sample_##suffix(const hmm_active_problem *p, int64_t samples, const Real *log_partition,               \
                                 const Real *alpha, const int32_t *method, const Real *uniform, int64_t *states) {      \
    return guarded(p, [&] {                                                                                             \
      return chosen().active_##suffix.sample(*p, by_falling_length(*p).data(), parallel, samples, log_partition, alpha, \
                                             method, uniform, states);                                                  \
    });                                                                                                                 \
  }

#define HMM_DEFINE_BANDED(suffix, Real)                                                                                 \
  int hmm_banded_forward_##suffix(const hmm_banded *p, Real *log_partition, double *alpha, double *centre) {            \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(alpha, size_t(p->chain.batch) * p->chain.time * p->chain.states * sizeof(double));              \
      return chosen().suffix.banded.forward(*p, by_falling_length(p->chain).data(), parallel, log_partition, alpha,     \
                                            centre);                                                                    \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_banded_backward_##suffix(const hmm_banded *p, const Real *grad, const Real *log_partition,                    \
                                   const double *alpha, const double *centre, Real *state, Real *edge) {                \
    return guarded(p, [&] {                                                                                             \
      return chosen().suffix.banded.backward(*p, by_falling_length(p->chain).data(), parallel, grad, log_partition,     \
                                             alpha, centre, state, edge);                                               \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_banded_viterbi_##suffix(const hmm_banded *p, Real *score, double *delta, int64_t *states) {                   \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(delta, size_t(p->chain.batch) * p->chain.time * p->chain.states * sizeof(double));              \
      return chosen().suffix.banded.viterbi(*p, parallel, score, delta, states);                                        \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_banded_sample_##suffix(const hmm_banded *p, int64_t samples, const Real *log_partition, const double *alpha,  \
                                 const Real *uniform, int64_t *states) {                                                \
    return guarded(p, [&] {                                                                                             \
      return chosen().suffix.banded.sample(*p, parallel, samples, log_partition, alpha, uniform, states);               \
    });                                                                                                                 \
  }

#define HMM_DEFINE_LOW_RANK(suffix, Real)                                                                               \
  int hmm_low_rank_forward_##suffix(const hmm_low_rank *p, double *log_partition, Real *alpha, Real *half,              \
                                    int32_t *method) {                                                                  \
    return guarded(p, [&] {                                                                                             \
      advise_huge_pages(alpha, size_t(p->chain.batch) * p->chain.time * p->chain.states * sizeof(Real));                \
      return chosen().suffix.low_rank.forward(*p, by_falling_length(p->chain).data(), parallel, log_partition, alpha,   \
                                              half, method);                                                            \
    });                                                                                                                 \
  }                                                                                                                     \
  int hmm_low_rank_backward_##suffix(const hmm_low_rank *p, const Real *grad, const Real *alpha, const int32_t *method, \
                                     Real *state, Real *classes, Real *leaving) {                                       \
    return guarded(p, [&] {                                                                                             \
      for (Real *x : {state, leaving})                                                                                  \
        advise_huge_pages(x, size_t(p->chain.batch) * p->chain.time * p->chain.states * sizeof(Real));                  \
      return chosen().suffix.low_rank.backward(*p, by_falling_length(p->chain).data(), parallel, grad, alpha, method,   \
                                               state, classes, leaving);                                                \
    });                                                                                                                 \
  }

extern "C" {
HMM_DEFINE(f32, float)
HMM_DEFINE(f64, double)
HMM_DEFINE_SEMI_MARKOV(f32, float)
HMM_DEFINE_SEMI_MARKOV(f64, double)
HMM_DEFINE_ACTIVE(f32, float)
HMM_DEFINE_ACTIVE(f64, double)
HMM_DEFINE_BANDED(f32, float)
HMM_DEFINE_BANDED(f64, double)
HMM_DEFINE_LOW_RANK(f32, float)
HMM_DEFINE_LOW_RANK(f64, double)

int hmm_abi_version(void) { return HMM_ABI_VERSION; }

const char *hmm_instruction_set(void) { return chosen().name; }

const char *hmm_status_message(int status) {
  switch (status) {
    case HMM_OK: return "ok";
    case HMM_INVALID_ARGUMENT: return "invalid argument (sizes, lengths, states out of range or a null pointer)";
    case HMM_OUT_OF_MEMORY: return "out of memory";
    default: return status >= HMM_CUDA_ERROR ? "CUDA error (the status less 1000)" : "unknown status";
  }
}
}
