// Layer norms on a CPU: one, or the two of one input that a parallel residual has.
//
// Forward: mean, then the sum of (x - mean)^2, then every norm's output, three walks over a row that stays in the first-level cache; from
// memory it comes once. Backward, with s = (x - mean) rstd and slope = sum over the norms of gradient * weight:
//
//   dx = rstd (slope - mean(slope) - s mean(slope s));   dweight = sum over rows of gradient s;   dbias = sum over rows of gradient
//
// in two walks over a row of x and of each gradient. Sums over rows are kept per segment of 64 rows and added up in order, so that they
// do not depend on threads. Work: rows, or segments.
#include "layer_norm_cpu.h"

#include <algorithm>

#include "simd_math.h"
#include "storage_simd.h"

namespace sepllm {
namespace {

constexpr int64_t kSegment = 64;  // rows whose parameter gradients are summed together
constexpr int kSums = 4;          // independent sums, to hide the latency of adding

template <typename S>
using Wide = typename ComputedIn<S>::Type;

// Calls run(first column, number of the sum, whether it is a whole vector) for all vectors of a row.
template <typename T, typename Run>
SEPLLM_INLINE void for_vectors(int64_t size, Run run) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  int64_t i = 0;
  for (; i + kSums * kWidth <= size; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n) run(i + n * kWidth, n, std::true_type{});
  for (; i + kWidth <= size; i += kWidth) run(i, 0, std::true_type{});
  if (i < size) run(i, 0, std::false_type{});
}

// The vector at a column; lanes past the row's end are `rest`.
template <typename S, typename IsWhole>
SEPLLM_INLINE Vec<Wide<S>> read(const S* row, int64_t column, int64_t size, IsWhole, Wide<S> rest = 0) {
  if constexpr (IsWhole::value) return load_wide(row + column);
  return load_wide_part(row + column, size - column, rest);
}

template <typename S, typename IsWhole>
SEPLLM_INLINE void write(Vec<Wide<S>> x, S* row, int64_t column, int64_t size, IsWhole) {
  if constexpr (IsWhole::value)
    store_narrow(x, row + column);
  else
    store_narrow_part(x, size - column, row + column);
}

template <typename T>
SEPLLM_INLINE T total(const Vec<T>* sums) {
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename S>
Wide<S> mean_of(const S* x, int64_t size) {
  using T = Wide<S>;
  Vec<T> sums[kSums] = {};
  for_vectors<T>(size, [&](int64_t i, int n, auto whole) { sums[n] += read(x, i, size, whole); });
  return total<T>(sums) / static_cast<T>(size);
}

template <typename S>
Wide<S> squares_of(const S* x, int64_t size, Wide<S> mean) {
  using T = Wide<S>;
  Vec<T> sums[kSums] = {};
  for_vectors<T>(size, [&](int64_t i, int n, auto whole) {
    const Vec<T> centred = read(x, i, size, whole, mean) - mean;
    sums[n] += centred * centred;
  });
  return total<T>(sums);
}

template <typename S, int kNorms>
void forward_rows(const LayerNormForwardArgs& args, int64_t first, int64_t last) {
  using T = Wide<S>;
  const int64_t size = args.size;
  for (int64_t row = first; row < last; ++row) {
    const S* x = static_cast<const S*>(args.x) + row * size;
    const T mean = mean_of(x, size), rstd = rstd_of(squares_of(x, size, mean), size, args.epsilon);
    static_cast<T*>(args.mean)[row] = mean;
    static_cast<T*>(args.rstd)[row] = rstd;
    for_vectors<T>(size, [&](int64_t i, int, auto whole) {
      const Vec<T> standard = standardised(read(x, i, size, whole), mean, rstd);
      for (int norm = 0; norm < kNorms; ++norm) {
        const Vec<T> weight = read(static_cast<const T*>(args.weights[norm]), i, size, whole);
        const Vec<T> bias = read(static_cast<const T*>(args.biases[norm]), i, size, whole);
        write(standard * weight + bias, static_cast<S*>(args.outs[norm]) + row * size, i, size, whole);
      }
    });
  }
}

template <typename T>
int64_t padded(int64_t size) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  return (size + kWidth - 1) / kWidth * kWidth;
}

// Sums of one segment: of each norm the gradient of its weight, then of each that of its bias; rows of whole vectors.
template <typename T>
T* segment_of(const LayerNormBackwardArgs& args, int64_t segment) {
  return static_cast<T*>(args.partial) + segment * 2 * args.norms * padded<T>(args.size);
}

template <typename S, int kNorms>
void backward_row(const LayerNormBackwardArgs& args, int64_t row, Wide<S>* sums) {
  using T = Wide<S>;
  const int64_t size = args.size, sums_row = padded<T>(size);
  const S* x = static_cast<const S*>(args.x) + row * size;
  const S* grads[kNorms];
  for (int norm = 0; norm < kNorms; ++norm) grads[norm] = static_cast<const S*>(args.grads[norm]) + row * size;
  const T mean = static_cast<const T*>(args.mean)[row], rstd = static_cast<const T*>(args.rstd)[row];

  const auto slope_at = [&](int64_t i, auto whole) {
    Vec<T> slope{};
    for (int norm = 0; norm < kNorms; ++norm)
      slope += read(grads[norm], i, size, whole) * read(static_cast<const T*>(args.weights[norm]), i, size, whole);
    return slope;
  };
  Vec<T> slopes[kSums] = {}, slopes_standard[kSums] = {};
  for_vectors<T>(size, [&](int64_t i, int n, auto whole) {
    const Vec<T> standard = standardised(read(x, i, size, whole, mean), mean, rstd), slope = slope_at(i, whole);
    slopes[n] += slope;
    slopes_standard[n] += slope * standard;
    for (int norm = 0; norm < kNorms; ++norm) {
      const Vec<T> grad = read(grads[norm], i, size, whole);
      T *dweight = sums + norm * sums_row + i, *dbias = dweight + kNorms * sums_row;
      store(dweight, load(dweight) + grad * standard);
      store(dbias, load(dbias) + grad);
    }
  });
  const T mean_slope = total<T>(slopes) / static_cast<T>(size), mean_slope_standard = total<T>(slopes_standard) / static_cast<T>(size);
  for_vectors<T>(size, [&](int64_t i, int, auto whole) {
    const Vec<T> standard = standardised(read(x, i, size, whole), mean, rstd);
    write(input_gradient(standard, slope_at(i, whole), mean_slope, mean_slope_standard, rstd), static_cast<S*>(args.dx) + row * size, i, size, whole);
  });
}

template <typename S, int kNorms>
void backward_segments(const LayerNormBackwardArgs& args, int64_t first, int64_t last) {
  using T = Wide<S>;
  for (int64_t segment = first; segment < last; ++segment) {
    T* sums = segment_of<T>(args, segment);
    std::fill_n(sums, 2 * kNorms * padded<T>(args.size), T{0});
    for (int64_t row = segment * kSegment; row < std::min((segment + 1) * kSegment, args.rows); ++row) backward_row<S, kNorms>(args, row, sums);
  }
}

template <typename T>
void sum_array(const LayerNormBackwardArgs& args, int64_t array) {
  T* to = static_cast<T*>(array < args.norms ? args.dweights[array] : args.dbiases[array - args.norms]);
  std::fill_n(to, args.size, T{0});
  for (int64_t segment = 0; segment < layer_norm_segments(args.rows); ++segment) {
    const T* sums = segment_of<T>(args, segment) + array * padded<T>(args.size);
    for (int64_t i = 0; i < args.size; ++i) to[i] += sums[i];
  }
}

}  // namespace

void layer_norm(Storage storage, const LayerNormForwardArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.norms == 1 ? forward_rows<S, 1>(args, first_row, last_row) : forward_rows<S, 2>(args, first_row, last_row);
  });
}

int64_t layer_norm_segments(int64_t rows) { return (rows + kSegment - 1) / kSegment; }

int64_t layer_norm_partial_bytes(Storage storage, const LayerNormArgs& args) {
  const int64_t row_bytes = storage == Storage::kDouble ? padded<double>(args.size) * 8 : padded<float>(args.size) * 4;
  return layer_norm_segments(args.rows) * 2 * args.norms * row_bytes;
}

void layer_norm_backward(Storage storage, const LayerNormBackwardArgs& args, int64_t first_segment, int64_t last_segment) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.norms == 1 ? backward_segments<S, 1>(args, first_segment, last_segment) : backward_segments<S, 2>(args, first_segment, last_segment);
  });
}

void layer_norm_backward_sum(Storage storage, const LayerNormBackwardArgs& args, int64_t first_array, int64_t last_array) {
  for (int64_t array = first_array; array < last_array; ++array)
    storage == Storage::kDouble ? sum_array<double>(args, array) : sum_array<float>(args, array);
}

}  // namespace sepllm
