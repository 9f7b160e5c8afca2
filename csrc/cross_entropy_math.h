// The arithmetic of softmax cross-entropy, one element at a time: what the CUDA kernel computes, and the CPU kernel beside its vectors.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda.h"
#include "storage.h"

namespace sepllm {

// Of some elements of a row: the largest, and the sum of exp(x - maximum).
template <typename T>
struct RowSum {
  T maximum, total;
};

template <typename T>
SEPLLM_HOST_DEVICE RowSum<T> empty_sum() {
  return {static_cast<T>(-INFINITY), T{0}};
}

SEPLLM_HOST_DEVICE float exponential(float x) { return expf(x); }
SEPLLM_HOST_DEVICE double exponential(double x) { return exp(x); }

// exp(x - maximum), and 0 for -inf even where the maximum is -inf too. NaN gives NaN.
template <typename T>
SEPLLM_HOST_DEVICE T weight(T x, T maximum) {
  return x == static_cast<T>(-INFINITY) ? T{0} : exponential(x - maximum);
}

template <typename T>
SEPLLM_HOST_DEVICE RowSum<T> merged(RowSum<T> a, RowSum<T> b) {
  const T maximum = b.maximum > a.maximum ? b.maximum : a.maximum;
  return {maximum, a.total * weight(a.maximum, maximum) + b.total * weight(b.maximum, maximum)};
}

// Adds a few elements at once: at most one rescaling of the sum.
template <int kCount, typename T>
SEPLLM_HOST_DEVICE RowSum<T> added(RowSum<T> sum, const T (&x)[kCount]) {
  T maximum = sum.maximum;
  for (int i = 0; i < kCount; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  T total = maximum > sum.maximum ? sum.total * weight(sum.maximum, maximum) : sum.total;
  for (int i = 0; i < kCount; ++i) total += weight(x[i], maximum);
  return {maximum, total};
}

// Whether a label, less the shard's first, is one of the shard's columns.
SEPLLM_HOST_DEVICE bool is_column(int64_t column, int64_t columns) { return column >= 0 && column < columns; }

// The logit of a row's label; of one that is not in the row: 0 where the row is a shard, NaN where it is all.
template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_HOST_DEVICE T target_of(const S* row, int64_t column, int64_t columns, bool is_shard) {
  if (is_column(column, columns)) return widen(row[column]);
  return is_shard ? T{0} : static_cast<T>(NAN);
}

// Of the loss times grad, in the logit x of a row with this maximum; factor is grad / total.
template <typename T>
SEPLLM_HOST_DEVICE T gradient_of(T x, T maximum, T factor, T grad, bool is_label) {
  const T weighted = exponential(x - maximum) * factor;
  return is_label ? weighted - grad : weighted;
}

// logits [rows, columns], elements of a row adjacent; column c is the vocabulary's first_label + c. labels [rows],
// all of them among the columns unless these are a shard.
struct CrossEntropyArgs {
  int64_t rows, columns, row_stride, first_label;
  const void* logits;
  const int64_t* labels;
  bool is_shard;
};

// All [rows], float (double for double): the largest logit, the sum of exp(logit - maximum), and the label's logit or 0 where the label
// is not among the columns.
struct StatisticsArgs : CrossEntropyArgs {
  void *maximum, *total, *target;
};

// gradient [rows, columns] of the logits' dtype, which may be the logits themselves; statistics as above, of all shards together.
struct GradientArgs : CrossEntropyArgs {
  const void *maximum, *total, *grad_losses;
  void* gradient;
  int64_t gradient_row_stride;
};

}  // namespace sepllm
