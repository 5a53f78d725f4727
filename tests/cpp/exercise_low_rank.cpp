// Calls the low-rank part of the C interface on exact-sized heap arrays, for the sanitizers to watch: every tail of the
// vectors in states and classes, shared factors and one's own, lengths 0 to T, forbidden entries, several threads. What
// lies past a sequence's end holds NaN.
#include "exercise.h"

#define HMM_LOW_RANK(suffix, Real)                                       \
  template <> struct Functions<Real> {                                   \
    static constexpr auto forward = hmm_low_rank_forward_##suffix;       \
    static constexpr auto backward = hmm_low_rank_backward_##suffix;     \
    static constexpr double tolerance = sizeof(Real) == 4 ? 1e-4 : 1e-9; \
  };
HMM_LOW_RANK(f32, float)
HMM_LOW_RANK(f64, double)

template <class Real>
void exercise(int B, int T, int N, int R, bool shared, double forbidden, bool extras, int threads) {
  using F = Functions<Real>;
  std::mt19937 random(unsigned(B * 7919 + T * 104729 + N * 31 + R));
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  auto scores = [&](size_t n) {
    std::vector<Real> x(n);
    for (Real &v : x) v = Real(normal(random));
    return x;
  };
  const size_t block = size_t(2) * R * N, blocks = shared ? 1 : B, frames = size_t(B) * T;
  const std::vector<Real> initial = scores(extras ? size_t(B) * N : N), final = scores(N);
  std::vector<Real> emission = scores(frames * N), pairs(blocks * block), shift(blocks * N);
  for (Real &x : pairs) x = uniform(random) < forbidden ? Real(0) : Real(uniform(random));
  for (Real &x : shift) x = -Real(20 * uniform(random));
  std::vector<int64_t> lengths(B);
  for (int b = 0; b < B; b++) {
    lengths[b] = random() % (T + 1);
    for (size_t n = size_t(lengths[b]) * N; n < size_t(T) * N; n++)
      emission[size_t(b) * T * N + n] = std::numeric_limits<Real>::quiet_NaN();
  }
  hmm_low_rank p = {};
  p.chain.batch = B, p.chain.time = T, p.chain.states = N, p.chain.threads = threads;
  p.chain.initial = initial.data(), p.chain.initial_batch_stride = extras ? N : 0;
  p.chain.transition = pairs.data(), p.chain.transition_batch_stride = shared ? 0 : block;
  p.chain.emission = emission.data(), p.chain.final = extras ? final.data() : nullptr, p.chain.lengths = lengths.data();
  p.rank = R, p.shift = shift.data(), p.shift_batch_stride = shared ? 0 : N;
  p.least = 1e-6, p.mixing = forbidden == 0, p.wide = extras;

  std::vector<Real> alpha(frames * N), half(frames * R), grad(B), state(frames * N), classes(frames * R), leaving(frames * N);
  std::vector<double> z(B), again(B);
  std::vector<int32_t> method(B);
  for (int b = 0; b < B; b++) grad[b] = Real(b % 3 - 1);
  CHECK(F::forward(&p, z.data(), alpha.data(), half.data(), method.data()) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), alpha.data(), method.data(), state.data(), nullptr, nullptr) == HMM_OK);
  CHECK(F::backward(&p, grad.data(), alpha.data(), method.data(), state.data(), classes.data(), leaving.data()) == HMM_OK);
  for (int b = 0; b < B; b++) {
    const bool found = method[b] == HMM_SCALED;
    CHECK(std::isfinite(z[b]) && (found || method[b] == HMM_REDONE));
    if (forbidden == 0) CHECK(found);
    if (lengths[b] == 0 || !found) CHECK(z[b] == 0);
    const Real *mine = pairs.data() + (shared ? 0 : b * block);
    for (int t = 0; t < T; t++) {
      const size_t row = size_t(b) * T + t;
      const bool used = found && t < lengths[b] && grad[b] != 0;
      double sum = 0, left = 0, right = 0;
      for (int j = 0; j < N; j++) sum += double(state[row * N + j]);
      CHECK(std::fabs(sum - (used ? double(grad[b]) : 0)) < F::tolerance);
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) {
          left += double(mine[r * N + j]) * double(alpha[row * N + j]) * double(classes[row * R + r]);
          right += double(mine[(R + r) * N + j]) * double(half[row * R + r]) * double(leaving[row * N + j]);
        }
      CHECK(std::fabs(left - (used && t + 1 < lengths[b])) < F::tolerance);
      CHECK(std::fabs(right - (used && t > 0)) < F::tolerance);
    }
  }
  // The same again, bit for bit.
  std::vector<Real> other(frames * N), other_half(frames * R);
  CHECK(F::forward(&p, again.data(), other.data(), other_half.data(), method.data()) == HMM_OK);
  CHECK(again == z && other == alpha && other_half == half);
}

template <class Real> void all() {
  for (int N : {1, 2, 7, 8, 9, 15, 16, 17, 33, 70})
    for (int R : {1, 3, 16, 17, 33, 66})
      for (int B : {1, 3, 9})
        for (bool shared : {true, false}) {
          const int T = 1 + (N + B + R) % 6;
          exercise<Real>(B, T, N, R, shared, 0, B % 2, 1 + B % 3);
          exercise<Real>(B, T, N, R, shared, .4, true, 3);
        }
  exercise<Real>(4, 0, 3, 2, true, 0, true, 2);
  exercise<Real>(0, 3, 3, 2, true, 0, true, 2);
}

int main() {
  CHECK(hmm_abi_version() == HMM_ABI_VERSION);
  all<float>();
  if (kBothTypes) all<double>();
  float x[4] = {};
  double y[4] = {};
  int32_t method[1];
  const int64_t one[1] = {1};
  hmm_low_rank p = {};
  CHECK(hmm_low_rank_forward_f32(nullptr, y, x, x, method) == HMM_INVALID_ARGUMENT);
  CHECK(hmm_low_rank_forward_f32(&p, y, x, x, method) == HMM_INVALID_ARGUMENT);
  p.chain.batch = 1, p.chain.time = 1, p.chain.states = 1, p.chain.threads = 1, p.rank = 1;
  p.chain.initial = x, p.chain.transition = x, p.chain.lengths = one, p.shift = x;
  CHECK(hmm_low_rank_forward_f32(&p, y, x, x, method) == HMM_INVALID_ARGUMENT);  // no emission
  return 0;
}
