// Softmax of scaled scores over the keys that each query reads, on a CPU. A row is scaled and masked into a buffer of the type that is computed
// in, which stays in the cache while its maximum, its exponentials and their sum are found; then the weights are written. Scores, mask and
// weights cross memory once. The backward reads weights and their gradient twice, the second time from the cache:
//
//   ds = p (dp - sum p dp) scale
//
// Work: rows. Memory per task: one row.
#include "masked_softmax_cpu.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd_math.h"
#include "storage_simd.h"

namespace sepllm {
namespace {

// Which of a vector's keys are read, as all bits of its lanes; those beyond `count` are not.
template <typename T>
SEPLLM_INLINE IntVec<T> lanes_read(const bool* is_read, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(Simd<T>::kWidth)));
  Bytes bytes{};
  if (count >= Simd<T>::kWidth)
    std::memcpy(&bytes, is_read, sizeof(bytes));
  else
    std::memcpy(&bytes, is_read, static_cast<size_t>(count));
  return __builtin_convertvector(bytes, IntVec<T>) != 0;
}

template <typename S, typename T = typename ComputedIn<S>::Type>
void forward_row(const S* scores, const bool* is_read, int64_t columns, T scale, T* buffer, S* weights) {
  const T nothing = -std::numeric_limits<T>::infinity();
  Vec<T> maxima = fill<T>(nothing);
  each_vector<T>(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    const Vec<T> score = lanes_read<T>(is_read + column, count) ? load_some(scores + column, count) * scale : fill<T>(nothing);
    maxima = larger<T>(score, maxima);
    store<T>(buffer + column, score);
  });
  const T maximum = largest_of<T>(maxima), subtracted = maximum == nothing ? T{0} : maximum;
  Vec<T> sums{};
  each_vector<T>(columns, [&](int64_t column, int64_t) __attribute__((always_inline)) {
    const Vec<T> e = exp_or_zero<T>(load(buffer + column) - subtracted);
    sums += e;
    store<T>(buffer + column, e);
  });
  const T total = sum_of<T>(sums), factor = total == 0 ? T{0} : T{1} / total;
  each_vector<T>(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    store_some(load(buffer + column) * factor, count, weights + column);
  });
}

template <typename S, typename T = typename ComputedIn<S>::Type>
void backward_row(const S* weights, const S* grad_weights, int64_t columns, T scale, S* grad_scores) {
  Vec<T> shares{};
  each_vector<T>(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    const Vec<T> p = load_some(weights + column, count);
    shares += p == T{0} ? Vec<T>{} : p * load_some(grad_weights + column, count);
  });
  const T share = sum_of<T>(shares);
  each_vector<T>(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    const Vec<T> p = load_some(weights + column, count);
    store_some(p == T{0} ? Vec<T>{} : p * (load_some(grad_weights + column, count) - share) * scale, count, grad_scores + column);
  });
}

template <typename S>
void forward(const MaskedSoftmaxForwardArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  std::vector<T> buffer(static_cast<size_t>(args.columns + Simd<T>::kWidth));
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * args.columns;
    forward_row(static_cast<const S*>(args.scores) + at, args.mask_of(row), args.columns, static_cast<T>(args.scale), buffer.data(),
                static_cast<S*>(args.weights) + at);
  }
}

template <typename S>
void backward(const MaskedSoftmaxBackwardArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * args.columns;
    backward_row(static_cast<const S*>(args.weights) + at, static_cast<const S*>(args.grad_weights) + at, args.columns, static_cast<T>(args.scale),
                 static_cast<S*>(args.grad_scores) + at);
  }
}

}  // namespace

void masked_softmax(Storage storage, const MaskedSoftmaxForwardArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) { forward<decltype(zero)>(args, first_row, last_row); });
}

void masked_softmax_backward(Storage storage, const MaskedSoftmaxBackwardArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) { backward<decltype(zero)>(args, first_row, last_row); });
}

}  // namespace sepllm
