// Softmax cross-entropy on a CPU: of each row its maximum and the sum of its exponentials, and from these its gradient.
//
// Statistics walk over a row in blocks that stay in the first-level cache: the block's maximum, then the sum of exp(x - maximum) with the
// sum so far rescaled where the maximum rose (arXiv 1805.02867). The row is read from memory once. The gradient
//
//   exp(x - maximum) grad / total - [x is the label's] grad
//
// is read and written once, in place if wanted, in float whatever the dtype. Work: rows. Nothing is allocated.
#include "cross_entropy_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd_math.h"
#include "storage_simd.h"

namespace sepllm {
namespace {

constexpr int64_t kBlock = 2048;  // elements
constexpr int kSums = 4;          // independent sums, to hide the latency of adding

template <typename S, typename T = typename ComputedIn<S>::Type>
T maximum_of(const S* x, int64_t count) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  const T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> maxima[kSums];
  for (Vec<T>& maximum : maxima) maximum = fill<T>(lowest);
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n) maxima[n] = larger<T>(load_wide(x + i + n * kWidth), maxima[n]);
  for (; i < count; i += kWidth) maxima[0] = larger<T>(load_wide_part(x + i, count - i, lowest), maxima[0]);
  return largest_of<T>(larger<T>(larger<T>(maxima[0], maxima[1]), larger<T>(maxima[2], maxima[3])));
}

template <typename S, typename T = typename ComputedIn<S>::Type>
T total_of(const S* x, int64_t count, T maximum) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  const T lowest = -std::numeric_limits<T>::infinity();
  const T subtracted = maximum == lowest ? 0 : maximum;  // of a row without any finite logit: exp(-inf) = 0, not NaN
  Vec<T> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n) sums[n] += exp_or_zero<T>(load_wide(x + i + n * kWidth) - subtracted);
  for (; i < count; i += kWidth) sums[0] += exp_or_zero<T>(load_wide_part(x + i, count - i, lowest) - subtracted);
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename S, typename T = typename ComputedIn<S>::Type>
RowSum<T> sum_of_row(const S* x, int64_t count) {
  RowSum<T> sum = empty_sum<T>();
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    const T maximum = maximum_of(x + start, size);
    sum = merged(sum, RowSum<T>{maximum, total_of(x + start, size, maximum)});
  }
  return sum;
}

template <typename S, typename T = typename ComputedIn<S>::Type>
void write_row(const S* x, int64_t count, T maximum, T factor, S* to) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n) store_narrow(exp_or_zero<T>(load_wide(x + i + n * kWidth) - maximum) * factor, to + i + n * kWidth);
  for (; i < count; i += kWidth) {
    const int64_t size = std::min(kWidth, count - i);
    store_narrow_part(exp_or_zero<T>(load_wide_part(x + i, size, T{0}) - maximum) * factor, size, to + i);
  }
}

template <typename S>
void statistics(const StatisticsArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t row = first; row < last; ++row) {
    const S* logits = static_cast<const S*>(args.logits) + row * args.row_stride;
    const RowSum<T> sum = sum_of_row(logits, args.columns);
    const int64_t column = args.labels[row] - args.first_label;
    static_cast<T*>(args.maximum)[row] = sum.maximum;
    static_cast<T*>(args.total)[row] = sum.total;
    static_cast<T*>(args.target)[row] = target_of(logits, column, args.columns, args.is_shard);
  }
}

template <typename S>
void gradient(const GradientArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t row = first; row < last; ++row) {
    const S* logits = static_cast<const S*>(args.logits) + row * args.row_stride;
    S* to = static_cast<S*>(args.gradient) + row * args.gradient_row_stride;
    const T grad = static_cast<const T*>(args.grad_losses)[row];
    if (grad == 0) {
      std::fill_n(to, args.columns, S{});
      continue;
    }
    const T maximum = static_cast<const T*>(args.maximum)[row], total = static_cast<const T*>(args.total)[row];
    const int64_t column = args.labels[row] - args.first_label;
    const bool has_label = is_column(column, args.columns);
    const T of_label = has_label ? gradient_of<T>(widen(logits[column]), maximum, grad / total, grad, true) : T{0};
    write_row(logits, args.columns, maximum, grad / total, to);
    if (has_label) narrow(of_label, to + column);
  }
}

}  // namespace

void cross_entropy_statistics(Storage storage, const StatisticsArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) { statistics<decltype(zero)>(args, first_row, last_row); });
}

void cross_entropy_gradient(Storage storage, const GradientArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) { gradient<decltype(zero)>(args, first_row, last_row); });
}

}  // namespace sepllm
