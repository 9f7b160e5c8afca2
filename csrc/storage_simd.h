// Vectors of the type that is computed in, from and to rows of any storage; whole ones, and the part of one that ends a row.
#pragma once

#include <algorithm>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "simd.h"
#include "storage.h"

namespace sepllm {

SEPLLM_INLINE Vec<float> load_wide(const float* from) { return load(from); }
SEPLLM_INLINE Vec<double> load_wide(const double* from) { return load(from); }
SEPLLM_INLINE void store_narrow(Vec<float> x, float* to) { store(to, x); }
SEPLLM_INLINE void store_narrow(Vec<double> x, double* to) { store(to, x); }

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

SEPLLM_INLINE Vec<float> load_wide(const BFloat16* from) {
  HalfWords halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words bits = __builtin_convertvector(halves, Words) << 16;
  Vec<float> x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

SEPLLM_INLINE void store_narrow(Vec<float> x, BFloat16* to) {
  Words bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfWords halves = __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, HalfWords);
  std::memcpy(to, &halves, sizeof(halves));
}

#if defined(SEPLLM_HAS_HALF)
typedef Half HalfVec __attribute__((vector_size(kVectorBytes / 2)));

// By hand, because GCC 12 converts a vector of halves element by element.
SEPLLM_INLINE Vec<float> load_wide(const Half* from) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  HalfVec halves;
  std::memcpy(&halves, from, sizeof(halves));
  return __builtin_convertvector(halves, Vec<float>);
#endif
}

SEPLLM_INLINE void store_narrow(Vec<float> x, Half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const HalfVec halves = __builtin_convertvector(x, HalfVec);
  std::memcpy(to, &halves, sizeof(halves));
#endif
}
#endif

// As many elements as there are up to a whole vector; the other lanes are `rest`.
template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_INLINE Vec<T> load_wide_part(const S* from, int64_t count, T rest) {
  T x[Simd<T>::kWidth];
  std::fill_n(x, Simd<T>::kWidth, rest);
  for (int64_t i = 0; i < std::min<int64_t>(count, Simd<T>::kWidth); ++i) x[i] = widen(from[i]);
  return load(x);
}

template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_INLINE void store_narrow_part(Vec<T> x, int64_t count, S* to) {
  for (int64_t i = 0; i < std::min<int64_t>(count, Simd<T>::kWidth); ++i) narrow(x[i], to + i);
}

// The same for a count that is known to be a whole vector's only where this is inlined.
template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_INLINE Vec<T> load_some(const S* from, int64_t count) {
  return count >= Simd<T>::kWidth ? load_wide(from) : load_wide_part(from, count, T{0});
}

template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_INLINE void store_some(Vec<T> x, int64_t count, S* to) {
  if (count >= Simd<T>::kWidth)
    store_narrow(x, to);
  else
    store_narrow_part(x, count, to);
}

// Calls run(column, count) for the vectors of a row: whole ones, then what is left.
template <typename T, typename Run>
SEPLLM_INLINE void each_vector(int64_t columns, Run run) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) run(column, kWidth);
  if (column < columns) run(column, columns - column);
}

}  // namespace sepllm
