// Which sequences go through a step together, and which thread they are for.
#pragma once
#include "scaled.h"

namespace {

// How sequences (in the order of falling length) share the steps of a product and the threads. Groups of up to 8 go
// through a step together: full groups, then what is left in powers of two, so that few rows of a product are idle. Where
// there are fewer full groups than threads, two more ways keep the product's rows, which halving groups would not (the packed
// arcs stream from a cache once a step; at N = 512, for 4 rows instead of 8, that is most of the time):
//   from both ends: time is halved, two threads walk the same group. No thread waits for another but at the end; each streams a
//     packed matrix of its own, one of them transposed;
//   in lockstep (lockstep.h): columns are shared out in chunks, a team of threads takes each step of a group together and then
//     the next group. Two waits a step; each thread streams its chunk only.
// The second wins from N = 1024 on (ops.py; B = 8: at 512 both ends are 1.89 times as fast as one thread, lockstep 1.74), where
// two matrices no longer fit the caches that one does.
struct Grouping {
  const int64_t *order, *lengths;
  int64_t batch;
  int most;     // sequences in a group
  int halves;   // 2: from both ends
  int chunks;   // more than 1: so many workers are a team
  int workers;  // shares of the work

  Grouping(const hmm_problem &p, const int64_t *sorted, bool shared, bool both_ends, int step_chunks = 1)
      : order(sorted), lengths(p.lengths), batch(p.batch), halves(both_ends ? 2 : 1), chunks(step_chunks) {
    const int64_t most_teams = p.threads / chunks, threads = most_teams / halves > 1 ? most_teams / halves : 1, share = (batch + threads - 1) / threads;
    most = !shared ? 1 : share >= 7 ? 8 : share >= 3 ? 4 : share >= 2 ? 2 : 1;
    int64_t groups = 0;
    for (int64_t at = 0; at < batch; groups++) at += group(at).size;
    const int64_t items = p.time_varying || !shared ? batch : groups * halves;
    workers = int(items < most_teams ? items : most_teams) * chunks;
  }
  int team(int worker) const { return worker / chunks; }
  int chunk(int worker) const { return worker % chunks; }
  // The group from position `at` on.
  Group group(int64_t at) const {
    const int64_t left = batch - at;
    int64_t size = most;
    while (size > 1 && left < size - (size > 2)) size /= 2;
    Group g;
    for (int64_t m = 0; m < (left < size ? left : size); m++) g.add(order[at + m], 0, lengths[order[at + m]], false);
    return g;
  }
  // body(group of whole sequences, its number, half) for each share of this worker's team, until it returns false.
  template <class Body> bool share(int worker, Body body) const {
    int64_t at = 0, item = 0;
    for (int64_t k = 0; at < batch; k++) {
      const Group whole = group(at);
      at += whole.size;
      for (int h = 0; h < halves; h++)
        if (item++ % (workers / chunks) == team(worker) && !body(whole, k, h)) return false;
    }
    return true;
  }
};

}  // namespace
