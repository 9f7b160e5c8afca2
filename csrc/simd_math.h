// Functions of vectors beyond simd.h's power of two, and sums across the lanes of one.
#pragma once

#include "simd.h"

namespace sepllm {

template <typename T>
SEPLLM_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {  // y where x is NaN
  return x > y ? x : y;
}

template <typename T>
SEPLLM_INLINE T largest_of(Vec<T> x) {
  T largest = x[0];
  for (int lane = 1; lane < Simd<T>::kWidth; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

template <typename T>
SEPLLM_INLINE T sum_of(Vec<T> x) {
  T sum = 0;
  for (int lane = 0; lane < Simd<T>::kWidth; ++lane) sum += x[lane];
  return sum;
}

// e^r for |r| <= ln(2) / 2, both leading coefficients 1 so that e^0 is 1. Those of float minimise the largest relative error (3.1e-9
// before rounding), those of double are 1 / n! (the first term left out is 5e-18). ln(2) in two parts, the first with zeros at its end so
// that small multiples of it are exact.
template <typename T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float kLowest = -87.33654f, kLog2E = 1.44269502f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  static constexpr int kTerms = 5;
  static constexpr float kCoefficients[kTerms] = {1.3814467238262296e-3f, 8.368780836462975e-3f, 4.166839271783829e-2f, 1.666651964187622e-1f,
                                                  4.999999403953552e-1f};
};

template <>
struct Exp<double> {
  static constexpr double kLowest = -708.39641853226408, kLog2E = 1.4426950408889634, kLn2High = 6.93147180369123816490e-1,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kTerms = 12;
  static constexpr double kCoefficients[kTerms] = {1.6059043836821613e-10, 2.0876756987868099e-09, 2.5052108385441719e-08, 2.7557319223985891e-07,
                                                   2.7557319223985893e-06, 2.4801587301587302e-05, 1.9841269841269841e-04, 1.3888888888888889e-03,
                                                   8.3333333333333333e-03, 4.1666666666666664e-02, 1.6666666666666666e-01, 0.5};
};

// e^x for x <= 88, right to about one unit in the last place; 0 where that is less than the smallest normal number; NaN stays NaN. The
// nearest multiple of ln(2) is found as in exp2.
template <typename T>
SEPLLM_INLINE Vec<T> exp_or_zero(Vec<T> x) {
  using E = Exp<T>;
  const Vec<T> lowest = fill<T>(E::kLowest), magic = fill<T>(Exp2<T>::kMagic);
  const Vec<T> inside = x < lowest ? lowest : x;
  const Vec<T> shifted = inside * E::kLog2E + magic;
  const Vec<T> count = shifted - magic;
  const Vec<T> r = (inside - count * E::kLn2High) - count * E::kLn2Low;
  Vec<T> p = fill<T>(E::kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < E::kTerms; ++i) p = p * r + E::kCoefficients[i];
  p = (p * r + T{1}) * r + T{1};
  IntVec<T> bits, k;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&k, &shifted, sizeof(k));
  bits += k << Exp2<T>::kMantissaBits;
  std::memcpy(&p, &bits, sizeof(p));
  return x < lowest ? Vec<T>{} : p;
}

}  // namespace sepllm
