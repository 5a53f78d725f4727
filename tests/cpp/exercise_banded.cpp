// Calls the banded part of the C interface on exact-sized heap arrays, for the sanitizers to watch: every tail of the
// vectors, offsets of any sign and size, every kind of diagonals, lengths 0 to T, several threads. What leads nowhere
// holds NaN.
#include "exercise.h"

HMM_FUNCTIONS(hmm_banded)

enum Kind { kShared, kPerSequence, kTimeVarying };

template <class Real>
void exercise(int B, int T, int N, const std::vector<int64_t> &offsets, Kind kind, double scale, double forbidden, bool extras, int threads) {
  using F = Functions<Real>;
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + kind));
  std::uniform_real_distribution<double> uniform;
  RandomScores<Real> scores = {random, scale, forbidden};
  const size_t D = offsets.size(), block = D * N, steps = T > 0 ? T - 1 : 0;
  const size_t blocks = kind == kShared ? 1 : kind == kPerSequence ? B : B * steps;
  const std::vector<Real> initial = scores(extras ? size_t(B) * N : N), final = scores(N), emission = scores(size_t(B) * T * N);
  std::vector<Real> diagonals = scores(blocks * block);
  const auto leads = [&](size_t n) {
    const int64_t i = int64_t(n % N), k = offsets[n / N % D];
    return k >= -i && k < N - i;
  };
  for (size_t n = 0; n < diagonals.size(); n++)
    if (!leads(n)) diagonals[n] = std::numeric_limits<Real>::quiet_NaN();
  std::vector<int64_t> lengths(B);
  for (int b = 0; b < B; b++) lengths[b] = random() % (T + 1);

  hmm_banded p = {};
  p.diagonals = D, p.offsets = offsets.data();
  p.chain.batch = B, p.chain.time = T, p.chain.states = N, p.chain.threads = threads, p.chain.time_varying = kind == kTimeVarying;
  p.chain.initial = initial.data(), p.chain.initial_batch_stride = extras ? N : 0;
  p.chain.transition = diagonals.data();
  p.chain.transition_batch_stride = kind == kShared ? 0 : kind == kPerSequence ? block : steps * block;
  p.chain.transition_time_stride = kind == kTimeVarying ? block : 0;
  p.chain.emission = emission.data(), p.chain.final = extras ? final.data() : nullptr, p.chain.lengths = lengths.data();

  const size_t frames = size_t(B) * T;
  std::vector<Real> z(B), grad(B), state(frames * N), score(B), edge(blocks * block);
  std::vector<double> alpha(frames * N), centre(frames), delta(frames * N);
  for (int b = 0; b < B; b++) grad[b] = Real(b % 3 - 1);
  CHECK(F::forward(&p, z.data(), alpha.data(), centre.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), z.data(), alpha.data(), centre.data(), state.data(), edge.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), z.data(), alpha.data(), centre.data(), state.data(), nullptr) == HMM_OK);
  std::vector<int64_t> states(frames);
  CHECK(F::viterbi(&p, score.data(), delta.data(), states.data()) == HMM_OK);
  const int64_t S = 2;
  std::vector<Real> draws(S * frames);
  for (Real &u : draws) u = Real(uniform(random));
  std::vector<int64_t> samples(S * frames);
  CHECK(F::sample(&p, S, z.data(), alpha.data(), draws.data(), samples.data()) == HMM_OK);

  double expected = 0, mass = 0;
  for (size_t n = 0; n < edge.size(); n++) {
    if (!leads(n)) CHECK(edge[n] == 0);
    mass += double(edge[n]);
  }
  for (int b = 0; b < B; b++) {
    const bool feasible = std::isfinite(double(z[b]));
    CHECK(feasible || z[b] < 0);
    CHECK(feasible == std::isfinite(double(score[b])));
    if (lengths[b] == 0) CHECK(z[b] == 0);
    if (feasible) CHECK(double(score[b]) <= double(z[b]) + F::tolerance * (1 + std::fabs(double(z[b]))));
    for (int t = 0; t < T; t++) {
      double sum = 0;
      for (int j = 0; j < N; j++) sum += double(state[(size_t(b) * T + t) * N + j]);
      const bool inside = feasible && t < lengths[b];
      CHECK(std::fabs(sum - (inside ? double(grad[b]) : 0)) < F::tolerance);
      CHECK(inside == (states[size_t(b) * T + t] >= 0) && states[size_t(b) * T + t] < N);
      for (int s = 0; s < S; s++) CHECK(inside == (samples[(size_t(s) * B + b) * T + t] >= 0));
    }
    if (feasible && lengths[b] > 1) expected += double(grad[b]) * double(lengths[b] - 1);
  }
  CHECK(std::fabs(mass - expected) < F::tolerance * (1 + double(frames)));
}

template <class Real> void all() {
  const std::vector<std::vector<int64_t>> every = {{0, 1}, {1, -1, 0}, {0}, {17, -16, 3, 0, -2}, {5, -100, INT64_MAX, INT64_MIN, 0}};
  for (int N : {1, 2, 7, 8, 9, 15, 16, 17, 33, 70})
    for (Kind kind : {kShared, kPerSequence, kTimeVarying})
      for (int B : {1, 3, 5})
        for (const auto &offsets : every) {
          const int T = 1 + (N + B) % 6;
          exercise<Real>(B, T, N, offsets, kind, 1, 0, B % 2, 1 + B % 3);
          exercise<Real>(B, T, N, offsets, kind, 200, .2, true, 3);
        }
  exercise<Real>(4, 0, 3, every[0], kShared, 1, 0, true, 2);
  exercise<Real>(0, 3, 3, every[0], kShared, 1, 0, true, 2);
}

int main() {
  CHECK(hmm_abi_version() == HMM_ABI_VERSION);
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  double y[4] = {};
  const int64_t one[1] = {1};
  hmm_banded p = {};
  CHECK(hmm_banded_forward_f32(nullptr, x, y, y) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_banded_forward_f32(&p, x, y, y) == HMM_INVALID_ARGUMENT);
  p.chain.batch = 1, p.chain.time = 1, p.chain.states = 1, p.chain.threads = 1;
  p.chain.initial = x, p.chain.transition = x, p.chain.lengths = one, p.diagonals = 1, p.offsets = one;
  CHECK(hmm_banded_forward_f32(&p, x, y, y) == HMM_INVALID_ARGUMENT);  // no emission
  return 0;
}
