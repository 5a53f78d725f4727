// Calls the C interface of chains with active states on exact-sized heap arrays, for the sanitizers to watch: runs of
// consecutive states and any others, tables and single blocks, every tail of the vectors, redone sequences, several threads.
#include <algorithm>
#include <numeric>

#include "exercise.h"

HMM_FUNCTIONS(hmm_active)

// N states, K slots; `runs`: consecutive states from any first one, fewer than K of them at times.
template <class Real>
void exercise(int B, int T, int N, int K, bool runs, bool per_sequence, double scale, double forbidden, int threads) {
  using F = Functions<Real>;
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + K));
  std::uniform_real_distribution<double> uniform;
  RandomScores<Real> scores = {random, scale, forbidden};
  const size_t arcs = size_t(N) * N, frames = size_t(B) * T, size = frames * K;
  const std::vector<Real> initial = scores(N), final = scores(size_t(B) * N), emission = scores(size);
  const std::vector<Real> transition = scores(per_sequence ? B * arcs : arcs);
  std::vector<int64_t> lengths(B), active(size), all(N);
  std::iota(all.begin(), all.end(), 0);
  for (int b = 0; b < B; b++) lengths[b] = random() % (T + 1);
  for (size_t f = 0; f < frames; f++) {
    if (!runs) std::shuffle(all.begin(), all.end(), random);
    const int first = runs ? int(random() % N) : 0, count = runs ? std::min(K, N - first) : K;
    for (int k = 0; k < K; k++) {
      const bool used = k < count && (runs || random() % 8);
      active[f * K + k] = used ? all[first + k] : -1;
    }
  }
  for (int b = 0; b < B; b++)  // past the end: anything
    for (size_t k = (size_t(b) * T + lengths[b]) * K; k < size_t(b + 1) * T * K; k++) active[k] = int64_t(1) << 40;

  hmm_active_problem p = {};
  p.batch = B, p.time = T, p.states = N, p.slots = K, p.threads = threads;
  p.initial = initial.data(), p.transition = transition.data(), p.transition_batch_stride = per_sequence ? arcs : 0;
  p.active = active.data(), p.emission = emission.data(), p.lengths = lengths.data();
  p.final = final.data(), p.final_batch_stride = N;

  std::vector<Real> z(B), alpha(size), grad(B), state(size), score(B), delta(size), shared(arcs), each(B * arcs);
  std::vector<int32_t> method(B);
  for (int b = 0; b < B; b++) grad[b] = Real(b % 3 - 1);
  CHECK(F::forward(&p, z.data(), alpha.data(), method.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), alpha.data(), method.data(), state.data(), nullptr, 0) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), alpha.data(), method.data(), state.data(), each.data(), arcs) == HMM_OK);
  if (!per_sequence)
    CHECK(F::backward(&p, grad.data(), alpha.data(), method.data(), state.data(), shared.data(), 0) == HMM_OK);
  const int64_t S = 2;
  std::vector<Real> draws(S * frames);
  std::vector<int64_t> states(frames), samples(S * frames);
  for (Real &u : draws) u = Real(uniform(random));
  CHECK(F::viterbi(&p, score.data(), delta.data(), states.data()) == HMM_OK);
  CHECK(F::sample(&p, S, z.data(), alpha.data(), method.data(), draws.data(), samples.data()) == HMM_OK);

  auto active_at = [&](int64_t z, size_t f) {
    return std::find(&active[f * K], &active[f * K] + K, z) != &active[f * K] + K;
  };
  double expected = 0;
  for (int b = 0; b < B; b++) {
    const bool feasible = std::isfinite(double(z[b]));
    CHECK(feasible || z[b] < 0);
    CHECK(feasible == std::isfinite(double(score[b])));
    if (lengths[b] == 0) CHECK(z[b] == 0);
    if (feasible) CHECK(double(score[b]) <= double(z[b]) + F::tolerance * (1 + std::fabs(double(z[b]))));
    for (int t = 0; t < T; t++) {
      const size_t f = size_t(b) * T + t;
      const bool inside = feasible && t < lengths[b];
      double sum = 0;
      for (int k = 0; k < K; k++) sum += double(state[f * K + k]);
      CHECK(std::fabs(sum - (inside ? double(grad[b]) : 0)) < F::tolerance);
      CHECK(inside ? active_at(states[f], f) : states[f] == -1);
      for (int s = 0; s < S; s++) CHECK(inside ? active_at(samples[s * frames + f], f) : samples[s * frames + f] == -1);
    }
    const double mass = std::accumulate(&each[b * arcs], &each[b * arcs] + arcs, 0.0);
    const double edges = feasible && lengths[b] > 1 ? double(grad[b]) * double(lengths[b] - 1) : 0;
    CHECK(std::fabs(mass - edges) < F::tolerance * (1 + T));
    expected += edges;
  }
  const double mass = std::accumulate(shared.begin(), shared.end(), 0.0);
  if (!per_sequence) CHECK(std::fabs(mass - expected) < F::tolerance * (1 + double(frames)));
}

template <class Real> void all() {
  for (int N : {1, 2, 9, 17, 33, 66})
    for (int K : {1, 2, 7, 8, 9, 16, 17, 33, 66})
      for (int B : {1, 3}) {
        if (K > N) continue;
        for (bool runs : {false, true})
          for (int T : {2, 12}) {  // blocks one by one, and a table
            exercise<Real>(B, T, N, K, runs, B == 1, 1, 0, 1 + B);
            exercise<Real>(B, T, N, K, runs, false, 1, .3, 2);
            exercise<Real>(B, T, N, K, runs, B == 3, 200, .2, 3);
          }
      }
  exercise<Real>(7, 300, 40, 10, true, false, 1, 0, 3);  // rescaling
  exercise<Real>(3, 0, 4, 2, true, false, 1, 0, 2);
  exercise<Real>(0, 3, 4, 2, true, false, 1, 0, 2);
}

int main() {
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  int32_t method[1];
  hmm_active_problem p = {};
  CHECK(hmm_active_forward_f32(nullptr, x, x, method) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_active_forward_f32(&p, x, x, method) == HMM_INVALID_ARGUMENT);
  const int64_t too_long[1] = {3}, states[2] = {0, 0};
  p.batch = 1, p.time = 2, p.states = 1, p.slots = 1, p.threads = 1, p.initial = x, p.transition = x, p.lengths = too_long;
  p.active = states, p.emission = x;
  CHECK(hmm_active_forward_f32(&p, x, x, method) == HMM_INVALID_ARGUMENT);
  return 0;
}
