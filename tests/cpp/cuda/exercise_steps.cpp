// The sweep that goes a step at a time, with the matrix products done here, against the same problem in log space.
#include "../exercise.h"

namespace {

#ifdef __SANITIZE_THREAD__
constexpr int64_t kFrames = 2;  // a thread's step takes a hundred times as long
#else
constexpr int64_t kFrames = 5;
#endif

template <class Real> struct Steps;
#define STEPS(suffix, Real)                                                   \
  template <> struct Steps<Real> {                                            \
    static constexpr auto forward = hmm_cuda_forward_##suffix;                \
    static constexpr auto backward = hmm_cuda_backward_##suffix;              \
    static constexpr auto begin = hmm_cuda_steps_begin_##suffix;              \
    static constexpr auto step = hmm_cuda_steps_forward_##suffix;             \
    static constexpr auto end = hmm_cuda_steps_end_##suffix;                  \
    static constexpr auto back_begin = hmm_cuda_steps_back_begin_##suffix;    \
    static constexpr auto back = hmm_cuda_steps_backward_##suffix;            \
    static constexpr auto back_end = hmm_cuda_steps_back_end_##suffix;        \
    static constexpr double tolerance = sizeof(Real) == 4 ? 2e-5 : 1e-10;     \
  };
STEPS(f32, float)
STEPS(f64, double)

// product = message A, or message A^T; of the second half, if there is one, by the other of the two.
template <class Real>
void multiply(const std::vector<Real> &message, const Real *arcs, bool transposed, int64_t B, int64_t N, std::vector<Real> &product) {
  for (int64_t b = 0; b < int64_t(message.size()) / N; b++)
    for (int64_t j = 0; j < N; j++) {
      double sum = 0;
      for (int64_t i = 0; i < N; i++)
        sum += double(message[b * N + i]) * double(transposed != (b >= B) ? arcs[j * N + i] : arcs[i * N + j]);
      product[b * N + j] = Real(sum);
    }
}

template <class Real> struct Passes {
  std::vector<Real> log_partition, alpha, norm, centre, state, edge;
  std::vector<int32_t> method;
  Passes(int64_t B, int64_t T, int64_t N)
      : log_partition(B), alpha(B * T * N), norm(B * T * N), centre(B * T), state(B * T * N), edge(N * N), method(B) {}
};

template <class Real> struct Exercise {
  using F = Steps<Real>;
  int64_t N, B = 3, T = kFrames;
  std::mt19937 random{unsigned(N)};
  std::vector<Real> initial, transition, emission, final, grad;
  std::vector<int64_t> lengths = {T, 0, T - 1};
  hmm_problem p = {};
  std::vector<double> room;

  Exercise(int64_t states, double forbidden, double scale) : N(states) {
    RandomScores<Real> scores{random, scale, forbidden}, allowed{random, 1, 0};
    initial = allowed(N), transition = scores(N * N), emission = allowed(B * T * N), final = allowed(N), grad = allowed(B);
    p.batch = B, p.time = T, p.states = N, p.threads = 1;
    p.initial = initial.data(), p.transition = transition.data(), p.emission = emission.data(), p.final = final.data();
    p.lengths = lengths.data();
    CHECK(hmm_cuda_in_steps(&p, sizeof(Real)) == 1);
  }

  void *workspace(int pass) {
    room.assign(hmm_cuda_workspace(&p, sizeof(Real), pass) / 8 + 1, 0);
    return room.data();
  }

  // The launches that a CUDA graph of `captured` steps has, as often as it takes; or each step once, for 0.
  template <class Step, class Product> void walk(int64_t steps, int64_t captured, bool first_too, std::vector<char> &held, Step step, Product product) {
    for (int64_t s = 0; captured == 0 && s < steps; s++) {
      if (s || first_too) product();
      CHECK(step(&p, s, held.data(), nullptr) == HMM_OK);
    }
    for (int64_t replayed = 0; captured && replayed < steps; replayed += captured) {
      for (int64_t s = 0; s < captured; s++) {
        product();
        CHECK(step(&p, s, held.data(), nullptr) == HMM_OK);
      }
      CHECK(hmm_cuda_steps_advance(captured, held.data(), nullptr) == HMM_OK);
    }
  }

  Passes<Real> in_steps(bool both_ends, int64_t captured) {
    p.sharing = both_ends ? HMM_BY_ENDS : HMM_BY_SEQUENCES;
    const int64_t steps = both_ends ? (T + 1) / 2 : T, halves = both_ends ? 2 : 1;
    Passes<Real> x(B, T, N);
    std::vector<Real> product(halves * B * N, std::numeric_limits<Real>::quiet_NaN()), message = product;
    std::vector<char> held(HMM_CUDA_WALK_BYTES);
    const auto multiplied = [&](bool transposed) {
      return [&, transposed] { multiply(message, reinterpret_cast<const Real *>(room.data()), transposed, B, N, product); };
    };
    void *w = workspace(HMM_CUDA_FORWARD);
    CHECK(F::begin(&p, x.alpha.data(), x.norm.data(), x.centre.data(), product.data(), message.data(), held.data(), w, nullptr) == HMM_OK);
    walk(steps, captured, false, held, F::step, multiplied(false));
    CHECK(F::end(&p, x.log_partition.data(), x.alpha.data(), x.norm.data(), x.centre.data(), x.method.data(), w, nullptr) == HMM_OK);
    w = workspace(HMM_CUDA_BACKWARD);
    CHECK(F::back_begin(&p, grad.data(), x.alpha.data(), x.norm.data(), x.centre.data(), x.method.data(), x.state.data(), product.data(),
                        message.data(), held.data(), w, nullptr) == HMM_OK);
    walk(steps, captured, both_ends, held, F::back, multiplied(true));
    CHECK(F::back_end(&p, grad.data(), x.log_partition.data(), x.alpha.data(), x.norm.data(), x.centre.data(), x.method.data(),
                      x.state.data(), x.edge.data(), w, nullptr) == HMM_OK);
    return x;
  }

  Passes<Real> in_log_space() {
    Passes<Real> x(B, T, N);
    CHECK(F::forward(&p, x.log_partition.data(), x.alpha.data(), x.norm.data(), x.centre.data(), x.method.data(),
                     workspace(HMM_CUDA_FORWARD), nullptr) == HMM_OK);
    CHECK(F::backward(&p, grad.data(), x.log_partition.data(), x.alpha.data(), x.norm.data(), x.centre.data(), x.method.data(),
                      x.state.data(), x.edge.data(), workspace(HMM_CUDA_BACKWARD), nullptr) == HMM_OK);
    return x;
  }
};

template <class Real> void exercise(int64_t N, double forbidden, double scale) {
  using F = Steps<Real>;
  Exercise<Real> e(N, forbidden, scale);
  const Passes<Real> x = e.in_log_space();
  const auto close = [](const std::vector<Real> &found, const std::vector<Real> &wanted) {
    for (size_t k = 0; k < wanted.size(); k++)
      CHECK(std::fabs(double(found[k]) - double(wanted[k])) <= F::tolerance * (1 + std::fabs(double(wanted[k]))));
  };
  for (bool both_ends : {false, true}) {
    const Passes<Real> steps = e.in_steps(both_ends, 0), replayed = e.in_steps(both_ends, 2);
    CHECK(steps.log_partition == replayed.log_partition && steps.state == replayed.state && steps.edge == replayed.edge);
    close(steps.log_partition, x.log_partition), close(steps.state, x.state), close(steps.edge, x.edge);
    const int32_t kept = both_ends ? HMM_BOTH_ENDS : HMM_SCALED;
    for (int64_t b = 0; b < e.B; b++) CHECK(steps.method[b] == (scale < 100 || e.lengths[b] == 0 ? kept : HMM_REDONE));
  }
}

}  // namespace

int main() {
  exercise<double>(97, .3, 1);
  if (kFrames < 5) return 0;
  exercise<float>(259, 0, 1);
  exercise<float>(258, 0, 150);  // arcs out of range: all is done again in log space
}
