// Vectors as wide as the registers that the compiler was told of, and the few functions that the kernels need of them. GCC's and
// Clang's vector extension, so that one source serves AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

namespace sepllm {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr bool kHas32Registers = true;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr bool kHas32Registers = false;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr bool kHas32Registers = true;
#else
constexpr int kVectorBytes = 16;
constexpr bool kHas32Registers = false;
#endif

#define SEPLLM_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 4;
};

template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 8;
};

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
using IntVec = typename Simd<T>::IntVec;

template <typename T>
SEPLLM_INLINE Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
SEPLLM_INLINE void store(T* to, Vec<T> x) {
  std::memcpy(to, &x, sizeof(x));
}

template <typename T>
SEPLLM_INLINE IntVec<T> load_int(const typename Simd<T>::Int* from) {
  IntVec<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// All lanes x.
template <typename T>
SEPLLM_INLINE Vec<T> fill(T x) {
  return x - Vec<T>{};
}

// 2^f for f in [-1/2, 1/2]. The coefficients of float minimise the largest relative error (Remez; 7.5e-8 before rounding), those of
// double are ln(2)^n / n! (the first term left out is 4e-18).
template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kLowest = -126.f, kMagic = 12582912.f;  // 1.5 * 2^23
  static constexpr int kMantissaBits = 23, kTerms = 6;
  static constexpr float kCoefficients[kTerms] = {1.32764721678e-3f, 9.67554133102e-3f, 5.55071327288e-2f,
                                                  2.4022119724e-1f,  6.93146967065e-1f, 1.00000007165f};
};

template <>
struct Exp2<double> {
  static constexpr double kLowest = -1022., kMagic = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52, kTerms = 14;
  static constexpr double kCoefficients[kTerms] = {
      1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.0549116208011234e-09, 1.0178086009239699e-07,
      1.3215486790144307e-06, 1.5252733804059841e-05, 1.5403530393381608e-04, 1.3333558146428443e-03, 9.6181291076284772e-03,
      5.5504108664821580e-02, 2.4022650695910072e-01, 6.9314718055994531e-01, 1.0};
};

// 2^x for x <= 127, right to about two units in the last place. What lies below the smallest normal exponent counts as that one (next
// to the largest term of a row it is nothing); NaN stays NaN. Adding the magic number leaves the nearest integer k in the low bits,
// from where it is shifted into the exponent of 2^(x - k): no branch, no table, no conversion.
template <typename T>
SEPLLM_INLINE Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
  const Vec<T> lowest = fill<T>(E::kLowest), magic = fill<T>(E::kMagic);
  x = x < lowest ? lowest : x;
  const Vec<T> shifted = x + magic;
  const Vec<T> f = x - (shifted - magic);
  Vec<T> p = fill<T>(E::kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < E::kTerms; ++i) p = p * f + E::kCoefficients[i];
  IntVec<T> bits, k;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&k, &shifted, sizeof(k));
  bits += k << E::kMantissaBits;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// x[i][j] <-> x[j][i] of a square of vectors, by exchanging halves, quarters, ... of pairs.
template <typename T>
SEPLLM_INLINE void transpose(Vec<T>* x) {
  constexpr int kWidth = Simd<T>::kWidth;
#pragma GCC unroll 8
  for (int step = 1; step < kWidth; step *= 2) {
#if defined(__clang__)
    for (int i = 0; i < kWidth; ++i)
      if (!(i & step)) {
        const Vec<T> a = x[i], b = x[i + step];
        for (int l = 0; l < kWidth; ++l) {
          x[i][l] = l & step ? b[l - step] : a[l];
          x[i + step][l] = l & step ? b[l] : a[l + step];
        }
      }
#else
    IntVec<T> first{}, second{};
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
      first[l] = l & step ? kWidth + l - step : l;
      second[l] = l & step ? kWidth + l : l + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (!(i & step)) {
        const Vec<T> a = x[i], b = x[i + step];
        x[i] = __builtin_shuffle(a, b, first);
        x[i + step] = __builtin_shuffle(a, b, second);
      }
#endif
  }
}

// C[MR, NV vectors] = or += A B. Element (m, k) of A stands at a[m * a_row + k * a_depth]; rows of B and C are contiguous.
// A's elements are broadcast, so neither A nor its transpose needs packing; MR * NV sums stay in registers.
template <typename T, int MR, int NV, bool kAccumulate>
SEPLLM_INLINE void multiply(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_row, T* c, int64_t c_row) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vec<T> sums[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[m][n] = kAccumulate ? load(c + m * c_row + n * kWidth) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load(b + k * b_row + n * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const T x = a[m * a_row + k * a_depth];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * c_row + n * kWidth, sums[m][n]);
}

}  // namespace sepllm
