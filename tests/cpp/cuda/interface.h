// A problem on exact-sized heap arrays, through the C interface of the kernels for GPUs, executed on the CPU (on_cpu.h),
// against the forward, backward and Viterbi recursions in float64.
#pragma once
#include "../exercise.h"

#include <algorithm>
#include <cstdint>

HMM_FUNCTIONS(hmm_cuda)

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
enum Kind { kShared, kPerSequence, kTimeVarying };

double log_sum(const std::vector<double> &x) {
  const double top = *std::max_element(x.begin(), x.end());
  if (top == kNever) return top;
  double sum = 0;
  for (double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

template <class Real> struct Exercise {
  int64_t B = 5, T, N;
  Kind kind;
  std::mt19937 random;
  std::vector<Real> initial, transition, emission, final, grad;
  std::vector<int64_t> lengths;
  std::vector<int32_t> method;  // of the pass from both ends, or in chunks
  int32_t chunk_frames = 0, warm_up = 0, warm_up_back = 0;
  hmm_problem p = {};

  Exercise(int64_t T, int64_t N, Kind kind, double scale, double forbidden) : T(T), N(N), kind(kind), random(unsigned(T * 100 + N + kind)) {
    RandomScores<Real> scores{random, scale, forbidden}, allowed{random, scale, 0};
    initial = allowed(B * N), final = allowed(N), emission = scores(B * T * N), grad = allowed(B);
    transition = scores((kind == kShared ? 1 : kind == kPerSequence ? B : B * (T - 1)) * N * N);
    lengths = {T, 0, 1, T - 1, T};
    for (int64_t b = 0; b < B; b++)
      std::fill(emission.begin() + (b * T + lengths[b]) * N, emission.begin() + (b + 1) * T * N, std::numeric_limits<Real>::quiet_NaN());
    std::fill_n(emission.begin() + 4 * T * N, N, -std::numeric_limits<Real>::infinity());  // infeasible
    p.batch = B, p.time = T, p.states = N, p.threads = 1, p.time_varying = kind == kTimeVarying;
    p.initial = initial.data(), p.initial_batch_stride = N, p.transition = transition.data(), p.emission = emission.data();
    p.final = final.data(), p.lengths = lengths.data();
    if (kind == kPerSequence) p.transition_batch_stride = N * N;
    if (kind == kTimeVarying) p.transition_batch_stride = (T - 1) * N * N, p.transition_time_stride = N * N;
  }

  int64_t arc(int64_t b, int64_t t, int64_t i, int64_t j) const {  // from t to t+1
    return b * p.transition_batch_stride + t * p.transition_time_stride + i * N + j;
  }
  double local(int64_t b, int64_t t, int64_t j) const {
    return double(emission[(b * T + t) * N + j]) + (t == 0 ? double(initial[b * N + j]) : 0) + (t == lengths[b] - 1 ? double(final[j]) : 0);
  }

  // Messages from either end (T, N), log Z and the best path's score.
  struct Exact {
    std::vector<double> alpha, beta, delta;
    double log_partition, best;
  };
  Exact exact(int64_t b) const {
    const int64_t L = lengths[b];
    Exact e{std::vector<double>(T * N), std::vector<double>(T * N), std::vector<double>(T * N), 0, 0};
    if (L == 0) return e;
    std::vector<double> ways(N), best(N);
    for (int64_t t = 0; t < L; t++)
      for (int64_t j = 0; j < N; j++) {
        for (int64_t i = 0; t > 0 && i < N; i++) {
          const double a = double(transition[arc(b, t - 1, i, j)]);
          ways[i] = e.alpha[(t - 1) * N + i] + a, best[i] = e.delta[(t - 1) * N + i] + a;
        }
        e.alpha[t * N + j] = local(b, t, j) + (t ? log_sum(ways) : 0);
        e.delta[t * N + j] = local(b, t, j) + (t ? *std::max_element(best.begin(), best.end()) : 0);
      }
    for (int64_t t = L - 2; t >= 0; t--)
      for (int64_t i = 0; i < N; i++) {
        for (int64_t j = 0; j < N; j++) ways[j] = double(transition[arc(b, t, i, j)]) + local(b, t + 1, j) + e.beta[(t + 1) * N + j];
        e.beta[t * N + i] = log_sum(ways);
      }
    e.log_partition = log_sum({e.alpha.begin() + (L - 1) * N, e.alpha.begin() + L * N});
    e.best = *std::max_element(e.delta.begin() + (L - 1) * N, e.delta.begin() + L * N);
    return e;
  }

  double path_score(int64_t b, const int64_t *states) const {
    double score = 0;
    for (int64_t t = 0; t < T; t++) {
      if (t >= lengths[b]) {
        CHECK(states[t] == -1);
        continue;
      }
      CHECK(states[t] >= 0 && states[t] < N);
      score += local(b, t, states[t]) + (t ? double(transition[arc(b, t - 1, states[t - 1], states[t])]) : 0);
    }
    return score;
  }

  void close(double found, double expected, double tolerance) const {
    const bool same = found == expected || std::abs(found - expected) <= tolerance * std::max(1.0, std::abs(expected));
    if (!same) std::fprintf(stderr, "T %ld, N %ld, kind %d, %zu bytes: %g, expected %g\n", long(T), long(N), kind, sizeof(Real), found, expected);
    CHECK(same);
  }

  void run(bool paths = true) {
    using F = Functions<Real>;
    const double tolerance = F::tolerance;
    hmm_problem halves = p;  // samples are drawn from messages of whole sequences
    halves.sharing = HMM_BY_ENDS, halves.chunk_frames = chunk_frames, halves.warm_up = warm_up;
    std::vector<Real> log_partition(B), whole(B), alpha(B * T * N), norm(B * T * N), centre(B * T), state(B * T * N), edge(transition.size());
    method.resize(B);
    const auto workspace = [&](const hmm_problem &of, int pass) { return std::vector<double>((hmm_cuda_workspace(&of, sizeof(Real), pass) + 7) / 8); };
    std::vector<double> room = workspace(halves, HMM_CUDA_FORWARD);
    CHECK(F::forward(&halves, log_partition.data(), alpha.data(), norm.data(), centre.data(), method.data(), room.data(), nullptr) == HMM_OK);
    halves.warm_up = warm_up_back;
    room = workspace(halves, HMM_CUDA_BACKWARD);
    CHECK(F::backward(&halves, grad.data(), log_partition.data(), alpha.data(), norm.data(), centre.data(), method.data(), state.data(),
                      edge.data(), room.data(), nullptr) == HMM_OK);
    std::vector<int32_t> whole_method(B);
    const int64_t S = 2;
    std::vector<Real> score(B), delta(2 * B * N), uniform(S * B * T);
    std::vector<int16_t> pointers(B * T * N);
    std::vector<int64_t> states(B * T), drawn(S * B * T);
    std::uniform_real_distribution<double> unit;
    for (Real &u : uniform) u = std::min(Real(unit(random)), Real(0.999));
    if (paths) CHECK(F::viterbi(&p, score.data(), delta.data(), pointers.data(), states.data(), nullptr) == HMM_OK);
    room = workspace(p, HMM_CUDA_FORWARD);
    CHECK(F::forward(&p, whole.data(), alpha.data(), norm.data(), centre.data(), whole_method.data(), room.data(), nullptr) == HMM_OK);
    if (paths) CHECK(F::sample(&p, S, log_partition.data(), alpha.data(), norm.data(), whole_method.data(), uniform.data(), drawn.data(), nullptr) == HMM_OK);

    std::vector<double> expected_edge(edge.size());
    for (int64_t b = 0; b < B; b++) {
      const Exact e = exact(b);
      close(double(log_partition[b]), e.log_partition, tolerance), close(double(whole[b]), e.log_partition, tolerance);
      const bool feasible = e.log_partition > kNever;
      for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < N; i++) {
          const bool inside = feasible && t < lengths[b];
          const double a = inside ? e.alpha[t * N + i] - e.log_partition : kNever;
          close(double(state[(b * T + t) * N + i]), inside ? double(grad[b]) * std::exp(a + e.beta[t * N + i]) : 0, tolerance);
          for (int64_t j = 0; inside && t + 1 < lengths[b] && j < N; j++) {
            const int64_t k = arc(b, t, i, j);
            expected_edge[k] += double(grad[b]) * std::exp(a + double(transition[k]) + local(b, t + 1, j) + e.beta[(t + 1) * N + j]);
          }
        }
      if (!paths) continue;
      close(double(score[b]), e.best, tolerance);
      for (int64_t s = 0; feasible && s < S; s++) CHECK(path_score(b, &drawn[(s * B + b) * T]) > kNever);
      if (feasible) close(path_score(b, &states[b * T]), e.best, tolerance);
      for (int64_t t = 0; !feasible && t < T; t++) CHECK(states[b * T + t] == -1 && drawn[b * T + t] == -1);
    }
    for (size_t k = 0; k < edge.size(); k++) close(double(edge[k]), expected_edge[k], tolerance);
  }
};

}  // namespace
