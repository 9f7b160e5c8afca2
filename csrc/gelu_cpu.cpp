// Bias + GELU on a CPU (arXiv 1606.08415). The forward reads x and writes the output; the backward computes the sum of x and bias again, reads
// x and the gradient, writes dx, and sums the bias's gradient over segments of rows, which are added up in order: the same bits whatever the
// number of threads. Arithmetic is float whatever the dtype (double for double). Work: rows, or segments of rows.
//
// The normal distribution's tail is exp(-x^2 / 2) times a polynomial of t = 1 / (1 + 0.35 |x|) on which its relative error is least (4e-8
// before rounding); for double it is the C library's erfc.
#include "gelu_cpu.h"

#include <algorithm>
#include <cmath>

#include "simd_math.h"
#include "storage_simd.h"

namespace sepllm {
namespace {

// How much of x passes, and how fast that rises.
template <typename T>
struct Gate {
  Vec<T> passes, slope;
};

constexpr float kTailScale = 0.35f;
constexpr int kTailTerms = 8;
constexpr float kTail[kTailTerms] = {-0.02890103869140148f, 0.11398328840732574f,  -0.13969632983207703f, 0.017390290275216103f,
                                     -0.004440163262188435f, 0.10059016942977905f, 0.2205287367105484f,   0.3603779673576355f};

// exp(-x^2 / 2) is passed in.
SEPLLM_INLINE Vec<float> normal_below(Vec<float> x, Vec<float> bell) {
  const Vec<float> t = 1.f / (1.f + kTailScale * (x < 0.f ? -x : x));
  Vec<float> p = fill<float>(kTail[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kTailTerms; ++i) p = p * t + kTail[i];
  const Vec<float> tail = bell * t * ((t - 1.f) * p + 0.5f);
  return x < 0.f ? tail : 1.f - tail;
}

SEPLLM_INLINE Vec<double> normal_below(Vec<double> x, Vec<double>) {
  for (int lane = 0; lane < Simd<double>::kWidth; ++lane) x[lane] = gelu_gate(x[lane], false);
  return x;
}

template <bool kIsTanh, typename T>
SEPLLM_INLINE Gate<T> gate_of(Vec<T> x) {
  const Vec<T> square = x * x;
  if constexpr (kIsTanh) {
    const T scale = static_cast<T>(2 * kSqrt2OverPi), most = static_cast<T>(kMostDecay);
    const Vec<T> exponent = x * (square * static_cast<T>(kCubic) + T(1)) * -scale;
    const Vec<T> e = exp_or_zero<T>(exponent > most ? fill<T>(most) : exponent);
    const Vec<T> passes = exponent > most ? Vec<T>{} : T(1) / (e + T(1));
    return {passes, e * passes * passes * (square * static_cast<T>(3 * kCubic) + T(1)) * scale};
  } else {
    const Vec<T> bell = exp_or_zero<T>(square * T(-0.5));
    return {normal_below(x, bell), bell * static_cast<T>(kDensityAt0)};
  }
}

template <typename S, typename T = typename ComputedIn<S>::Type>
SEPLLM_INLINE Vec<T> biased(const GeluArgs& args, int64_t row, int64_t column, int64_t count) {
  const Vec<T> x = load_some(static_cast<const S*>(args.x) + row * args.columns + column, count);
  return args.bias == nullptr ? x : x + load_some(static_cast<const S*>(args.bias) + column, count);
}

template <typename S, bool kIsTanh>
void forward(const GeluForwardArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t row = first; row < last; ++row)
    each_vector<T>(args.columns_of(row), [&](int64_t column, int64_t count) __attribute__((always_inline)) {
      const Vec<T> x = biased<S>(args, row, column, count);
      store_some(x * gate_of<kIsTanh, T>(x).passes, count, static_cast<S*>(args.out) + row * args.columns + column);
    });
}

template <typename S, bool kIsTanh>
void backward(const GeluBackwardArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t segment = first; segment < last; ++segment) {
    T* sums = static_cast<T*>(args.partial) + segment * args.columns;
    if (args.bias != nullptr) std::fill_n(sums, args.columns, T{0});
    const int64_t start = segment * kGeluRowsPerSegment, end = std::min(args.rows, start + kGeluRowsPerSegment);
    for (int64_t row = start; row < end; ++row)
      each_vector<T>(args.columns_of(row), [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        const Vec<T> x = biased<S>(args, row, column, count);
        const Gate<T> gate = gate_of<kIsTanh, T>(x);
        const int64_t at = row * args.columns + column;
        const Vec<T> dx = load_some(static_cast<const S*>(args.grad_out) + at, count) * (gate.passes + x * gate.slope);
        store_some(dx, count, static_cast<S*>(args.dx) + at);
        if (args.bias != nullptr) store_some(load_some(sums + column, count) + dx, count, sums + column);
      });
  }
}

template <typename S>
void sum_segments(const GeluBackwardArgs& args, int64_t first, int64_t last) {
  using T = typename ComputedIn<S>::Type;
  const int64_t segments = gelu_segments(args.rows);
  each_vector<T>(last - first, [&](int64_t offset, int64_t count) {
    Vec<T> sum{};
    for (int64_t segment = 0; segment < segments; ++segment)
      sum += load_some(static_cast<const T*>(args.partial) + segment * args.columns + first + offset, count);
    store_some(sum, count, static_cast<S*>(args.dbias) + first + offset);
  });
}

}  // namespace

void gelu_forward(Storage storage, const GeluForwardArgs& args, int64_t first_row, int64_t last_row) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.is_tanh ? forward<S, true>(args, first_row, last_row) : forward<S, false>(args, first_row, last_row);
  });
}

void gelu_backward(Storage storage, const GeluBackwardArgs& args, int64_t first_segment, int64_t last_segment) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.is_tanh ? backward<S, true>(args, first_segment, last_segment) : backward<S, false>(args, first_segment, last_segment);
  });
}

void gelu_backward_sum(Storage storage, const GeluBackwardArgs& args, int64_t first_column, int64_t last_column) {
  with_storage(storage, [&](auto zero) { sum_segments<decltype(zero)>(args, first_column, last_column); });
}

}  // namespace sepllm
