// Few sequences on many threads, from both ends and in lockstep, under the sanitizers: lengths 0 to T, both passes with
// threads of their own. Whatever the threads, the numbers are those of one thread, and the same again the second time.
#include "exercise.h"

struct Result {
  std::vector<float> z, state, edge;
  std::vector<int32_t> method;
};

struct Case {
  int B, T, N;
  std::vector<float> initial, transition, emission, final, grad;
  std::vector<int64_t> lengths;

  Case(int b, int t, int n, double scale, double forbidden) : B(b), T(t), N(n) {
    std::mt19937 random(unsigned(B * 7919 + T * 104729 + N));
    RandomScores<float> scores = {random, scale, forbidden};
    initial = scores(N), transition = scores(size_t(N) * N), emission = scores(size_t(B) * T * N), final = scores(N);
    for (int k = 0; k < B; k++) lengths.push_back(k ? random() % (T + 1) : T), grad.push_back(float(k % 3) - 1);
  }

  Result solve(int forward_threads, int backward_threads, hmm_sharing sharing) const {
    hmm_problem p = {};
    p.batch = B, p.time = T, p.states = N, p.threads = forward_threads, p.sharing = sharing;
    p.initial = initial.data(), p.transition = transition.data(), p.emission = emission.data(), p.final = final.data();
    p.lengths = lengths.data();
    const size_t frames = size_t(B) * T;
    std::vector<float> alpha(frames * N), centre(frames);
    Result r = {std::vector<float>(B), std::vector<float>(frames * N), std::vector<float>(size_t(N) * N), std::vector<int32_t>(B)};
    CHECK(hmm_forward_f32(&p, r.z.data(), alpha.data(), nullptr, centre.data(), r.method.data()) == HMM_OK);
    p.threads = backward_threads;
    CHECK(hmm_backward_f32(&p, grad.data(), r.z.data(), alpha.data(), nullptr, centre.data(), r.method.data(), r.state.data(),
                           r.edge.data()) == HMM_OK);
    bool halved = false;
    for (int32_t m : r.method) halved |= m == HMM_BOTH_ENDS;
    CHECK(!halved || (sharing == HMM_BY_ENDS && forward_threads > 1));
    std::vector<float> uniform(frames, .5f);
    std::vector<int64_t> states(frames);
    const int status = hmm_sample_f32(&p, 1, r.z.data(), alpha.data(), r.method.data(), uniform.data(), states.data());
    CHECK(status == (halved ? HMM_INVALID_ARGUMENT : HMM_OK));
    return r;
  }
};

void close(const std::vector<float> &x, const std::vector<float> &y, double tolerance) {
  for (size_t k = 0; k < x.size(); k++)
    CHECK(x[k] == y[k] || std::fabs(double(x[k]) - double(y[k])) <= tolerance * (1 + std::fabs(double(y[k]))));
}

// Compares every way to share a problem with one thread; which methods were met.
struct Methods {
  bool halved = false, redone = false;

  void meet(const Case &problem, std::initializer_list<int> forward, std::initializer_list<int> backward) {
    const Result expected = problem.solve(1, 1, HMM_BY_SEQUENCES);
    for (int ahead : forward)
      for (int back : backward)
        for (hmm_sharing sharing : {HMM_BY_ENDS, HMM_BY_STEPS}) {
          const Result found = problem.solve(ahead, back, sharing), again = problem.solve(ahead, back, sharing);
          CHECK(found.z == again.z && found.state == again.state && found.edge == again.edge && found.method == again.method);
          close(found.z, expected.z, 1e-5);
          close(found.state, expected.state, 1e-4);
          close(found.edge, expected.edge, 1e-4);
          for (int32_t m : found.method) halved |= m == HMM_BOTH_ENDS, redone |= m == HMM_REDONE;
        }
  }
};

int main() {
  Methods met;
  for (int N : {1, 2, 15, 17, 33, 64, 70})
    for (int B : {1, 2, 3, 8, 11})
      for (double scale : {1., 100.})
        met.meet(Case(B, 1 + (N + 3 * B) % 9, N, scale, scale > 1 ? .3 : 0), {2, 3}, {1, 2, 5});
  met.meet(Case(8, 70, 70, 1, 0), {2}, {2, 3});                         // counts of more than one block
  for (int B : {2, 13}) met.meet(Case(B, 4, 260, 1, 0), {2, 5}, {2, 7});  // packed by several threads; several teams
  CHECK(met.halved && met.redone);
  return 0;
}
