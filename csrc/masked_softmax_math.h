// The arithmetic of a softmax over the keys that a query reads, of one score: what the CUDA kernels compute, and the CPU kernel's in vectors.
#pragma once

#include "cross_entropy_math.h"

namespace sepllm {

// -inf, which weighs nothing, where the key is not read, whatever its score.
template <typename T>
SEPLLM_HOST_DEVICE T score_of(T x, bool is_read, T scale) {
  return is_read ? x * scale : static_cast<T>(-INFINITY);
}

// 0 in a row that reads nothing.
template <typename T>
SEPLLM_HOST_DEVICE T probability_of(T score, RowSum<T> sum) {
  return sum.total == T(0) ? T(0) : weight(score, sum.maximum) / sum.total;
}

// What a key adds to the row's sum of p dp: nothing where it is not read, whatever its dp.
template <typename T>
SEPLLM_HOST_DEVICE T share_of(T p, T dp) {
  return p == T(0) ? T(0) : p * dp;
}

template <typename T>
SEPLLM_HOST_DEVICE T score_gradient(T p, T dp, T shares, T scale) {
  return p == T(0) ? T(0) : p * (dp - shares) * scale;
}

// scores and weights [rows, columns] contiguous, rows [B, N, T]; the mask's elements of a row are adjacent, its rows stand by strides.
struct MaskedSoftmaxArgs {
  int64_t heads, queries, rows, columns;
  double scale;
};

struct MaskedSoftmaxForwardArgs : MaskedSoftmaxArgs {
  const void* scores;
  const bool* is_read;
  int64_t batch_stride, head_stride, query_stride;  // of is_read
  void* weights;

  SEPLLM_HOST_DEVICE const bool* mask_of(int64_t row) const {
    return is_read + row / queries / heads * batch_stride + row / queries % heads * head_stride + row % queries * query_stride;
  }
};

struct MaskedSoftmaxBackwardArgs : MaskedSoftmaxArgs {
  const void *weights, *grad_weights;
  void* grad_scores;
};

}  // namespace sepllm
