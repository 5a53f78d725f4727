// Vectors of the widest registers that this translation unit is compiled for, through the compilers' vector extension:
// one source serves AVX-512, AVX2 and everything else. Intrinsics appear only where the extension has no word for the
// operation (masked memory access, scalef).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HMM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define HMM_VECTOR_BYTES 32
#else
#define HMM_VECTOR_BYTES 16
#endif
#define HMM_INLINE inline __attribute__((always_inline))
#define HMM_APART __attribute__((noinline))  // inner loops that must not share registers with what surrounds them

namespace {

template <class Real> struct Simd;

template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(HMM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(HMM_VECTOR_BYTES)));
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr float kRound = 12582912.f;      // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLowest = -87.33654f;     // log of the smallest normal number
  static constexpr float kFlushed = -88.f;         // 2^-127 or less: 0 here
  static constexpr float kHighest = 88.f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(HMM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(HMM_VECTOR_BYTES)));
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLowest = -708.39641853226408;
  static constexpr double kFlushed = -709.;
  static constexpr double kHighest = 709.;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

template <class Real> using Vec = typename Simd<Real>::V;
template <class Real> using Int = typename Simd<Real>::I;
template <class Real> constexpr int kLanes = HMM_VECTOR_BYTES / int(sizeof(Real));
template <class Real> constexpr Real kTiny = std::numeric_limits<Real>::min();  // the smallest normal number

// x - 0 is x even for -0, so that the compiler leaves a plain broadcast (0 + x is not).
template <class Real> HMM_INLINE Vec<Real> splat(Real x) { return x - Vec<Real>{}; }

template <class Real> HMM_INLINE Int<Real> splat_integer(int64_t n) {
  return Int<Real>{} + (decltype(Int<Real>{}[0]))n;
}

template <class Real> HMM_INLINE Vec<Real> load(const Real *p) {
  Vec<Real> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Real> HMM_INLINE void store(Real *p, Vec<Real> v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX2__) && !defined(__AVX512F__)
// All ones in the first n lanes, n less than the number of lanes. Lane by lane, parts of vectors went through memory: with
// them forward, backward and Viterbi took 1.4 to 2 times as long at N = 10, and at 50 1.2 to 1.4 times in one run, 0.9 to
// 1.1 in another (one core of a Zen 3, noisy).
HMM_INLINE __m256i first_lanes_of_8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 0 ? 0 : int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
HMM_INLINE __m256i first_lanes_of_4(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// The first n lanes from memory (n may be <= 0 or >= the number of lanes), `fill` in the others.
HMM_INLINE Vec<float> load_part(const float *p, int64_t n, float fill) {
  if (n >= kLanes<float>) return load(p);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), n <= 0 ? 0 : __mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i lanes = first_lanes_of_8(n);
  return (Vec<float>)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
#else
  Vec<float> v = splat(fill);
  for (int64_t k = 0; k < n; k++) v[k] = p[k];
  return v;
#endif
}
HMM_INLINE Vec<double> load_part(const double *p, int64_t n, double fill) {
  if (n >= kLanes<double>) return load(p);
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), n <= 0 ? 0 : __mmask8((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i lanes = first_lanes_of_4(n);
  return (Vec<double>)_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, lanes), _mm256_castsi256_pd(lanes));
#else
  Vec<double> v = splat(fill);
  for (int64_t k = 0; k < n; k++) v[k] = p[k];
  return v;
#endif
}
HMM_INLINE void store_part(float *p, int64_t n, Vec<float> v) {
  if (n >= kLanes<float>) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, n <= 0 ? 0 : __mmask16((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)  // in parts: a masked store is slow on AMD's
  if (n <= 0) return;
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1), p += 4;
  }
  if (n & 2) {
    _mm_storel_epi64((__m128i *)p, _mm_castps_si128(part));
    part = _mm_movehl_ps(part, part), p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
#else
  for (int64_t k = 0; k < n; k++) p[k] = v[k];
#endif
}
HMM_INLINE void store_part(double *p, int64_t n, Vec<double> v) {
  if (n >= kLanes<double>) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, n <= 0 ? 0 : __mmask8((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if (n <= 0) return;
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1), p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
#else
  for (int64_t k = 0; k < n; k++) p[k] = v[k];
#endif
}

// Input scores read as Real, widened where they are narrower (the float64 fallback reads float32 scores).
HMM_INLINE Vec<float> load_as(const float *p, int64_t n, float fill) { return load_part(p, n, fill); }
HMM_INLINE Vec<double> load_as(const double *p, int64_t n, double fill) { return load_part(p, n, fill); }
HMM_INLINE Vec<double> load_as(const float *p, int64_t n, double fill) {
  Vec<double> v = splat(fill);
  if (n >= kLanes<double>) {
    typedef float Half __attribute__((vector_size(HMM_VECTOR_BYTES / 2)));
    Half h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Vec<double>);
  }
  for (int64_t k = 0; k < n; k++) v[k] = p[k];
  return v;
}

template <class V> HMM_INLINE V larger(V a, V b) { return a > b ? a : b; }  // NaN in b is kept, NaN in a is not

// a + b by the multiplier, as a * 1 + b, which rounds alike. AMD's Zen 4 and 5 run it beside a maximum, which an addition
// would keep waiting: the two share ports.
HMM_INLINE Vec<float> sum_beside_max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(1), (__m512)b);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(1), (__m256)b);
#else
  return a + b;
#endif
}
HMM_INLINE Vec<double> sum_beside_max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, _mm512_set1_pd(1), (__m512d)b);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, _mm256_set1_pd(1), (__m256d)b);
#else
  return a + b;
#endif
}

template <class Real> HMM_INLINE Real sum_of(Vec<Real> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return _mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  } else {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
#else
  Real s = 0;
  for (int k = 0; k < kLanes<Real>; k++) s += v[k];
  return s;
#endif
}
// A square of vectors turned over its diagonal, through memory near at hand.
template <class Real> HMM_INLINE void transpose(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int W = kLanes<Real>;
  Real turned[W][W];
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) turned[j][i] = rows[i][j];
  std::memcpy(rows, turned, sizeof turned);
}
template <class Real> HMM_INLINE Real max_of(Vec<Real> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return _mm512_reduce_max_ps((__m512)v);
  else return _mm512_reduce_max_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  } else {
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
  }
#else
  for (int k = kLanes<Real> / 2; k > 0; k /= 2) {
    Vec<Real> other;  // the lanes k further
    for (int n = 0; n < kLanes<Real>; n++) other[n] = v[n ^ k];
    v = larger(v, other);
  }
  return v[0];
#endif
}
template <class Real> HMM_INLINE int64_t min_of(Int<Real> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return _mm512_reduce_min_epi32((__m512i)v);
  else return _mm512_reduce_min_epi64((__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    __m128i m = _mm_min_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    m = _mm_min_epi32(m, _mm_unpackhi_epi64(m, m));
    return _mm_cvtsi128_si32(_mm_min_epi32(m, _mm_srli_epi64(m, 32)));
  } else {
    const int64_t a = v[0] < v[1] ? v[0] : v[1], b = v[2] < v[3] ? v[2] : v[3];
    return a < b ? a : b;
  }
#else
  int64_t m = v[0];
  for (int k = 1; k < kLanes<Real>; k++) m = v[k] < m ? v[k] : m;
  return m;
#endif
}
template <class Real> HMM_INLINE bool any(Int<Real> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  for (int k = 0; k < kLanes<Real>; k++)
    if (mask[k]) return true;
  return false;
#endif
}

// The lanes of a that are greater than those of b, a bit each.
HMM_INLINE uint32_t lanes_greater(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  const Int<float> greater = a > b;
  uint32_t lanes = 0;
  for (int k = 0; k < kLanes<float>; k++) lanes |= uint32_t(greater[k] != 0) << k;
  return lanes;
#endif
}
HMM_INLINE uint32_t lanes_greater(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#else
  const Int<double> greater = a > b;
  uint32_t lanes = 0;
  for (int k = 0; k < kLanes<double>; k++) lanes |= uint32_t(greater[k] != 0) << k;
  return lanes;
#endif
}
template <class V> HMM_INLINE bool any_greater(V a, V b) { return lanes_greater(a, b) != 0; }

// exp(x) within 2 units in the last place for x up to 88 (float) or 709 (double); 0 below the smallest normal number,
// at -inf too; NaN stays NaN. Argument reduction x = n log 2 + r, |r| <= log(2)/2 (Cody and Waite), then a polynomial:
// the minimax coefficients of Cephes' expf, or Taylor's series to r^13, whose remainder is 4e-18.
template <class Real> HMM_INLINE Vec<Real> polynomial_of_exp(Vec<Real> r) {
  if constexpr (sizeof(Real) == 4) {
    Vec<float> p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + (r + 1.f);
  } else {
    constexpr double c[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                            1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1.,
                            1.};
    Vec<double> p = splat(1. / 6227020800.);
    for (int k = 0; k < 13; k++) p = p * r + c[k];
    return p;
  }
}
// The same for x within the range where nothing overflows and n is -127 (double: -1023) at least, for which it is 0.
template <class Real> HMM_INLINE Vec<Real> exp_within(Vec<Real> x) {
  using S = Simd<Real>;
  Vec<Real> t = x * Real(1.4426950408889634) + S::kRound;
  Vec<Real> n = t - S::kRound;
  Vec<Real> r = (x - n * S::kLn2High) - n * S::kLn2Low;
  Int<Real> bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits = (bits << S::kMantissa) + S::kOne;
  Vec<Real> power;
  std::memcpy(&power, &bits, sizeof power);
  return polynomial_of_exp<Real>(r) * power;
}
#if defined(__AVX512F__)
HMM_INLINE Vec<float> exp_by_scalef(Vec<float> x) {  // which needs no integer arithmetic, and flushes by itself
  __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.f), (__m512)x);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(Simd<float>::kLn2High), y);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(Simd<float>::kLn2Low), r);
  return (Vec<float>)_mm512_scalef_ps((__m512)polynomial_of_exp<float>((Vec<float>)r), n);
}
#endif
template <class Real> HMM_INLINE Vec<Real> exp(Vec<Real> x) {
  using S = Simd<Real>;
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return exp_by_scalef(x);
#endif
  const Vec<Real> y = larger(splat(S::kLowest), x), e = exp_within<Real>(y > S::kHighest ? splat(S::kHighest) : y);
  return x < S::kLowest ? Vec<Real>{} : e;
}
// exp(x) for x up to 1, lifted to kTiny where it is less, at -inf too. FlushToZero must live.
template <class Real> HMM_INLINE Vec<Real> lifted_exp(Vec<Real> x) {
  const Vec<Real> least = splat(kTiny<Real>);
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return larger(least, exp_by_scalef(x));
#endif
  return larger(least, exp_within<Real>(larger(splat(Simd<Real>::kFlushed), x)));
}

// log(x) for positive normal x. Float: mantissa in [1/sqrt(2), sqrt(2)) and Cephes' logf polynomial. Double: libm, lane
// by lane (it is called once a state, not once an arc).
HMM_INLINE Vec<double> log(Vec<double> x) {
  for (int k = 0; k < kLanes<double>; k++) x[k] = std::log(x[k]);
  return x;
}
HMM_INLINE Vec<float> log(Vec<float> x) {
  Int<float> bits;
  std::memcpy(&bits, &x, sizeof bits);
  Int<float> exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is 1/sqrt(2)
  bits -= exponent << 23;
  Vec<float> m;
  std::memcpy(&m, &bits, sizeof m);
  Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> f = m - 1.f, z = f * f;
  constexpr float c[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Vec<float> p = splat(7.0376836292e-2f);
  for (int k = 0; k < 8; k++) p = p * f + c[k];
  p = p * f * z + e * Simd<float>::kLn2Low - z * 0.5f;
  return x != x ? x : f + p + e * Simd<float>::kLn2High;
}

template <class Real> HMM_INLINE Int<Real> is_bad(Vec<Real> x) { return ~(x < std::numeric_limits<Real>::infinity()); }  // NaN or +inf
template <class Real> inline bool bad(Real x) { return !(x < std::numeric_limits<Real>::infinity()); }
template <class Real> inline bool any_bad(const Real *x, int64_t n) {
  Int<Real> found = {};
  for (int64_t k = 0; k < n; k += kLanes<Real>) found |= is_bad<Real>(load_part(x + k, n - k, Real(0)));
  return any<Real>(found);
}

// Results below the smallest normal number are flushed to zero while one of these lives: subnormal arithmetic is up to
// a hundred times slower, and the kernels treat what would be subnormal as lost anyway.
struct FlushToZero {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushToZero() { _mm_setcsr(saved | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved); }
#endif
};

}  // namespace
