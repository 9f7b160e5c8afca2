// The Gaussian error linear unit (arXiv 1606.08415) and its slope, of one number: what the CUDA kernels compute, and what the vectors of the
// CPU kernels are tested against.
//
//   erf:   x P(X <= x), X normal           tanh:   x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// Neither form subtracts nearly equal numbers for negative x, as 1 + erf and 1 + tanh do.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda.h"

namespace sepllm {

constexpr double kSqrt2OverPi = 0.7978845608028654, kSqrtHalf = 0.7071067811865476, kDensityAt0 = 0.3989422804014327, kCubic = 0.044715;

SEPLLM_HOST_DEVICE float gelu_exp(float x) { return expf(x); }
SEPLLM_HOST_DEVICE double gelu_exp(double x) { return exp(x); }
SEPLLM_HOST_DEVICE float complement_of_erf(float x) { return erfcf(x); }
SEPLLM_HOST_DEVICE double complement_of_erf(double x) { return erfc(x); }

// Of the tanh form: -2 u. Where it is more than 87 nothing passes; up to there its exponential is finite.
constexpr double kMostDecay = 87;

template <typename T>
SEPLLM_HOST_DEVICE T gelu_decay(T x) {
  return x * (T(1) + T(kCubic) * x * x) * T(-2 * kSqrt2OverPi);
}

// How much of x passes.
template <typename T>
SEPLLM_HOST_DEVICE T gelu_gate(T x, bool is_tanh) {
  if (!is_tanh) return T(0.5) * complement_of_erf(x * T(-kSqrtHalf));
  return gelu_decay(x) > T(kMostDecay) ? T(0) : T(1) / (T(1) + gelu_exp(gelu_decay(x)));
}

template <typename T>
SEPLLM_HOST_DEVICE T gelu(T x, bool is_tanh) {
  return x * gelu_gate(x, is_tanh);
}

// gate + x gate'. In the tanh form gate' = exp(-2 u) gate^2 (2 u)': 1 - gate would lose its digits.
template <typename T>
SEPLLM_HOST_DEVICE T gelu_slope(T x, bool is_tanh) {
  const T gate = gelu_gate(x, is_tanh);
  if (!is_tanh) return gate + x * T(kDensityAt0) * gelu_exp(T(-0.5) * x * x);
  if (gate == T(0)) return gate;
  return gate + x * (gelu_exp(gelu_decay(x)) * gate) * gate * (T(1) + T(3 * kCubic) * x * x) * T(2 * kSqrt2OverPi);
}

// x [rows, columns] contiguous; bias [columns], or null, and then rows are any cut of the elements, the last one maybe shorter.
struct GeluArgs {
  int64_t rows, columns, elements;
  bool is_tanh;
  const void *x, *bias;

  SEPLLM_HOST_DEVICE int64_t columns_of(int64_t row) const {
    const int64_t left = elements - row * columns;
    return left < columns ? left : columns;
  }
};

struct GeluForwardArgs : GeluArgs {
  void* out;
};

// dx like x. Without a bias there is no dbias [columns]; `partial` are the sums over segments of rows, in the type that is computed in.
struct GeluBackwardArgs : GeluArgs {
  const void* grad_out;
  void *dx, *dbias, *partial;
};

constexpr int64_t kGeluRowsPerSegment = 64;

SEPLLM_HOST_DEVICE int64_t gelu_segments(int64_t rows) { return (rows + kGeluRowsPerSegment - 1) / kGeluRowsPerSegment; }

}  // namespace sepllm
