// hmm_viterbi and hmm_topk on exact-sized heap arrays, for the sanitizers to watch: tails of the tiles, groups of every
// size, lists of every kind, pointers of each width, several threads. What must hold of any result is checked here.
#include "exercise.h"

int viterbi(const hmm_problem *p, float *s, float *d, int64_t *z) { return hmm_viterbi_f32(p, s, d, z); }
int viterbi(const hmm_problem *p, double *s, double *d, int64_t *z) { return hmm_viterbi_f64(p, s, d, z); }
int topk(const hmm_problem *p, int64_t k, float *s, int64_t *z) { return hmm_topk_f32(p, k, s, z); }
int topk(const hmm_problem *p, int64_t k, double *s, int64_t *z) { return hmm_topk_f64(p, k, s, z); }

// kind: 0 shared, 1 per sequence, 2 time-varying.
template <class Real> void exercise(int B, int T, int N, int k, int kind, double forbidden, int threads) {
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + kind));
  RandomScores<Real> scores = {random, 1, forbidden};
  const size_t arcs = size_t(N) * N, steps = T > 0 ? T - 1 : 0;
  const std::vector<Real> initial = scores(N), final = scores(size_t(B) * N), emission = scores(size_t(B) * T * N);
  const std::vector<Real> transition = scores(kind == 0 ? arcs : kind == 1 ? B * arcs : B * steps * arcs);
  std::vector<int64_t> lengths(B);
  for (int64_t &n : lengths) n = int64_t(random() % (T + 1));
  hmm_problem p = {};
  p.batch = B, p.time = T, p.states = N, p.threads = threads, p.time_varying = kind == 2;
  p.initial = initial.data(), p.transition = transition.data();
  p.transition_batch_stride = int64_t(kind == 0 ? 0 : kind == 1 ? arcs : steps * arcs);
  p.transition_time_stride = kind == 2 ? int64_t(arcs) : 0;
  p.emission = emission.data(), p.lengths = lengths.data(), p.final = final.data(), p.final_batch_stride = N;

  const size_t frames = size_t(B) * T;
  std::vector<Real> best(B), delta(frames * N), score(size_t(k) * B);
  std::vector<int64_t> path(frames), states(size_t(k) * frames);
  CHECK(viterbi(&p, best.data(), delta.data(), path.data()) == HMM_OK);
  CHECK(topk(&p, k, score.data(), states.data()) == HMM_OK);
  for (int b = 0; b < B; b++) {
    CHECK(best[b] == score[b]);
    for (int n = 0; n < k; n++) {
      const Real s = score[size_t(n) * B + b];
      CHECK(s == s && (n == 0 || s <= score[size_t(n - 1) * B + b]));
      for (int t = 0; t < T; t++) {
        const int64_t z = states[(size_t(n) * B + b) * T + t];
        CHECK((std::isfinite(s) && t < lengths[b]) == (z >= 0) && z < N);
        if (n == 0) CHECK((z >= 0) == (path[size_t(b) * T + t] >= 0));
      }
    }
  }
}

template <class Real> void all() {
  for (int N : {1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 70})
    for (int kind : {0, 1, 2})
      for (int B : {1, 2, 3, 5, 8, 11}) {
        const int k = std::vector<int>{1, 2, 3, 4, 7, 12}[(N + B) % 6];
        exercise<Real>(B, 1 + (N + B) % 6, N, k, kind, 0, 1 + B % 3);
        exercise<Real>(B, 1 + (N + B) % 5, N, k, kind, .5, 2);
      }
  for (int N : {128, 130, 191})  // arcs are left out (pruned_max.h)
    for (double forbidden : {0., .5}) exercise<Real>(3, 9, N, 2, N % 2, forbidden, 2);
  exercise<Real>(1, 3, 700, 100, 0, 0, 1);
  exercise<Real>(4, 0, 3, 2, 0, 0, 2);
  exercise<Real>(0, 3, 3, 2, 0, 0, 2);
}

int main() {
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  int64_t z[4];
  const int64_t one[1] = {1};
  hmm_problem p = {};
  p.batch = 1, p.time = 1, p.states = 2, p.threads = 1, p.initial = x, p.lengths = one;
  CHECK(hmm_topk_f32(&p, 0, x, z) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_topk_f32(&p, int64_t(1) << 31, x, z) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_topk_f32(nullptr, 1, x, z) == HMM_INVALID_ARGUMENT);
  return 0;
}
