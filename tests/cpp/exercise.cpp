// Calls the whole C interface on exact-sized heap arrays, for the sanitizers to watch: every tail of the tiles, every
// method, lengths 0 to T, several threads. Checks what must hold of any result; the numbers are Python's to compare.
#include "exercise.h"

HMM_FUNCTIONS(hmm)

int tangent(const hmm_problem *p, const float *g, const float *v, const float *u, float *e, float *s, float *a) {
  return hmm_tangent_f32(p, g, v, u, e, s, a);
}
int tangent(const hmm_problem *p, const double *g, const double *v, const double *u, double *e, double *s, double *a) {
  return hmm_tangent_f64(p, g, v, u, e, s, a);
}

enum Kind { kShared, kPerSequence, kTimeVarying };

template <class Real> void exercise(int B, int T, int N, Kind kind, double scale, double forbidden, bool extras, int threads) {
  using F = Functions<Real>;
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + kind));
  std::uniform_real_distribution<double> uniform;
  RandomScores<Real> scores = {random, scale, forbidden};
  const size_t arcs = size_t(N) * N, steps = T > 0 ? T - 1 : 0;
  const std::vector<Real> initial = scores(extras ? size_t(B) * N : N), final = scores(N), emission = scores(size_t(B) * T * N);
  const std::vector<Real> transition = scores(kind == kShared ? arcs : kind == kPerSequence ? B * arcs : B * steps * arcs);
  std::vector<int64_t> lengths(B);
  for (int b = 0; b < B; b++) lengths[b] = random() % (T + 1);

  hmm_problem p = {};
  p.batch = B, p.time = T, p.states = N, p.threads = threads, p.time_varying = kind == kTimeVarying;
  p.initial = initial.data(), p.initial_batch_stride = extras ? N : 0;
  p.transition = transition.data();
  p.transition_batch_stride = kind == kShared ? 0 : kind == kPerSequence ? arcs : steps * arcs;
  p.transition_time_stride = kind == kTimeVarying ? arcs : 0;
  p.emission = extras || kind != kTimeVarying ? emission.data() : nullptr;
  p.final = extras ? final.data() : nullptr;
  p.lengths = lengths.data();

  const size_t frames = size_t(B) * T, size = frames * N, varying = kind == kTimeVarying;
  std::vector<Real> z(B), alpha(size), norm(varying * size), centre(frames), grad(B), state(size), score(B), delta(size);
  std::vector<Real> edge(kind == kShared ? arcs : kind == kPerSequence ? B * arcs : B * steps * arcs);
  std::vector<int32_t> method(B);
  for (int b = 0; b < B; b++) grad[b] = Real(b % 3 - 1);
  CHECK(F::forward(&p, z.data(), alpha.data(), norm.data(), centre.data(), method.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), z.data(), alpha.data(), norm.data(), centre.data(), method.data(), state.data(),
                    edge.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), z.data(), alpha.data(), norm.data(), centre.data(), method.data(), state.data(),
                    nullptr) == HMM_OK);
  std::vector<int64_t> states(frames);
  CHECK(F::viterbi(&p, score.data(), delta.data(), states.data()) == HMM_OK);
  const int64_t S = 2;
  std::vector<Real> draws(S * frames);
  for (Real &u : draws) u = Real(uniform(random));
  std::vector<int64_t> samples(S * frames);
  CHECK(F::sample(&p, S, z.data(), alpha.data(), method.data(), draws.data(), samples.data()) == HMM_OK);

  std::vector<Real> average(B), change(size), edge_change(edge.size());
  CHECK(tangent(&p, grad.data(), alpha.data(), edge.data(), average.data(), change.data(), edge_change.data()) == HMM_OK);
  CHECK(tangent(&p, grad.data(), alpha.data(), (const Real *)nullptr, average.data(), change.data(), (Real *)nullptr) == HMM_OK);

  double expected = 0, mass = 0;
  for (Real x : edge) mass += double(x);
  for (int b = 0; b < B; b++) {
    const bool feasible = std::isfinite(double(z[b]));
    CHECK(feasible || z[b] < 0);
    CHECK(feasible == std::isfinite(double(score[b])));
    if (lengths[b] == 0) CHECK(z[b] == 0);
    if (feasible) CHECK(double(score[b]) <= double(z[b]) + F::tolerance * (1 + std::fabs(double(z[b]))));
    for (int t = 0; t < T; t++) {
      double sum = 0;
      for (int j = 0; j < N; j++) sum += double(state[(size_t(b) * T + t) * N + j]);
      CHECK(std::fabs(sum - (feasible && t < lengths[b] ? double(grad[b]) : 0)) < F::tolerance);
      const bool inside = feasible && t < lengths[b];
      CHECK(inside == (states[size_t(b) * T + t] >= 0) && states[size_t(b) * T + t] < N);
      for (int s = 0; s < S; s++) CHECK(inside == (samples[(size_t(s) * B + b) * T + t] >= 0));
    }
    if (feasible && lengths[b] > 1) expected += double(grad[b]) * double(lengths[b] - 1);
  }
  CHECK(std::fabs(mass - expected) < F::tolerance * (1 + double(frames)));
}

template <class Real> void all() {
  for (int N : {1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 70})
    for (Kind kind : {kShared, kPerSequence, kTimeVarying})
      for (int B : {1, 2, 3, 8, 11}) {
        const int T = 1 + (N + B) % 6;
        exercise<Real>(B, T, N, kind, 1, 0, B % 2, 1 + B % 3);
        exercise<Real>(B, T, N, kind, 1, .4, B % 2 == 0, 2);
        exercise<Real>(B, T, N, kind, 200, .2, true, 3);
      }
  exercise<Real>(3, 300, 4, kShared, 1, 0, true, 2);  // several blocks of counts, and rescaling
  exercise<Real>(3, 300, 4, kShared, 100, .3, true, 2);
  exercise<Real>(4, 0, 3, kShared, 1, 0, true, 2);
  exercise<Real>(0, 3, 3, kShared, 1, 0, true, 2);
}

int main() {
  CHECK(hmm_abi_version() == HMM_ABI_VERSION);
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  int32_t method[1];
  const int64_t too_long[1] = {3};
  hmm_problem p = {};
  CHECK(hmm_forward_f32(nullptr, x, x, x, x, method) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_forward_f32(&p, x, x, x, x, method) == HMM_INVALID_ARGUMENT);
  p.batch = 1, p.time = 2, p.states = 1, p.threads = 1, p.initial = x, p.transition = x, p.lengths = too_long;
  CHECK(hmm_forward_f32(&p, x, x, x, x, method) == HMM_INVALID_ARGUMENT);
  return 0;
}
