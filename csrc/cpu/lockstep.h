// Threads that take every step of a group together: each has some of the product's columns and then some of the sequences,
// so that a thread streams (and, N being small enough, keeps in its second cache) only its share of the packed arcs.
//
// A step is a few phases of C chunks each. A thread claims a chunk, its own before those of others, and may enter a phase
// when all chunks of the phases before are done. So it waits only for chunks that some running thread has claimed: a team of
// which one thread ever starts, or loses its core, still finishes. What a chunk computes depends on its number alone, hence
// no result on who computed it. A phase costs 0.2 us beside its work (two threads; AMD EPYC).
#pragma once
#include <chrono>
#include <deque>
#include <thread>

#include "parallel.h"
#include "walks.h"

namespace {

class Lockstep {
 public:
  const int chunks;
  const Scratch<Part> parts;

  explicit Lockstep(int count) : chunks(count), parts(count), claims(count) {}
  bool allocated() const { return parts.data && claims.data; }

  bool claim(int chunk, int64_t phase) const {
    int64_t *const phases = &claims[chunk].phases;
    return __atomic_load_n(phases, __ATOMIC_RELAXED) == phase &&
           __atomic_compare_exchange_n(phases, &phase, phase + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
  void finished() { __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE); }

  // Until that many chunks are done. Whoever has claimed them may be waiting for this very core, which yielding would not
  // give up in time, nor move one of the two to an idle one: a thread that has spun for long sleeps.
  void await(int64_t wanted) const {
    constexpr int spins = 1000;  // some 25 us
    for (int k = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < wanted; k++) {
      if (k >= spins) std::this_thread::sleep_for(std::chrono::microseconds(20));
#if defined(__x86_64__)
      else _mm_pause();
#elif defined(__aarch64__)
      else asm volatile("yield");
#endif
    }
  }

 private:
  struct alignas(64) Claim {
    int64_t phases;  // in which the chunk was claimed
  };
  const Scratch<Claim> claims;
  alignas(64) int64_t done = 0;  // chunks, in all phases
};

// A thread of a team, as Alone is a thread without one. All members go through the same phases.
class Member {
 public:
  Member(Lockstep &team, int own) : lockstep(team), first(own) {}
  int chunks() const { return lockstep.chunks; }
  Part *parts() const { return lockstep.parts; }

  template <class Body> void together(Body body) {
    lockstep.await(phase * chunks());
    for (int k = 0; k < chunks(); k++) {
      const int chunk = (first + k) % chunks();
      if (!lockstep.claim(chunk, phase)) continue;
      body(chunk);
      lockstep.finished();
    }
    phase++;
  }

 private:
  Lockstep &lockstep;
  const int first;
  int64_t phase = 0;
};

// Where a team works.
template <class Real> struct Place {
  Lockstep lockstep;
  const Scratch<Real> rows;
  std::optional<Counts<Real>> counts;

  Place(int chunks, int64_t N) : lockstep(chunks), rows(group_rows(chunks) * round_up(N, kPanel<Real>)) {}
  bool allocated() const { return lockstep.allocated() && rows.data && (!counts || counts->allocated()); }
};

// One team for each `chunks` of the workers; none where these are 1.
template <class Real> struct Places : std::deque<Place<Real>> {
  Places(int workers, int chunks, int64_t N) {
    for (int k = 0; chunks > 1 && k < workers / chunks; k++) this->emplace_back(chunks, N);
  }
  bool allocated() const {
    for (const Place<Real> &place : *this)
      if (!place.allocated()) return false;
    return true;
  }
};

// Packs arcs on several threads.
template <class Real> struct Packing : Status {
  Arcs<Real> &arcs;
  const Real *scores;
  const int64_t time;
  const bool with_backward;
  Lockstep lockstep;
  const Scratch<typename Arcs<Real>::Found> found;

  Packing(Arcs<Real> &empty, const Real *from, int64_t T, bool transposed, int chunks)
      : arcs(empty), scores(from), time(T), with_backward(transposed), lockstep(chunks), found(chunks) {}

  void operator()(int worker, int chunks) {
    const FlushToZero flush;
    Member member(lockstep, worker);
    const auto columns = [&](int chunk) { return chunk_of<Real>(arcs.N, chunk, chunks); };
    member.together([&](int chunk) { found[chunk] = arcs.pack(scores, columns(chunk)); });
    member.together([&](int chunk) {
      if (chunk == 0) arcs.certify(found, chunks, time);
      if (with_backward) arcs.pack_transposed(columns(chunk));
    });
  }
};

template <class Real>
int pack(const hmm_problem &p, Parallel parallel, bool with_backward, Arcs<Real> &arcs) {
  constexpr int64_t kNumbers = 1 << 16;  // N = 256: below, a thread has less to pack than it takes to ask it
  const int chunks = p.states * p.states < kNumbers ? 1 : p.threads;
  Packing<Real> packing(arcs, (const Real *)p.transition, p.time, with_backward, chunks);
  if (!arcs.allocated() || !packing.lockstep.allocated() || !packing.found.data) return HMM_OUT_OF_MEMORY;
  return run(parallel, chunks, chunks, packing);
}

}  // namespace
