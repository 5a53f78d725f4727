// The fibers of on_cpu.h: a block's threads, in turns on one thread of the CPU, and where they meet.
#include "on_cpu.h"

#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <map>
#include <memory>
#include <random>
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
#endif

namespace on_cpu {

int shared_memory_limit = 64 * 1024, multiprocessors = 68;

int number_in(const char *variable) {
  const char *value = getenv(variable);
  return value ? atoi(value) : 0;
}
const int defect = number_in("HMM_DEFECT");
Thread *current = nullptr;
dim3 grid, block;

namespace {

constexpr size_t kStack = 64 * 1024, kRedZone = 64, kMostArrays = 64, kMostStacks = 1536;

template <class... Numbers> [[noreturn]] void fail(const char *format, Numbers... numbers) {
  fprintf(stderr, "on_cpu: ");
  fprintf(stderr, format, numbers...);
  fprintf(stderr, "\n");
  abort();
}

// While one of these lives, ThreadSanitizer does not look: what is done is ours, not the kernel's. This file is built
// without a sanitizer; what a sanitizer sees of it are the functions that it intercepts, such as malloc and memset.
struct Unseen {
#ifdef __SANITIZE_THREAD__
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Unseen() {}
#endif
};
void acquire([[maybe_unused]] void *tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
}
void release([[maybe_unused]] void *tag) {
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

struct Fiber : Thread {
  enum { Runs, Waits, Ended } state = Runs;
  unsigned number;
  Block *of;
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
};

bool random_order;
unsigned copied;  // pieces
void *scheduler_at;
[[maybe_unused]] void *scheduler_sanitizer, *scheduler_fake_stack;
[[maybe_unused]] const void *scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_bytes;
char launched, ended;

inline Fiber &running() { return *static_cast<Fiber *>(current); }

__attribute__((naked, noinline, used)) void switch_stacks(void ** /*from*/, void * /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

void to_scheduler() {
  Fiber *f = &running();
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

void resume(Fiber &f) {
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

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  acquire(&launched);
  (*running().of->body)();
  release(&ended);
  {
    const Unseen unseen;
    Fiber &f = running();
    if (!f.copies.empty()) fail("thread %u ends before it has waited for its copies", f.number);
    f.state = Fiber::Ended;
    f.of->live--;
  }
  to_scheduler();
  __builtin_trap();
}

// Waits until `expected` threads have come to this meeting; returns the round's number.
uint64_t meet(Meeting &m, unsigned expected, bool orders_memory, const char *what, int line) {
  const uint64_t round = m.round;
  if (!m.arrived) m.line = line;
  else if (m.line != line) fail("%s of lines %d and %d meet", what, m.line, line);
  if (orders_memory) release(&m.order[round & 1]);
  if (++m.arrived == expected) m.arrived = 0, m.round++;
  else {
    Fiber &f = running();
    f.waits_for = &m, f.round = round, f.state = Fiber::Waits;
    to_scheduler();
  }
  if (orders_memory) acquire(&m.order[round & 1]);
  return round;
}

// What the lanes of a mask have given, by lane, once all have.
const uint64_t *meet_lanes(unsigned mask, uint64_t value, bool orders_memory, int line) {
  Fiber &f = running();
  if (!(mask >> f.lane & 1)) fail("lane %u, line %d: the mask is without it", f.lane, line);
  if (!f.met || f.mask != mask) f.met = &f.of->warps[{f.number / 32, mask}], f.mask = mask;
  Meeting &m = *f.met;
  m.slot[m.round & 1][f.lane] = value;
  return m.slot[meet(m, __builtin_popcount(mask), orders_memory, "warp operations", line) & 1];
}

// What sets of threads of a block are waiting for, when none can go on.
void report(const std::vector<Fiber> &fibers) {
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
std::vector<Stack> spare_stacks;  // of earlier launches

// A stack for a thread of a block, kept in `used`. Reused within a launch it orders two blocks for ThreadSanitizer, whose
// every barrier takes as long as there are stacks: where there are more threads, the first blocks' are, so that three
// blocks of 512 threads that follow each other, six of 256, stay apart.
Stack &take_stack(std::deque<Stack> &used) {
  if (spare_stacks.empty() && used.size() >= kMostStacks) {
    spare_stacks.push_back(std::move(used.front()));
    used.pop_front();
  }
  if (spare_stacks.empty()) spare_stacks.emplace_back();
  used.push_back(std::move(spare_stacks.back()));
  spare_stacks.pop_back();
  return used.back();
}

void run_block(Block &b, std::mt19937 *random, std::deque<Stack> &used) {
  std::vector<Fiber> fibers(b.threads);
  std::vector<unsigned> order(b.threads);
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber &f = fibers[i];
    f.number = order[i] = i, f.lane = i % 32, f.of = &b, f.block = b.index;
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

void log_launch(void *kernel, size_t shared) {
  const char *path = getenv("HMM_LAUNCHES");
  Dl_info program;
  if (!path || !dladdr(kernel, &program)) return;
  FILE *file = fopen(path, "a");
  if (!file) fail("HMM_LAUNCHES: %s cannot be written", path);
  fprintf(file, "%zx %zu\n", size_t(static_cast<char *>(kernel) - static_cast<char *>(program.dli_fbase)), shared);
  fclose(file);
}

}  // namespace

void launch(void *kernel, dim3 of_grid, dim3 of_block, size_t shared, const std::function<void()> &body) {
  const Unseen unseen;
  log_launch(kernel, shared);
  grid = of_grid, block = of_block;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % 32) fail("a block of %u threads", threads);
  if (shared > size_t(shared_memory_limit)) fail("%zu bytes of shared memory, the device has %d", shared, shared_memory_limit);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid of %u %u %u", grid.x, grid.y, grid.z);
  const int seed = number_in("HMM_SCHEDULE");
  random_order = seed > 0;
  std::mt19937 random(seed);
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
    run_block(b, random_order ? &random : nullptr, stacks);
    ASAN_UNPOISON_MEMORY_REGION(b.memory, room);
  }
  acquire(&ended);
  for (unsigned char *memory : memories) free(memory);
  for (Stack &stack : stacks) spare_stacks.push_back(std::move(stack));
}

void sync_threads(int line) {
  const Unseen unseen;
  meet(running().of->barrier, running().of->threads, true, "barriers", line);
}
void sync_warp(int line) {
  const Unseen unseen;
  meet_lanes(0xffffffffu, 0, true, line);
}

uint64_t exchange(int line, unsigned mask, uint64_t bits, unsigned from) {
  const Unseen unseen;
  if (!(mask >> (from & 31) & 1)) fail("line %d: a shuffle reads lane %u, which takes no part", line, from & 31);
  return meet_lanes(mask, bits, false, line)[from & 31];
}
unsigned ballot(int line, unsigned mask, bool vote) {
  const Unseen unseen;
  const uint64_t *slot = meet_lanes(mask, vote, false, line);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= unsigned(slot[lane] & 1) << lane;
  return votes;
}

unsigned char *shared_memory() {
  const Unseen unseen;
  running().carved = running().arrays = 0;
  return running().of->memory;
}

void *carve(unsigned char *&at, size_t bytes) {
  const Unseen unseen;
  Fiber &f = running();
  const size_t rounded = (bytes + 15) / 16 * 16;
  f.carved += rounded;
  if (f.carved > f.of->bytes) fail("the kernel carves %zu bytes of shared memory, the launch gave %zu", f.carved, f.of->bytes);
  if (++f.arrays > kMostArrays) fail("more than %zu arrays", kMostArrays);
  unsigned char *const found = at;
  ASAN_UNPOISON_MEMORY_REGION(found, bytes);
  at += rounded + kRedZone;
  return found;
}

void copy_async(void *to, const void *from, int bytes) {
  {
    const Unseen unseen;
    if ((uintptr_t(to) | uintptr_t(from)) % bytes) fail("copy_async<%d>: not aligned", bytes);
    running().copies.push_back({to, from, bytes});
    running().uncommitted++;
    if (!random_order || ++copied % 2 == 0) return;
  }
  memcpy(to, from, bytes);  // as well as late
}
void copy_commit() {
  const Unseen unseen;
  running().commits.push_back(running().uncommitted);
  running().uncommitted = 0;
}
void copy_wait(int newest) {
  std::vector<Copy> due;
  {
    const Unseen unseen;
    Fiber &f = running();
    while (int(f.commits.size()) > newest) {
      due.insert(due.end(), f.copies.begin(), f.copies.begin() + f.commits.front());
      f.copies.erase(f.copies.begin(), f.copies.begin() + f.commits.front());
      f.commits.erase(f.commits.begin());
    }
  }
  for (const Copy &c : due) memcpy(c.to, c.from, c.bytes);  // the kernel's own reads and writes: seen
}

}  // namespace on_cpu
