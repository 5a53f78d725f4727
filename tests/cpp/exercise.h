// What the exercise programs share: a check that ends the program, random scores, and functions by their type.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "hmm_speech.h"

#define CHECK(condition)                                                         \
  if (!(condition)) {                                                            \
    std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                                \
  }

#ifdef __SANITIZE_THREAD__
constexpr bool kBothTypes = false;  // threads meet alike in both, and ThreadSanitizer is slow
#else
constexpr bool kBothTypes = true;
#endif

// Functions<float>::forward is PREFIX_forward_f32, and so on.
template <class Real> struct Functions;
#define HMM_FUNCTIONS_OF(prefix, suffix, Real)                            \
  template <> struct Functions<Real> {                                   \
    static constexpr auto forward = prefix##_forward_##suffix;           \
    static constexpr auto backward = prefix##_backward_##suffix;         \
    static constexpr auto viterbi = prefix##_viterbi_##suffix;           \
    static constexpr auto sample = prefix##_sample_##suffix;             \
    static constexpr double tolerance = sizeof(Real) == 4 ? 1e-4 : 1e-9; \
  };
#define HMM_FUNCTIONS(prefix)           \
  HMM_FUNCTIONS_OF(prefix, f32, float)  \
  HMM_FUNCTIONS_OF(prefix, f64, double)

// Scores of a spread; a share of them is forbidden.
template <class Real> struct RandomScores {
  std::mt19937 &random;
  double scale, forbidden;
  std::normal_distribution<double> normal = {};
  std::uniform_real_distribution<double> uniform = {};

  std::vector<Real> operator()(size_t n) {
    std::vector<Real> x(n);
    for (Real &v : x) v = uniform(random) < forbidden ? -std::numeric_limits<Real>::infinity() : Real(scale * normal(random));
    return x;
  }
};
