// Executes log_space.cu, log_space_back.cu, redo.cu, viterbi.cu and sample.cu on the CPU, on exact-sized heap arrays, and compares with
// plain recursions in float64. Built with -DHMM_ON_CPU (on_cpu.h); an argument adds 100,000 frames, which takes too long under sanitizers.
#include <algorithm>

#include "../exercise.h"
#include "kernels.h"
#include "on_cpu.h"

namespace {

#ifdef __SANITIZE_THREAD__
constexpr bool kSlow = true;  // a hundredfold: fewer cases
#else
constexpr bool kSlow = false;
#endif
constexpr double kNever = -std::numeric_limits<double>::infinity();
enum Kind { kShared, kPerSequence, kTimeVarying };

struct Case {
  int B, T, N;
  Kind kind;
  double scale = 1, forbidden = 0;
  bool extras = true;    // emissions, final scores, initial scores a sequence
  bool integers = false;  // scores, so that ties are exact
  int shift = 0;         // of the transition from an aligned address
  double tolerance = 0;  // of posteriors; 0: the contract's
  int samples = 2;
};

template <class Real> struct Problem {
  Case c;
  std::mt19937 random;
  std::vector<Real> initial, transition, emission, final, grad;
  std::vector<int64_t> lengths;
  hmm_problem p = {};

  explicit Problem(const Case &given) : c(given), random(unsigned(c.B * 7919 + c.T * 104729 + c.N * 31 + c.kind)) {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    RandomScores<Real> scores = {random, c.scale, c.forbidden};
    const size_t N = c.N, steps = c.T > 1 ? c.T - 1 : 0, blocks = c.kind == kShared ? 1 : c.kind == kPerSequence ? c.B : c.B * steps;
    initial = scores(c.extras ? c.B * N : N), final = scores(N), emission = scores(size_t(c.B) * c.T * N);
    transition = scores(blocks * N * N + c.shift);
    for (int b = 0; b < c.B; b++) {
      lengths.push_back(b == 0 ? c.T : b == 1 ? 0 : b == 2 && c.T > 0 ? 1 : int64_t(random() % (c.T + 1)));
      grad.push_back(Real(b % 4 == 3 ? 0 : b % 4 == 2 ? -1.5 : b == 4 ? 1e-20 : 1));
      for (size_t k = lengths[b] * N; k < c.T * N; k++) emission[b * c.T * N + k] = nan;
      for (size_t t = std::max<int64_t>(lengths[b], 1); c.kind == kTimeVarying && t < size_t(c.T); t++)
        std::fill_n(transition.begin() + c.shift + (b * steps + t - 1) * N * N, N * N, nan);
    }
    if (c.extras && c.B > 5) std::fill_n(initial.begin() + 5 * N, N, -std::numeric_limits<Real>::infinity());  // infeasible
    if (c.integers)
      for (auto *x : {&initial, &transition, &emission, &final})
        for (Real &v : *x) v = std::round(v);
    p.batch = c.B, p.time = c.T, p.states = N, p.threads = 1, p.time_varying = c.kind == kTimeVarying;
    p.initial = initial.data(), p.initial_batch_stride = c.extras ? N : 0, p.transition = transition.data() + c.shift;
    p.transition_batch_stride = c.kind == kShared ? 0 : c.kind == kPerSequence ? N * N : steps * N * N;
    p.transition_time_stride = c.kind == kTimeVarying ? N * N : 0;
    p.emission = c.extras ? emission.data() : nullptr, p.final = c.extras ? final.data() : nullptr, p.lengths = lengths.data();
  }

  double arc(int b, int t, int i, int j) const {  // from t-1 to t
    return double(static_cast<const Real *>(p.transition)[b * p.transition_batch_stride + (t - 1) * p.transition_time_stride + i * c.N + j]);
  }
  double local(int b, int t, int j) const {
    double x = c.extras ? double(emission[(size_t(b) * c.T + t) * c.N + j]) : 0;
    if (t == 0) x += double(initial[b * p.initial_batch_stride + j]);
    if (t == lengths[b] - 1 && c.extras) x += double(final[j]);
    return x;
  }
};

struct Sum {  // log-sum-exp, or the maximum
  double top = kNever, sum = 0;
  void add(double x) {
    if (x == kNever) return;
    if (x > top) sum *= std::exp(top - x), top = x;
    sum += std::exp(x - top);
  }
  double log() const { return sum > 0 ? top + std::log(sum) : kNever; }
};

// Messages in both directions, and the best path's, by the definition.
template <class Real> struct Reference {
  const Problem<Real> &q;
  int b, L, N;
  std::vector<double> forward, backward, best;
  double z = 0, score = 0;

  Reference(const Problem<Real> &problem, int sequence)
      : q(problem), b(sequence), L(int(q.lengths[b])), N(q.c.N), forward(size_t(L) * N), backward(size_t(L) * N), best(size_t(L) * N) {
    for (int t = 0; t < L; t++)
      for (int j = 0; j < N; j++) {
        Sum in, out;
        double top = t ? kNever : 0;
        if (t) for (int i = 0; i < N; i++) in.add(forward[(t - 1) * N + i] + q.arc(b, t, i, j)), top = std::fmax(top, best[(t - 1) * N + i] + q.arc(b, t, i, j));
        forward[t * N + j] = (t ? in.log() : 0) + q.local(b, t, j);
        best[t * N + j] = top + q.local(b, t, j);
        const int s = L - 1 - t;
        if (t) for (int k = 0; k < N; k++) out.add(backward[(s + 1) * N + k] + q.local(b, s + 1, k) + q.arc(b, s + 1, j, k));
        backward[s * N + j] = t ? out.log() : 0;
      }
    if (L == 0) return;
    Sum all;
    score = kNever;
    for (int j = 0; j < N; j++) all.add(forward[(L - 1) * N + j]), score = std::fmax(score, best[(L - 1) * N + j]);
    z = all.log();
  }
  double state(int t, int i) const { return z == kNever ? 0 : std::exp(forward[t * N + i] + backward[t * N + i] - z); }
  double edge(int t, int i, int j) const {
    return z == kNever ? 0 : std::exp(forward[(t - 1) * N + i] + q.arc(b, t, i, j) + q.local(b, t, j) + backward[t * N + j] - z);
  }
  std::vector<int64_t> path() const {  // ties to the smallest state
    std::vector<int64_t> states(L);
    for (int t = L - 1; t >= 0; t--) {
      double top = kNever;
      for (int i = 0; i < N; i++) {
        const double x = best[t * N + i] + (t < L - 1 ? q.arc(b, t + 1, i, int(states[t + 1])) : 0);
        if (x > top) top = x, states[t] = i;
      }
    }
    return states;
  }
};

// What interface.cu does for sequences that no scaled sweep takes; edges that are summed over time are added to.
template <class Real>
int forward_pass(const hmm_problem &p, bool all, Real *z, Real *alpha, Real *norm, Real *centre, int32_t *method) {
  if (p.time_varying) {
    std::vector<double> workspace(hmm::log_space_workspace<Real>(p, false) / sizeof(double));
    return hmm::log_space_forward<Real>(p, z, alpha, norm, centre, method, workspace.data(), nullptr);
  }
  return p.batch ? hmm::redo_forward<Real>(p, all, z, alpha, norm, centre, method, nullptr) : HMM_OK;
}
template <class Real>
int backward_pass(const hmm_problem &p, const Real *grad, const Real *z, const Real *alpha, const Real *norm, const Real *centre,
                  const int32_t *method, Real *state, Real *edge) {
  if (p.time_varying) return hmm::log_space_backward<Real>(p, grad, z, alpha, norm, centre, method, state, edge, nullptr, nullptr);
  if (p.batch == 0) return HMM_OK;
  const int status = hmm::redo_backward<Real>(p, grad, z, alpha, norm, centre, method, state, nullptr);
  if (status || !edge || p.time == 0) return status;
  const size_t size = size_t((p.transition_batch_stride ? p.batch : 1) * p.states * p.states), all = size_t(hmm::count_blocks(p) * p.states * p.states);
  std::vector<Real> blocks(all);
  std::copy_n(edge, size, blocks.begin());
  CHECK(hmm::redo_counts<Real>(p, alpha, norm, centre, method, state, blocks.data(), nullptr) == HMM_OK);
  std::fill_n(edge, size, Real(0));
  for (size_t k = 0; k < all; k++) edge[k % size] += blocks[k];
  return HMM_OK;
}

bool close(double found, double expected, double tolerance) {
  return found == expected || std::fabs(found - expected) <= tolerance;
}

template <class Real> struct Exercise {
  Problem<Real> q;
  const Case &c = q.c;
  const size_t N = c.N, frames = size_t(c.B) * c.T, steps = c.T > 1 ? c.T - 1 : 0;
  const double wide = c.tolerance ? c.tolerance : sizeof(Real) == 4 ? 5e-6 : 1e-10;
  std::vector<Reference<Real>> expected;
  std::vector<Real> z, alpha, norm, centre;
  std::vector<int32_t> method;

  explicit Exercise(const Case &given)
      : q(given), z(c.B), alpha(frames * N, 77), norm(frames * N, 77), centre(frames, 77), method(c.B, -1) {
    for (int b = 0; b < c.B; b++) expected.emplace_back(q, b);
    const bool once = kSlow && c.N > 512;
    forward();
    backward(true);
    if (!once) backward(false);
    viterbi();
    sample(false);
    if (c.kind != kTimeVarying && c.forbidden == 0) sample(true);
    if (c.kind != kTimeVarying) return;
    q.p.sharing = HMM_BY_ENDS;
    forward();
    backward(true);
    if (!once) backward(false);
  }

  void check_z(int b) const {
    const double e = expected[b].z;
    CHECK(close(double(z[b]), e, (sizeof(Real) == 4 ? 2e-6 : 1e-13) * (1 + std::fabs(e))));
  }

  void forward() {
    CHECK(forward_pass(q.p, true, z.data(), alpha.data(), norm.data(), centre.data(), method.data()) == HMM_OK);
    for (int b = 0; b < c.B; b++) {
      CHECK(method[b] == (c.kind != kTimeVarying ? HMM_REDONE : q.p.sharing == HMM_BY_ENDS ? HMM_BOTH_ENDS : HMM_LOG_SPACE));
      check_z(b);
      for (int t = 0; t < c.T; t++) {
        double top = kNever, sum = 0;
        for (size_t j = 0; j < N; j++) {
          const size_t k = (size_t(b) * c.T + t) * N + j;
          top = std::fmax(top, double(alpha[k])), sum += std::fabs(double(norm[k]));
          CHECK(t < q.lengths[b] || (alpha[k] == 0 && norm[k] == 0 && centre[k / N] == 0));
        }
        const double spacing = c.kind == kTimeVarying ? 0 : 1e-6 * std::fabs(double(centre[size_t(b) * c.T + t]));
        if (expected[b].z > kNever && t < q.lengths[b]) CHECK(std::fabs(top) <= spacing);
      }
    }
    std::vector<Real> z_again(c.B, 77), alpha_again(frames * N, 77), norm_again(frames * N, 77), centre_again(frames, 77);
    std::vector<int32_t> mixed(c.B);
    for (int b = 0; b < c.B; b++) mixed[b] = b % 2 ? HMM_REDONE : HMM_SCALED;
    if (c.kind == kTimeVarying) return;
    CHECK(forward_pass(q.p, false, z_again.data(), alpha_again.data(), norm_again.data(), centre_again.data(), mixed.data()) == HMM_OK);
    for (int b = 0; b < c.B; b++) {
      CHECK(mixed[b] == (b % 2 ? HMM_REDONE : HMM_SCALED));
      CHECK(z_again[b] == (b % 2 ? z[b] : Real(77)));
      for (size_t k = 0; k < c.T * N; k++) CHECK(alpha_again[b * c.T * N + k] == (b % 2 ? alpha[b * c.T * N + k] : Real(77)));
    }
  }

  void backward(bool edges) {
    const bool varies = c.kind == kTimeVarying;
    const size_t blocks = varies ? c.B * steps : c.kind == kShared ? 1 : c.B;
    std::vector<Real> state(frames * N, 77), edge(edges ? blocks * N * N : 0, varies ? Real(77) : Real(.5));
    std::vector<int32_t> some = method;
    if (c.B > 6 && !varies) some[6] = HMM_SCALED;
    CHECK(backward_pass(q.p, q.grad.data(), z.data(), alpha.data(), norm.data(), centre.data(), some.data(), state.data(),
                        edges ? edge.data() : nullptr) == HMM_OK);
    std::vector<double> sums(edge.size(), varies ? 0 : .5);
    for (int b = 0; b < c.B; b++) {
      const bool done = varies || some[b] == HMM_REDONE;
      const double g = double(q.grad[b]);
      for (int t = 0; t < c.T; t++)
        for (size_t i = 0; i < N; i++) {
          const Real found = state[(size_t(b) * c.T + t) * N + i];
          if (!done) CHECK(found == 77);
          if (done) CHECK(close(double(found), t < q.lengths[b] ? g * expected[b].state(t, int(i)) : 0, wide * std::fmin(1, std::fabs(g)) * 1.5));
        }
      for (int t = 1; edges && t < q.lengths[b] && done; t++)
        for (size_t k = 0; k < N * N; k++)
          sums[(varies ? b * steps + t - 1 : blocks == 1 ? 0 : b) * N * N + k] += g * expected[b].edge(t, int(k / N), int(k % N));
    }
    for (size_t k = 0; k < edge.size(); k++) CHECK(close(double(edge[k]), sums[k], wide * (varies ? 1.5 : 1.5 * c.T)));
  }

  void viterbi() {
    std::vector<Real> score(c.B), delta(2 * c.B * N);
    std::vector<int16_t> pointers(frames * N);
    std::vector<int64_t> states(frames, 77);
    CHECK(hmm::viterbi<Real>(q.p, score.data(), delta.data(), pointers.data(), states.data(), nullptr) == HMM_OK);
    for (int b = 0; b < c.B; b++) {
      const double e = expected[b].score, tolerance = (sizeof(Real) == 4 ? 2e-6 : 1e-13) * (1 + std::fabs(e));
      CHECK(close(double(score[b]), e, tolerance));
      const int64_t *path = states.data() + size_t(b) * c.T;
      const int L = e > kNever ? int(q.lengths[b]) : 0;
      double own = 0;
      for (int t = 0; t < c.T; t++) {
        CHECK(t < L ? path[t] >= 0 && path[t] < c.N : path[t] == -1);
        if (t < L) own += q.local(b, t, int(path[t])) + (t ? q.arc(b, t, int(path[t - 1]), int(path[t])) : 0);
      }
      CHECK(L == 0 || close(own, e, 4 * tolerance + (sizeof(Real) == 4 ? 1e-6 * c.scale * c.T : 0)));
      if (c.integers && L) CHECK(std::vector<int64_t>(path, path + L) == expected[b].path());
    }
  }

  // Each draw lies, given the state after it, where the exact cumulative distribution says.
  void sample(bool scaled) {
    const int S = c.samples;
    std::vector<Real> uniform(S * frames), messages = alpha;
    std::vector<int32_t> how(c.B, scaled ? HMM_SCALED : method.empty() ? 0 : method[0]);
    std::vector<int64_t> states(S * frames, 77);
    std::mt19937 random(7);
    std::uniform_real_distribution<double> draws;
    for (Real &u : uniform) u = std::fmin(Real(draws(random)), Real(1) - std::numeric_limits<Real>::epsilon());
    if (!uniform.empty()) uniform[0] = 0, uniform.back() = Real(1) - std::numeric_limits<Real>::epsilon();
    if (scaled)
      for (Real &a : messages) a = std::exp(a) * Real(1 << 20);
    CHECK(hmm::sample<Real>(q.p, S, z.data(), messages.data(), norm.data(), how.data(), uniform.data(), states.data(), nullptr) == HMM_OK);
    for (int s = 0; s < S; s++)
      for (int b = 0; b < c.B; b++) {
        const int L = expected[b].z > kNever ? int(q.lengths[b]) : 0;
        const size_t row = (size_t(s) * c.B + b) * c.T;
        for (int t = 0; t < c.T; t++) CHECK(t < L ? states[row + t] >= 0 && states[row + t] < c.N : states[row + t] == -1);
        for (int t = L - 1; t >= 0; t--) {
          const int at = int(states[row + t]), next = t < L - 1 ? int(states[row + t + 1]) : -1;
          Sum total;
          for (int i = 0; i < c.N; i++) total.add(expected[b].forward[t * N + i] + (next >= 0 ? q.arc(b, t + 1, i, next) : 0));
          double before = 0, weight = 0;
          for (int i = 0; i <= at; i++) {
            before += weight;
            weight = std::exp(expected[b].forward[t * N + i] + (next >= 0 ? q.arc(b, t + 1, i, next) : 0) - total.log());
          }
          const double u = double(uniform[row + t]), slack = wide * 4;
          CHECK(weight > 0 && u >= before - slack && u <= before + weight + slack);
        }
      }
  }
};

template <class Real> void all() {
  const double far = sizeof(Real) == 4 ? 2e-3 : 1e-9;  // of scores about 1000, whose messages' spacing is 6e-5
  for (int N : {1, 2, 3, 31, 32, 33, 50, 64, 97, 130})
    for (Kind kind : {kShared, kPerSequence, kTimeVarying}) {
      const int B = kSlow ? 3 : N > 32 ? 4 : 8, T = kSlow ? (kind == kTimeVarying && N <= 64 ? 5 : 3) : N > 32 ? 4 : 7;
      if (kSlow && ((N + int(kind)) % 3 || N == 97)) continue;
      Exercise<Real>({.B = B, .T = T, .N = N, .kind = kind, .shift = N % 4});
      if (kSlow || (kind == kShared && N > 64)) continue;
      if (N % 2) Exercise<Real>({.B = B, .T = T, .N = N, .kind = kind, .scale = 2, .forbidden = .3, .integers = true});
      else if (N < 64) Exercise<Real>({.B = B, .T = T, .N = N, .kind = kind, .scale = 1000, .forbidden = .1, .tolerance = far});
    }
  Exercise<Real>({.B = 3, .T = 5, .N = 5, .kind = kTimeVarying, .extras = false, .shift = 1});
  if (!kSlow) Exercise<Real>({.B = 2, .T = 3, .N = 300, .kind = kTimeVarying, .shift = 1});
  Exercise<Real>({.B = 3, .T = 0, .N = 3, .kind = kTimeVarying});
  for (int T : {1, 2, 3}) Exercise<Real>({.B = kSlow ? 3 : 9, .T = T, .N = 5, .kind = kTimeVarying});
  Exercise<Real>({.B = 7, .T = 1, .N = 3, .kind = kShared});
  if (kSlow) Exercise<Real>({.B = 1, .T = 40, .N = 8, .kind = kShared});
  else Exercise<Real>({.B = 3, .T = 150, .N = 40, .kind = kShared});  // several buffers of pointers and of draws
  for (Kind kind : {kShared, kPerSequence}) Exercise<Real>({.B = 12, .T = 5, .N = 9, .kind = kind});  // edges of several are added
  Exercise<Real>({.B = 0, .T = 3, .N = 3, .kind = kShared});
}

// NaN and +inf inside a sequence: NaN out, and the neighbours unharmed.
template <class Real> void invalid(Real value, bool in_arcs, int32_t sharing) {
  Problem<Real> q({.B = 3, .T = 4, .N = 5, .kind = kTimeVarying});
  q.p.sharing = sharing;
  q.lengths = {4, 4, 4};
  for (auto *x : {&q.emission, &q.transition})
    for (Real &v : *x)
      if (v != v) v = 0;
  if (in_arcs) q.transition[3 * 25 + 1 * 25 + 7] = value;  // sequence 1
  else q.emission[20 + 12] = value;
  std::vector<Real> z(3), alpha(60), norm(60), centre(12), state(60), edge(9 * 25), score(3), delta(30);
  const std::vector<Real> grad(3, 1);
  std::vector<int32_t> method(3);
  std::vector<int16_t> pointers(60);
  std::vector<int64_t> states(12);
  CHECK(forward_pass<Real>(q.p, true, z.data(), alpha.data(), norm.data(), centre.data(), method.data()) == HMM_OK);
  CHECK(backward_pass<Real>(q.p, grad.data(), z.data(), alpha.data(), norm.data(), centre.data(), method.data(), state.data(), edge.data()) == HMM_OK);
  CHECK(hmm::viterbi<Real>(q.p, score.data(), delta.data(), pointers.data(), states.data(), nullptr) == HMM_OK);
  for (int k = 0; k < 60; k++) CHECK(std::isfinite(state[k]) == (k / 20 != 1));
  for (int k = 0; k < 9 * 25; k++) CHECK(std::isfinite(edge[k]) == (k / 75 != 1));
  for (int b = 0; b < 3; b++) CHECK(std::isnan(z[b]) == (b == 1) && std::isnan(score[b]) == (b == 1) && (states[b * 4] == -1) == (b == 1));
}

// One of three sequences whose edges are added is invalid: so is the sum.
template <class Real> void invalid_sum() {
  Problem<Real> q({.B = 3, .T = 3, .N = 9, .kind = kShared});
  q.lengths = {3, 3, 3};
  for (size_t k = 0; k < q.emission.size(); k++) q.emission[k] = k == 40 ? Real(NAN) : Real(k % 5);
  std::vector<Real> z(3), alpha(81), norm(81), centre(9), state(81), edge(81);
  const std::vector<Real> grad(3, 1);
  std::vector<int32_t> method(3);
  CHECK(forward_pass<Real>(q.p, true, z.data(), alpha.data(), norm.data(), centre.data(), method.data()) == HMM_OK);
  CHECK(backward_pass<Real>(q.p, grad.data(), z.data(), alpha.data(), norm.data(), centre.data(), method.data(), state.data(), edge.data()) == HMM_OK);
  for (int k = 0; k < 81; k++) CHECK(std::isnan(edge[k]) && std::isnan(state[k]) == (k / 27 == 1));
}

template <class Real> void large() {
  if (sizeof(Real) == 4) Exercise<Real>({.B = 1, .T = 3, .N = 515, .kind = kTimeVarying, .shift = 1, .samples = 1});
  if (!kSlow) Exercise<Real>({.B = 1, .T = 2, .N = 1030, .kind = kShared, .samples = 1});  // more than a tile of messages
}

}  // namespace

int main(int arguments, char **) {
  for (bool in_arcs : {false, true}) {
    for (int32_t sharing : {HMM_BY_SEQUENCES, HMM_BY_ENDS}) {
      invalid<float>(NAN, in_arcs, sharing), invalid<double>(NAN, in_arcs, sharing);
      invalid<float>(INFINITY, in_arcs, sharing), invalid<double>(INFINITY, in_arcs, sharing);
    }
  }
  invalid_sum<float>(), invalid_sum<double>();
  all<float>();
  all<double>();
  large<float>();
  large<double>();
  for (Kind kind : {kShared, kTimeVarying})
    if (arguments > 1) Exercise<float>({.B = 1, .T = 100000, .N = 4, .kind = kind, .samples = 0});
  return 0;
}
