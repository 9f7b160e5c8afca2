// Bias + GELU on CUDA. Without a bias a thread takes 16 bytes of x wherever they stand; with one, a pack of columns in one row (forward) or in
// the 64 rows of a segment (backward), whose gradients of the bias it sums in registers and writes to `partial`; a second kernel adds the
// segments up in order. Bytes: x read and the output written; backward x and the gradient read, dx written, and 1/64 of that for the sums.
// Sums depend on shapes alone: the same bits on every run, without atomics. Where the sizes or addresses allow no 16 bytes, a pack is one element.
#include "cuda_launch.h"
#include "gelu_cuda.h"

namespace sepllm {
namespace {

// One pack of x with its bias, in the type that is computed in.
template <typename S, int kWidth, typename T = typename ComputedIn<S>::Type>
__device__ void read_biased(const GeluArgs& args, int64_t at, int64_t column, T (&x)[kWidth]) {
  const Pack<S, kWidth> pack = read_pack<kWidth>(static_cast<const S*>(args.x) + at);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = widen(pack.element[i]);
  if (args.bias == nullptr) return;
  const Pack<S, kWidth> bias = read_pack<kWidth>(static_cast<const S*>(args.bias) + column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] += widen(bias.element[i]);
}

template <typename S, int kWidth>
__global__ void forward_kernel(GeluForwardArgs args) {
  for (int64_t item = first_item(); item < args.elements / kWidth; item += all_threads()) {
    const int64_t at = item * kWidth;
    typename ComputedIn<S>::Type x[kWidth];
    read_biased<S, kWidth>(args, at, at % args.columns, x);
    Pack<S, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) narrow(gelu(x[i], args.is_tanh), &out.element[i]);
    write_pack(out, static_cast<S*>(args.out) + at);
  }
}

// dx of one pack, which it returns.
template <typename S, int kWidth, typename T = typename ComputedIn<S>::Type>
__device__ void write_gradient(const GeluBackwardArgs& args, int64_t at, int64_t column, T (&dx)[kWidth]) {
  read_biased<S, kWidth>(args, at, column, dx);
  Pack<S, kWidth> pack = read_pack<kWidth>(static_cast<const S*>(args.grad_out) + at);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    dx[i] = widen(pack.element[i]) * gelu_slope(dx[i], args.is_tanh);
    narrow(dx[i], &pack.element[i]);
  }
  write_pack(pack, static_cast<S*>(args.dx) + at);
}

template <typename S, int kWidth>
__global__ void backward_kernel(GeluBackwardArgs args) {
  for (int64_t item = first_item(); item < args.elements / kWidth; item += all_threads()) {
    typename ComputedIn<S>::Type dx[kWidth];
    write_gradient<S, kWidth>(args, item * kWidth, 0, dx);
  }
}

template <typename S, int kWidth>
__global__ void biased_backward_kernel(GeluBackwardArgs args) {
  using T = typename ComputedIn<S>::Type;
  const int64_t packs = args.columns / kWidth;
  for (int64_t item = first_item(); item < gelu_segments(args.rows) * packs; item += all_threads()) {
    const int64_t segment = item / packs, column = item % packs * kWidth, start = segment * kGeluRowsPerSegment;
    const int64_t end = start + kGeluRowsPerSegment < args.rows ? start + kGeluRowsPerSegment : args.rows;
    T sums[kWidth] = {};
    for (int64_t row = start; row < end; ++row) {
      T dx[kWidth];
      write_gradient<S, kWidth>(args, row * args.columns + column, column, dx);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += dx[i];
    }
    for (int i = 0; i < kWidth; ++i) static_cast<T*>(args.partial)[segment * args.columns + column + i] = sums[i];
  }
}

template <typename S>
__global__ void sum_kernel(GeluBackwardArgs args) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t column = first_item(); column < args.columns; column += all_threads()) {
    T sum = 0;
#pragma unroll 8
    for (int64_t segment = 0; segment < gelu_segments(args.rows); ++segment)
      sum += static_cast<const T*>(args.partial)[segment * args.columns + column];
    narrow(sum, static_cast<S*>(args.dbias) + column);
  }
}

// 16 bytes at a time: whole rows of them, or without a bias a whole number of them.
template <typename S>
bool is_packed(const GeluArgs& args, const void* y, const void* z) {
  const int64_t unit = args.bias == nullptr ? args.elements : args.columns;
  const uintptr_t places = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.bias) | reinterpret_cast<uintptr_t>(y) |
                           reinterpret_cast<uintptr_t>(z);
  return unit * sizeof(S) % kPackBytes == 0 && places % kPackBytes == 0;
}

template <typename S, int kWidth>
void backward(const GeluBackwardArgs& args, cudaStream_t stream) {
  if (args.bias == nullptr) {
    launch_items(backward_kernel<S, kWidth>, args.elements / kWidth, stream, args);
  } else {
    launch_items(biased_backward_kernel<S, kWidth>, gelu_segments(args.rows) * (args.columns / kWidth), stream, args);
    launch_items(sum_kernel<S>, args.columns, stream, args);
  }
}

}  // namespace

cudaError_t gelu_forward_cuda(Storage storage, const GeluForwardArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    constexpr int kWidth = kPackBytes / sizeof(S);
    if (is_packed<S>(args, args.out, nullptr))
      launch_items(forward_kernel<S, kWidth>, args.elements / kWidth, stream, args);
    else
      launch_items(forward_kernel<S, 1>, args.elements, stream, args);
  });
  return cudaGetLastError();
}

cudaError_t gelu_backward_cuda(Storage storage, const GeluBackwardArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    is_packed<S>(args, args.grad_out, args.dx) ? backward<S, kPackBytes / sizeof(S)>(args, stream) : backward<S, 1>(args, stream);
  });
  return cudaGetLastError();
}

}  // namespace sepllm
