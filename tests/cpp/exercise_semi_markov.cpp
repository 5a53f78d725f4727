// Calls the C interface of semi-Markov chains on exact-sized heap arrays, for the sanitizers to watch: tails of the tiles,
// durations beyond the frames, forbidden and far scores, lengths 0 to T, several threads. Checks what must hold of any
// result; the numbers are Python's to compare.
#include "exercise.h"

HMM_FUNCTIONS(hmm_semi_markov)

template <class Real> void exercise(int B, int T, int N, int D, bool own, double scale, double forbidden, int threads) {
  using F = Functions<Real>;
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + D));
  std::uniform_real_distribution<double> uniform;
  RandomScores<Real> scores = {random, scale, forbidden};
  const size_t each = own ? B : 1, frames = size_t(B) * T, size = frames * N;
  const std::vector<Real> initial = scores(each * N), final = scores(each * N), emission = scores(size);
  const std::vector<Real> transition = scores(each * N * N), durations = scores(each * N * D);
  std::vector<int64_t> lengths(B);
  for (int64_t &n : lengths) n = random() % (T + 1);

  hmm_semi_markov p = {};
  p.batch = B, p.time = T, p.states = N, p.max_duration = D, p.threads = threads;
  p.initial = initial.data(), p.initial_batch_stride = own ? N : 0;
  p.transition = transition.data(), p.transition_batch_stride = own ? N * N : 0;
  p.durations = durations.data(), p.durations_batch_stride = own ? N * D : 0;
  p.final = own ? final.data() : nullptr, p.final_batch_stride = own ? N : 0;
  p.emission = emission.data(), p.lengths = lengths.data();

  std::vector<Real> z(B), again(B), grad(B), state(size), starts(size), arcs(each * N * N), lasting(each * N * D), score(B);
  std::vector<double> messages(2 * size), centre(frames);
  for (int b = 0; b < B; b++) grad[b] = Real(b % 3 - 1);
  CHECK(F::forward(&p, z.data(), nullptr, nullptr) == HMM_OK);
  CHECK(F::forward(&p, again.data(), messages.data(), centre.data()) == HMM_OK);
  CHECK(z == again);
  CHECK(F::backward(&p, grad.data(), z.data(), messages.data(), centre.data(), state.data(), nullptr, nullptr, nullptr) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), z.data(), messages.data(), centre.data(), state.data(), starts.data(), arcs.data(),
                    lasting.data()) == HMM_OK);
  const int64_t S = 2;
  std::vector<double> draws(2 * S * frames);
  for (double &u : draws) u = uniform(random);
  std::vector<int64_t> path(frames), samples(S * frames);
  std::vector<uint8_t> begins(frames), sampled(S * frames);
  CHECK(F::sample(&p, S, z.data(), messages.data(), centre.data(), draws.data(), samples.data(), sampled.data()) == HMM_OK);
  CHECK(F::viterbi(&p, score.data(), messages.data(), centre.data(), path.data(), begins.data()) == HMM_OK);

  double mass = 0, segments = 0, after_first = 0, of_arcs = 0, of_durations = 0;
  for (Real x : arcs) of_arcs += double(x);
  for (Real x : lasting) of_durations += double(x);
  for (int b = 0; b < B; b++) {
    const bool feasible = std::isfinite(double(z[b]));
    CHECK(feasible || z[b] < 0);
    CHECK(feasible == std::isfinite(double(score[b])));
    if (lengths[b] == 0) CHECK(z[b] == 0);
    if (feasible) CHECK(double(score[b]) <= double(z[b]) + F::tolerance * (1 + std::fabs(double(z[b]))));
    for (int t = 0; t < T; t++) {
      const size_t at = size_t(b) * T + t;
      const bool inside = feasible && t < lengths[b];
      double sum = 0;
      for (int j = 0; j < N; j++) {
        sum += double(state[at * N + j]);
        segments += double(starts[at * N + j]);
        if (t) after_first += double(starts[at * N + j]);
      }
      mass += std::fabs(sum - (inside ? double(grad[b]) : 0));
      CHECK(inside == (path[at] >= 0) && path[at] < N && begins[at] <= inside);
      if (inside && t == 0) CHECK(begins[at]);
      for (int s = 0; s < S; s++) CHECK(inside == (samples[(size_t(s) * B + b) * T + t] >= 0));
    }
  }
  const double tolerance = F::tolerance * (1 + double(frames));
  CHECK(mass < tolerance);
  CHECK(std::fabs(of_durations - segments) < tolerance && std::fabs(of_arcs - after_first) < tolerance);
}

template <class Real> void all() {
  for (int N : {1, 2, 7, 8, 9, 17, 33, 65})
    for (int D : {1, 2, 5, 12})
      for (int B : {1, 2, 5}) {
        const int T = 1 + (N + B + D) % 9;
        exercise<Real>(B, T, N, D, B % 2, 1, 0, 1 + B % 3);
        exercise<Real>(B, T, N, D, B % 2 == 0, 1, .4, 2);
        exercise<Real>(B, T, N, D, true, 2000, .2, 3);
      }
  exercise<Real>(3, 400, 4, 6, false, 1, 0, 2);
  exercise<Real>(3, 400, 4, 6, false, 300, .3, 2);
  exercise<Real>(4, 0, 3, 2, false, 1, 0, 2);
  exercise<Real>(0, 3, 3, 2, false, 1, 0, 2);
}

int main() {
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  const int64_t too_long[1] = {3};
  hmm_semi_markov p = {};
  CHECK(hmm_semi_markov_forward_f32(nullptr, x, nullptr, nullptr) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_semi_markov_forward_f32(&p, x, nullptr, nullptr) == HMM_INVALID_ARGUMENT);
  p.batch = 1, p.time = 2, p.states = 1, p.max_duration = 1, p.threads = 1, p.lengths = too_long;
  p.initial = p.transition = p.emission = p.durations = x;
  CHECK(hmm_semi_markov_forward_f32(&p, x, nullptr, nullptr) == HMM_INVALID_ARGUMENT);
  return 0;
}
