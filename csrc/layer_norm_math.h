// The arithmetic of layer norms (arXiv 1607.06450) of one element, a number or a vector of them: what the CPU and CUDA kernels compute.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda.h"

namespace sepllm {

SEPLLM_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
SEPLLM_HOST_DEVICE double square_root(double x) { return sqrt(x); }

// One over the standard deviation, of the sum of (x - mean)^2 over a row.
template <typename T>
SEPLLM_HOST_DEVICE T rstd_of(T squares, int64_t size, double epsilon) {
  return T{1} / square_root(squares / static_cast<T>(size) + static_cast<T>(epsilon));
}

template <typename V, typename T>
SEPLLM_HOST_DEVICE V standardised(V x, T mean, T rstd) {
  return (x - mean) * rstd;
}

// Of x, where slope is the gradient of standardised(x): the sum over the norms of gradient * weight.
template <typename V, typename T>
SEPLLM_HOST_DEVICE V input_gradient(V standard, V slope, T mean_slope, T mean_slope_standard, T rstd) {
  return (slope - mean_slope - standard * mean_slope_standard) * rstd;
}

// One or two norms of the same rows [rows, size], contiguous; they differ in weights and biases [size] only.
constexpr int kMostNorms = 2;

struct LayerNormArgs {
  int64_t rows, size;
  int norms;
  double epsilon;
  const void *x, *weights[kMostNorms], *biases[kMostNorms];
  bool has_wide_parameters;  // in the type that is computed in, not in the dtype of x
};

// outs like x; mean and rstd [rows] in the type that is computed in.
struct LayerNormForwardArgs : LayerNormArgs {
  void *outs[kMostNorms], *mean, *rstd;
};

// dx like x, gradients of parameters like those; partial: see the kernels.
struct LayerNormBackwardArgs : LayerNormArgs {
  const void *grads[kMostNorms], *mean, *rstd;
  void *dx, *dweights[kMostNorms], *dbiases[kMostNorms], *partial;
};

}  // namespace sepllm
