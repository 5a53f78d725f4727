// Executes CUDA kernels on the CPU, one fiber a CUDA thread: the same source that nvcc compiles is built by g++ with
// -DHMM_ON_CPU, for its numbers and under ThreadSanitizer (races between the threads of a block, and between blocks) or
// AddressSanitizer (bounds of global memory and of every carved array).
//
//   - Barriers order memory; shuffles and ballots deliberately do not, as on the hardware.
//   - Threads that meet at different barriers or warp operations, or leave while others wait, abort with both lines.
//   - Shared memory begins as NaN, with red zones between the carved arrays; carving more than the launch gave aborts.
//   - copy_async copies as late as the waits allow; a copy that is never waited for aborts.
//   - HMM_SCHEDULE=n (n > 0) resumes threads in a random order, n being the seed; 0 or unset, by index.
//   - on_cpu::shared_memory_limit and multiprocessors are those of the device to be imitated.
//   - HMM_LAUNCHES names a file to which every launch adds its kernel's place in this program, and its shared memory.
//
// Not imitated: the rounding of CUDA's own expf and logf, fences and order between blocks, clusters, tensor cores. x86-64.
#pragma once
#include <dlfcn.h>
#include <math.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#if !defined(__x86_64__)
#error "on_cpu.h: the switch between fibers is written for x86-64"
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void *, unsigned);
void __tsan_set_fiber_name(void *, const char *);
void __tsan_acquire(void *);
void __tsan_release(void *);
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#define ON_CPU_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define ON_CPU_UNSEEN __attribute__((noinline))
#endif

// ---- CUDA's words. __shared__ is left out on purpose: all shared memory is carved.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
template <class T> inline T __ldg(const T *p) { return *p; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;

namespace on_cpu {

constexpr size_t kStack = 64 * 1024, kRedZone = 64, kMostArrays = 64, kMostStacks = 6000;
inline int shared_memory_limit = 64 * 1024;  // of a block: what sm_75 has, the least of all
inline int multiprocessors = 68;

template <class... Numbers> [[noreturn]] void fail(const char *format, Numbers... numbers) {
  fprintf(stderr, "on_cpu: ");
  fprintf(stderr, format, numbers...);
  fprintf(stderr, "\n");
  abort();
}

// While one of these lives, ThreadSanitizer does not look: what is done is ours, not the kernel's.
struct Unseen {
#ifdef __SANITIZE_THREAD__
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Unseen() {}
#endif
};
inline void acquire([[maybe_unused]] void *tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
}
inline void release([[maybe_unused]] void *tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(tag);
#endif
}

struct Copy {
  void *to;
  const void *from;
  int bytes;
};

// Where threads meet: the lanes of one mask of a warp, or all threads of a block.
struct Meeting {
  unsigned arrived = 0;
  uint64_t round = 0;
  int line = 0;
  uint64_t slot[2][32];
  char order[2];
};

struct Block {
  uint3 index;
  unsigned threads, live;
  unsigned char *memory;
  size_t bytes;
  const std::function<void()> *body;
  Meeting barrier;
  std::map<std::pair<unsigned, uint32_t>, Meeting> warps;  // by warp and mask
};

struct Fiber {
  enum { Runs, Waits, Ended } state = Runs;
  uint3 index;
  unsigned number;
  Block *block;
  const Meeting *waits_for = nullptr;
  Meeting *met = nullptr;  // the last one of the warp, and its mask
  uint32_t mask = 0;
  uint64_t round = 0;
  std::vector<Copy> copies;   // begun
  std::vector<int> commits;   // how many each holds
  int uncommitted = 0;
  size_t carved = 0, arrays = 0;
  char *stack = nullptr;
  void *at = nullptr, *sanitizer = nullptr, *fake_stack = nullptr;
  unsigned lane() const { return number % 32; }
};

inline Fiber *current = nullptr;
inline dim3 grid, block;
inline void *scheduler_at, *scheduler_sanitizer, *scheduler_fake_stack;
inline const void *scheduler_stack;
inline size_t scheduler_stack_bytes;
inline char launched, ended;

__attribute__((naked, noinline, used)) inline void switch_stacks(void ** /*from*/, void * /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

ON_CPU_UNSEEN inline void to_scheduler() {
  Fiber *f = current;
#ifdef __SANITIZE_ADDRESS__
  void **fake = f->state == Fiber::Ended ? nullptr : &f->fake_stack;
  __sanitizer_start_switch_fiber(fake, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(scheduler_sanitizer, 1 /* no synchronisation */);
#endif
  switch_stacks(&f->at, scheduler_at);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(f->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

ON_CPU_UNSEEN inline void resume(Fiber &f) {
  current = &f;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStack);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(f.sanitizer, 1);
#endif
  switch_stacks(&scheduler_at, f.at);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

ON_CPU_UNSEEN inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  acquire(&launched);
  (*current->block->body)();
  release(&ended);
  {
    const Unseen unseen;
    if (!current->copies.empty()) fail("thread %u ends before it has waited for its copies", current->number);
    current->state = Fiber::Ended;
    current->block->live--;
  }
  to_scheduler();
  __builtin_trap();
}

// Waits until `expected` threads have come to this meeting; returns the round's number.
ON_CPU_UNSEEN inline uint64_t meet(Meeting &m, unsigned expected, bool orders_memory, const char *what, int line) {
  const uint64_t round = m.round;
  if (!m.arrived) m.line = line;
  else if (m.line != line) fail("%s of lines %d and %d meet", what, m.line, line);
  if (orders_memory) release(&m.order[round & 1]);
  if (++m.arrived == expected) m.arrived = 0, m.round++;
  else {
    current->waits_for = &m, current->round = round, current->state = Fiber::Waits;
    to_scheduler();
  }
  if (orders_memory) acquire(&m.order[round & 1]);
  return round;
}

inline void sync_threads(int line) {
  const Unseen unseen;
  meet(current->block->barrier, current->block->threads, true, "barriers", line);
}

ON_CPU_UNSEEN inline const uint64_t *exchange(unsigned mask, uint64_t value, bool orders_memory, int line) {
  const Unseen unseen;
  if (!(mask >> current->lane() & 1)) fail("lane %u, line %d: the mask is without it", current->lane(), line);
  if (!current->met || current->mask != mask)
    current->met = &current->block->warps[{current->number / 32, mask}], current->mask = mask;
  Meeting &m = *current->met;
  m.slot[m.round & 1][current->lane()] = value;
  return m.slot[meet(m, __builtin_popcount(mask), orders_memory, "warp operations", line) & 1];
}

template <class T> uint64_t bits(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t b = 0;
  memcpy(&b, &x, sizeof x);
  return b;
}
template <class T> ON_CPU_UNSEEN T shuffle(int line, unsigned mask, T x, unsigned from) {
  const uint64_t *slot = exchange(mask, bits(x), false, line);
  const Unseen unseen;
  if (!(mask >> (from & 31) & 1)) fail("line %d: a shuffle reads lane %u, which takes no part", line, from & 31);
  memcpy(&x, &slot[from & 31], sizeof x);
  return x;
}
inline unsigned ballot(int line, unsigned mask, bool vote) {
  const uint64_t *slot = exchange(mask, vote, false, line);
  const Unseen unseen;
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= unsigned(slot[lane] & 1) << lane;
  return votes;
}

// What sets of threads of a block are waiting for, when none can go on.
inline void report(const std::vector<Fiber> &fibers) {
  std::map<int, std::pair<unsigned, unsigned>> lines;
  for (const Fiber &f : fibers)
    if (f.state == Fiber::Waits) {
      auto &seen = lines[f.waits_for->line];
      if (!seen.first++) seen.second = f.number;
    }
  for (const auto &[line, seen] : lines) fprintf(stderr, "  %u threads from %u on wait, line %d\n", seen.first, seen.second, line);
}

// What a fiber runs on; its making is most of the cost of a short kernel.
struct Stack {
  std::unique_ptr<char[]> memory{new char[kStack]};
  void *sanitizer = nullptr;
  Stack() {
#ifdef __SANITIZE_THREAD__
    sanitizer = __tsan_create_fiber(0);
#endif
  }
};
inline std::vector<Stack> spare_stacks;  // of earlier launches

// A stack for a thread of a block, kept in `used`. Reused within a launch it orders two blocks for ThreadSanitizer, which
// takes some 8,000 at most: where there are more threads, the first blocks' are.
inline Stack &take_stack(std::deque<Stack> &used) {
  if (spare_stacks.empty() && used.size() >= kMostStacks) {
    spare_stacks.push_back(std::move(used.front()));
    used.pop_front();
  }
  if (spare_stacks.empty()) spare_stacks.emplace_back();
  used.push_back(std::move(spare_stacks.back()));
  spare_stacks.pop_back();
  return used.back();
}

inline void run_block(Block &b, std::mt19937 *random, std::deque<Stack> &used) {
  std::vector<Fiber> fibers(b.threads);
  std::vector<unsigned> order(b.threads);
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber &f = fibers[i];
    f.number = order[i] = i, f.block = &b;
    f.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    Stack &stack = take_stack(used);
    f.stack = stack.memory.get(), f.sanitizer = stack.sanitizer;
    ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
    void **top = reinterpret_cast<void **>((uintptr_t(f.stack) + kStack) & ~uintptr_t(63));
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(&fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    f.at = top;
#ifdef __SANITIZE_THREAD__
    char name[64];
    snprintf(name, sizeof name, "block %u %u, thread %u", b.index.x, b.index.y, i);
    __tsan_set_fiber_name(f.sanitizer, name);
#endif
  }
  while (b.live) {
    bool moved = false;
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (unsigned i : order) {
      Fiber &f = fibers[i];
      if (f.state == Fiber::Waits && f.waits_for->round != f.round) f.state = Fiber::Runs;
      if (f.state != Fiber::Runs) continue;
      moved = true;
      resume(f);
    }
    if (moved) continue;
    report(fibers);
    fail("block %u: %u of %u threads wait and none can go on", b.index.x, b.live, b.threads);
  }
}

inline void launch(dim3 of_grid, dim3 of_block, size_t shared, const std::function<void()> &body) {
  const Unseen unseen;
  grid = of_grid, block = of_block;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % 32) fail("a block of %u threads", threads);
  if (shared > size_t(shared_memory_limit)) fail("%zu bytes of shared memory, the device has %d", shared, shared_memory_limit);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid of %u %u %u", grid.x, grid.y, grid.z);
  const char *seed = getenv("HMM_SCHEDULE");
  std::mt19937 random(seed ? atoi(seed) : 0);
  release(&launched);
#ifdef __SANITIZE_THREAD__
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<unsigned char *> memories;  // as the stacks: freed at the end
  std::deque<Stack> stacks;
  for (unsigned n = 0; n < grid.x * grid.y * grid.z; n++) {
    Block b;
    b.index = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    b.threads = b.live = threads, b.bytes = shared, b.body = &body;
    const size_t room = (shared + kRedZone * (kMostArrays + 1) + 63) / 64 * 64;
    b.memory = static_cast<unsigned char *>(aligned_alloc(64, room));
    memset(b.memory, 0xff, room);
    ASAN_POISON_MEMORY_REGION(b.memory, room);
    memories.push_back(b.memory);
    run_block(b, seed && atoi(seed) ? &random : nullptr, stacks);
    ASAN_UNPOISON_MEMORY_REGION(b.memory, room);
  }
  acquire(&ended);
  for (unsigned char *memory : memories) free(memory);
  for (Stack &stack : stacks) spare_stacks.push_back(std::move(stack));
}

inline void log_launch(void *kernel, size_t shared) {
  const char *path = getenv("HMM_LAUNCHES");
  Dl_info program;
  if (!path || !dladdr(kernel, &program)) return;
  FILE *file = fopen(path, "a");
  if (!file) fail("HMM_LAUNCHES: %s cannot be written", path);
  fprintf(file, "%zx %zu\n", size_t(static_cast<char *>(kernel) - static_cast<char *>(program.dli_fbase)), shared);
  fclose(file);
}

}  // namespace on_cpu

#define HMM_SHARED_MEMORY(name) unsigned char *name = (on_cpu::current->carved = on_cpu::current->arrays = 0, on_cpu::current->block->memory)
#define threadIdx (on_cpu::current->index)
#define blockIdx (on_cpu::current->block->index)
#define blockDim (on_cpu::block)
#define gridDim (on_cpu::grid)
#define __syncthreads() on_cpu::sync_threads(__LINE__)
#define __syncwarp() (void)on_cpu::exchange(0xffffffffu, 0, true, __LINE__)
#define __shfl_xor_sync(mask, x, lanes) on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane() ^ (lanes))
#define __shfl_sync(mask, x, lane) on_cpu::shuffle(__LINE__, mask, x, unsigned(lane))
#define __shfl_up_sync(mask, x, lanes) \
  on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane() < unsigned(lanes) ? on_cpu::current->lane() : on_cpu::current->lane() - (lanes))
#define __shfl_down_sync(mask, x, lanes) \
  on_cpu::shuffle(__LINE__, mask, x, on_cpu::current->lane() + (lanes) > 31 ? on_cpu::current->lane() : on_cpu::current->lane() + (lanes))
#define __ballot_sync(mask, vote) on_cpu::ballot(__LINE__, mask, bool(vote))
#define __any_sync(mask, vote) (on_cpu::ballot(__LINE__, mask, bool(vote)) != 0)
#define __all_sync(mask, vote) (on_cpu::ballot(__LINE__, mask, bool(vote)) == (mask))

namespace hmm {

template <class T> T *carve(unsigned char *&at, int n) {
  const on_cpu::Unseen unseen;
  on_cpu::Fiber &f = *on_cpu::current;
  const size_t bytes = (size_t(n) * sizeof(T) + 15) / 16 * 16;
  f.carved += bytes;
  if (f.carved > f.block->bytes) on_cpu::fail("the kernel carves %zu bytes of shared memory, the launch gave %zu", f.carved, f.block->bytes);
  if (++f.arrays > on_cpu::kMostArrays) on_cpu::fail("more than %zu arrays", on_cpu::kMostArrays);
  T *found = reinterpret_cast<T *>(at);
  ASAN_UNPOISON_MEMORY_REGION(at, n * sizeof(T));
  at += bytes + on_cpu::kRedZone;
  return found;
}

template <int Bytes> void copy_async(void *to, const void *from) {
  const on_cpu::Unseen unseen;
  if ((uintptr_t(to) | uintptr_t(from)) % Bytes) on_cpu::fail("copy_async<%d>: not aligned", Bytes);
  on_cpu::current->copies.push_back({to, from, Bytes});
  on_cpu::current->uncommitted++;
}
inline void copy_commit() {
  const on_cpu::Unseen unseen;
  on_cpu::current->commits.push_back(on_cpu::current->uncommitted);
  on_cpu::current->uncommitted = 0;
}
template <int K> void copy_wait() {
  on_cpu::Fiber &f = *on_cpu::current;
  std::vector<on_cpu::Copy> due;
  {
    const on_cpu::Unseen unseen;
    while (int(f.commits.size()) > K) {
      due.insert(due.end(), f.copies.begin(), f.copies.begin() + f.commits.front());
      f.copies.erase(f.copies.begin(), f.copies.begin() + f.commits.front());
      f.commits.erase(f.commits.begin());
    }
  }
  for (const on_cpu::Copy &c : due) memcpy(c.to, c.from, c.bytes);  // the kernel's own reads and writes: seen
}

inline int shared_memory_limit() { return on_cpu::shared_memory_limit; }
inline int multiprocessors() { return on_cpu::multiprocessors; }

inline int create_stream(void **stream) {
  *stream = nullptr;
  return HMM_OK;
}

inline int fill_zeros(void *data, size_t bytes, void *) {
  if (bytes) memset(data, 0, bytes);
  return HMM_OK;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void *, const Arguments &...arguments) {
  const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
  on_cpu::log_launch(reinterpret_cast<void *>(kernel), shared);
  on_cpu::launch(grid, dim3(threads), shared, [&] { std::apply(kernel, held); });
  return HMM_OK;
}

}  // namespace hmm
