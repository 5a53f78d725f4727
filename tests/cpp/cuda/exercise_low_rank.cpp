// Chains through two factors, with the products done here, against sums over all arcs in float64: shared factors and
// each sequence's own, lengths 0 to T, steps one by one and as a CUDA graph repeats them, and sequences that are lost.
#include "../exercise.h"

#include <algorithm>
#include <cstdint>

namespace {

#ifdef __SANITIZE_THREAD__
constexpr bool kSlow = true;
#else
constexpr bool kSlow = false;
#endif
constexpr double kNever = -std::numeric_limits<double>::infinity();

template <class Real> struct LowRank;
#define LOW_RANK(suffix, Real)                                                \
  template <> struct LowRank<Real> {                                          \
    static constexpr auto begin = hmm_cuda_low_rank_begin_##suffix;           \
    static constexpr auto step = hmm_cuda_low_rank_forward_##suffix;          \
    static constexpr auto end = hmm_cuda_low_rank_end_##suffix;               \
    static constexpr auto back_begin = hmm_cuda_low_rank_back_begin_##suffix; \
    static constexpr auto back = hmm_cuda_low_rank_backward_##suffix;         \
    static constexpr auto back_end = hmm_cuda_low_rank_back_end_##suffix;     \
    static constexpr double tolerance = sizeof(Real) == 4 ? 2e-5 : 1e-10;     \
  };
LOW_RANK(f32, float)
LOW_RANK(f64, double)

// log sum_k exp(x(k)), k < n.
template <class Score> double log_sum(int64_t n, Score x) {
  double top = kNever, sum = 0;
  for (int64_t k = 0; k < n; k++) top = std::max(top, x(k));
  for (int64_t k = 0; k < n && top > kNever; k++) sum += std::exp(x(k) - top);
  return top == kNever ? top : top + std::log(sum);
}

template <class Real> struct Exercise {
  using F = LowRank<Real>;
  int64_t B, T, N, R;
  bool shared;
  std::mt19937 random;
  std::vector<Real> initial, factors, pairs, shift, emission, final, grad;
  std::vector<double> top, demands;
  std::vector<int64_t> lengths;
  hmm_cuda_low_rank p = {};
  std::vector<double> room;
  // Outputs.
  std::vector<Real> log_partition, alpha, half, state, classes, leaving, edge;
  std::vector<int32_t> method;

  Exercise(int64_t batch, int64_t time, int64_t states, int64_t rank, bool one, double forbidden, double scale)
      : B(batch), T(time), N(states), R(rank), shared(one), random(unsigned(batch * 1000 + states * 10 + rank)) {
    RandomScores<Real> scores{random, 1, forbidden}, allowed{random, 1, 0};
    initial = scores(B * N), factors = scores((one ? 1 : B) * 2 * R * N), emission = allowed(B * T * N), final = allowed(N);
    for (int64_t b = 0; b < B; b++) {
      lengths.push_back(b == 0 ? T : b == 1 ? 0 : b == 2 ? 1 : T - 1);
      grad.push_back(Real(b % 4 == 3 ? -1.5 : 1));
      initial[b * N] = 0;
      for (int64_t k = 0; k < T * N; k++)
        emission[b * T * N + k] = k < lengths[b] * N ? Real(double(emission[b * T * N + k]) * (b % 2 ? scale : 1))
                                                     : std::numeric_limits<Real>::quiet_NaN();
    }
    make_ready();
    p.chain.batch = B, p.chain.time = T, p.chain.states = N, p.rank = R, p.chain.threads = 1;
    p.chain.initial = initial.data(), p.chain.initial_batch_stride = N, p.chain.final = final.data();
    p.chain.transition = pairs.data(), p.chain.transition_batch_stride = one ? 0 : 2 * R * N, p.scores = factors.data();
    p.chain.emission = emission.data(), p.chain.lengths = lengths.data();
    p.shift = shift.data(), p.shift_batch_stride = one ? 0 : N, p.top = top.data(), p.top_batch_stride = one ? 0 : 1;
    p.demands = demands.data();
  }

  // As Factors of hmm_speech/hmm/low_rank_ops.py.
  void make_ready() {
    double lowest_left = 0;
    pairs.resize(factors.size());
    for (int64_t m = 0; m < int64_t(factors.size()) / (2 * R * N); m++) {
      const Real *left = factors.data() + m * 2 * R * N, *right = left + R * N;
      std::vector<double> c(N, kNever), of_class(R, kNever);
      const auto finite = [](double x) { return x == kNever ? 0 : x; };
      for (int64_t r = 0; r < R; r++) {
        for (int64_t i = 0; i < N; i++) of_class[r] = std::max(of_class[r], double(left[r * N + i]));
        of_class[r] = finite(of_class[r]);
        for (int64_t j = 0; j < N; j++) c[j] = std::max(c[j], double(right[r * N + j]) + of_class[r]);
      }
      double all = kNever;
      for (double &x : c) x = std::rint(finite(x) * 64) / 64, all = std::max(all, x);
      for (double x : c) shift.push_back(Real(x - all));
      top.push_back(all);
      for (int64_t k = 0; k < R * N; k++) {
        const double l = double(left[k]) - of_class[k / N];
        lowest_left = std::min(lowest_left, l);
        pairs[m * 2 * R * N + k] = Real(std::exp(l));
        pairs[m * 2 * R * N + R * N + k] = Real(std::exp(double(right[k]) + of_class[k / N] - c[k % N]));
      }
    }
    const double m = sizeof(Real) == 4 ? 126 : 1022, bits = sizeof(Real) == 4 ? 24 : 53;
    const double size = std::log2(double(T * N * R)), needed = size - lowest_left / std::log(2.) + 32 - m + bits;
    const bool mixing = needed <= 14;
    demands = {std::exp2(std::max(mixing ? needed : kNever, size + 62 - m + bits)), double(mixing)};
  }

  // y = x times the transposed rows of one factor, (to, from), or its rows, (from, to).
  void multiply(const std::vector<Real> &x, int64_t from, std::vector<Real> &y, int64_t to, int64_t offset, bool rows) {
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < to; k++) {
        const Real *matrix = pairs.data() + b * p.chain.transition_batch_stride + offset;
        double sum = 0;
        for (int64_t l = 0; l < from; l++) sum += double(x[b * from + l]) * double(matrix[rows ? l * to + k : k * from + l]);
        y[b * to + k] = Real(sum);
      }
  }

  template <class Step> void walk(int64_t captured, Step step, void *held, std::vector<Real> *buffers, bool back) {
    const int64_t second = R * N;
    for (int64_t s = 0, replayed = 0; replayed < T; s++) {
      if (s || captured) {
        multiply(buffers[0], N, buffers[1], R, back ? second : 0, false);
        multiply(buffers[1], R, buffers[2], N, back ? 0 : second, true);
      }
      CHECK(step(&p, s, held, nullptr) == HMM_OK);
      if (!captured) replayed++;
      else if (s + 1 == captured) {
        CHECK(hmm_cuda_steps_advance(captured, held, nullptr) == HMM_OK);
        s = -1, replayed += captured;
      }
    }
  }

  void run(int64_t captured, bool edges) {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    std::vector<Real> buffers[3] = {std::vector<Real>(B * N, nan), std::vector<Real>(B * R, nan), std::vector<Real>(B * N, nan)};
    Real *message = buffers[0].data(), *between = buffers[1].data(), *product = buffers[2].data();
    std::vector<char> held(HMM_CUDA_WALK_BYTES);
    const auto workspace = [&](int pass) {
      room.assign(hmm_cuda_low_rank_workspace(&p, sizeof(Real), pass) / 8, 77.);
      return room.data();
    };
    log_partition.assign(B, 77), alpha.assign(B * T * N, 77), half.assign(B * T * R, 77), method.assign(B, -1);
    state.assign(B * T * N, 77), classes.assign(B * T * R, 77), leaving.assign(B * T * N, 77), edge.assign(edges ? factors.size() : 0, 0);
    void *w = workspace(HMM_CUDA_FORWARD);
    CHECK(F::begin(&p, alpha.data(), half.data(), between, product, message, held.data(), w, nullptr) == HMM_OK);
    walk(captured, F::step, held.data(), buffers, false);
    CHECK(F::end(&p, log_partition.data(), alpha.data(), half.data(), method.data(), w, nullptr) == HMM_OK);
    w = workspace(HMM_CUDA_BACKWARD);
    CHECK(F::back_begin(&p, grad.data(), alpha.data(), method.data(), state.data(), classes.data(), leaving.data(), between,
                        product, message, held.data(), w, nullptr) == HMM_OK);
    walk(captured, F::back, held.data(), buffers, true);
    for (int64_t k = 0; edges && k < int64_t(B * T); k++)
      for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < N; j++) {
          const int64_t b = k / T, matrix = b * p.chain.transition_batch_stride, left = matrix + r * N + j, right = left + R * N;
          edge[left] += grad[b] * pairs[left] * (alpha[k * N + j] * classes[k * R + r]);
          edge[right] += grad[b] * pairs[right] * (half[k * R + r] * leaving[k * N + j]);
        }
    CHECK(F::back_end(&p, grad.data(), log_partition.data(), method.data(), state.data(), edges ? edge.data() : nullptr,
                      classes.data(), leaving.data(), w, nullptr) == HMM_OK);
  }

  double local(int64_t b, int64_t t, int64_t j) const {
    return double(emission[(b * T + t) * N + j]) + (t ? 0 : double(initial[b * N + j])) + (t == lengths[b] - 1 ? double(final[j]) : 0);
  }

  void close(double found, double expected, double scale = 1) const {
    const bool same = found == expected || std::abs(found - expected) <= F::tolerance * scale * std::max(1., std::abs(expected));
    if (!same) std::fprintf(stderr, "B %ld, T %ld, N %ld, R %ld, %zu bytes: %g, expected %g\n", long(B), long(T), long(N), long(R), sizeof(Real), found, expected);
    CHECK(same);
  }

  // By the definition, with messages of states and classes in log space.
  void check() const {
    std::vector<double> counts(edge.size());
    for (int64_t b = 0; b < B; b++) {
      const int64_t L = lengths[b], matrix = b * p.chain.transition_batch_stride;
      const Real *left = factors.data() + matrix, *right = left + R * N;
      std::vector<double> a(L * N), u(L * R), back(L * N), v(L * R);
      for (int64_t j = 0; L && j < N; j++) a[j] = local(b, 0, j);
      for (int64_t t = 1; t < L; t++) {
        for (int64_t r = 0; r < R; r++)
          u[t * R + r] = log_sum(N, [&](int64_t i) { return a[(t - 1) * N + i] + double(left[r * N + i]); });
        for (int64_t j = 0; j < N; j++)
          a[t * N + j] = local(b, t, j) + log_sum(R, [&](int64_t r) { return u[t * R + r] + double(right[r * N + j]); });
      }
      for (int64_t t = L - 2; t >= 0; t--) {
        for (int64_t r = 0; r < R; r++)
          v[t * R + r] = log_sum(N, [&](int64_t j) { return double(right[r * N + j]) + local(b, t + 1, j) + back[(t + 1) * N + j]; });
        for (int64_t i = 0; i < N; i++)
          back[t * N + i] = log_sum(R, [&](int64_t r) { return double(left[r * N + i]) + v[t * R + r]; });
      }
      const double z = L ? log_sum(N, [&](int64_t j) { return a[(L - 1) * N + j]; }) : 0, g = double(grad[b]);
      close(double(log_partition[b]), z);
      for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < N; i++)
          close(double(state[(b * T + t) * N + i]), t < L && z > kNever ? g * std::exp(a[t * N + i] + back[t * N + i] - z) : 0);
      for (int64_t t = 1; !edge.empty() && z > kNever && t < L; t++)
        for (int64_t r = 0; r < R; r++)
          for (int64_t j = 0; j < N; j++) {
            counts[matrix + r * N + j] += g * std::exp(a[(t - 1) * N + j] + double(left[r * N + j]) + v[(t - 1) * R + r] - z);
            counts[matrix + (R + r) * N + j] += g * std::exp(u[t * R + r] + double(right[r * N + j]) + local(b, t, j) + back[t * N + j] - z);
          }
    }
    for (size_t k = 0; k < edge.size(); k++) close(double(edge[k]), counts[k], 2);
  }
};

template <class Real> void exercise(int64_t B, int64_t T, int64_t N, int64_t R, bool shared, double forbidden, double scale) {
  Exercise<Real> e(B, T, N, R, shared, forbidden, scale);
  e.run(0, true);
  e.check();
  for (int64_t b = 0; b < B; b++) {
    if (scale == 1 || b % 2 == 0) CHECK(e.method[b] == HMM_SCALED);
    if (scale > 100 && b == 3) CHECK(e.method[b] == HMM_REDONE);
  }
  const auto z = e.log_partition, state = e.state, edge = e.edge;
  e.run(2, true);
  CHECK(z == e.log_partition && state == e.state && edge == e.edge);
  if (kSlow) return;
  e.run(0, false);
  CHECK(z == e.log_partition && state == e.state);
}

}  // namespace

int main() {
  exercise<float>(4, 3, 9, 3, true, .2, 800);
  exercise<float>(4, 3, 5, 2, false, 0, 1);
  if (kSlow) return 0;
  for (bool shared : {true, false}) {
    exercise<double>(4, 5, 33, 8, shared, .3, 2000);
    exercise<float>(4, 5, 40, 17, shared, .3, 800);
    exercise<float>(1, 1, 1, 1, shared, 0, 1);
  }
  exercise<float>(4, 4, 521, 2, true, 0, 1);
  exercise<double>(4, 3, 6, 35, true, .2, 1);
}
