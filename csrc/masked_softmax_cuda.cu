// Softmax of scaled scores over the keys that each query reads, on CUDA. A warp a row, eight rows a block; a lane takes every 32nd column.
// Forward: one pass finds maximum and sum (arXiv 1805.02867), a second writes the weights; backward: one pass sums p dp, a second writes the
// gradient. The second passes read again what is still in the first-level cache for rows of a few thousand keys. Bytes: scores and mask read,
// weights written; backward weights and gradient read, gradient written. Sums are merged in a fixed order: the same bits on every run.
#include "cuda_launch.h"
#include "masked_softmax_cuda.h"

namespace sepllm {
namespace {

constexpr int kRows = 8;  // of a block

__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y; }
__device__ __forceinline__ int64_t all_rows() { return static_cast<int64_t>(gridDim.x) * kRows; }

template <typename T>
__device__ RowSum<T> warp_merged(RowSum<T> sum) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum = merged(sum, RowSum<T>{__shfl_xor_sync(0xffffffffu, sum.maximum, distance), __shfl_xor_sync(0xffffffffu, sum.total, distance)});
  return sum;
}

template <typename S>
__global__ void forward_kernel(MaskedSoftmaxForwardArgs args) {
  using T = typename ComputedIn<S>::Type;
  const T scale = static_cast<T>(args.scale);
  for (int64_t row = first_row(); row < args.rows; row += all_rows()) {
    const S* scores = static_cast<const S*>(args.scores) + row * args.columns;
    const bool* is_read = args.mask_of(row);
    RowSum<T> sum = empty_sum<T>();
    for (int64_t column = threadIdx.x; column < args.columns; column += kWarp) {
      const T score[1] = {score_of<T>(widen(scores[column]), is_read[column], scale)};
      sum = added(sum, score);
    }
    sum = warp_merged(sum);
    S* weights = static_cast<S*>(args.weights) + row * args.columns;
    for (int64_t column = threadIdx.x; column < args.columns; column += kWarp)
      narrow(probability_of(score_of<T>(widen(scores[column]), is_read[column], scale), sum), weights + column);
  }
}

template <typename S>
__global__ void backward_kernel(MaskedSoftmaxBackwardArgs args) {
  using T = typename ComputedIn<S>::Type;
  for (int64_t row = first_row(); row < args.rows; row += all_rows()) {
    const S* weights = static_cast<const S*>(args.weights) + row * args.columns;
    const S* grads = static_cast<const S*>(args.grad_weights) + row * args.columns;
    T shares = 0;
    for (int64_t column = threadIdx.x; column < args.columns; column += kWarp) shares += share_of<T>(widen(weights[column]), widen(grads[column]));
    shares = warp_sum(shares);
    S* to = static_cast<S*>(args.grad_scores) + row * args.columns;
    for (int64_t column = threadIdx.x; column < args.columns; column += kWarp)
      narrow(score_gradient<T>(widen(weights[column]), widen(grads[column]), shares, static_cast<T>(args.scale)), to + column);
  }
}

template <typename Args>
void launch_rows(void (*kernel)(Args), cudaStream_t stream, const Args& args) {
  constexpr int64_t kMostBlocks = 1 << 30;
  const int64_t blocks = (args.rows + kRows - 1) / kRows;
  if (blocks > 0) launch(kernel, dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(kWarp, kRows), 0, stream, args);
}

}  // namespace

cudaError_t masked_softmax_cuda(Storage storage, const MaskedSoftmaxForwardArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) { launch_rows(forward_kernel<decltype(zero)>, stream, args); });
  return cudaGetLastError();
}

cudaError_t masked_softmax_backward_cuda(Storage storage, const MaskedSoftmaxBackwardArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) { launch_rows(backward_kernel<decltype(zero)>, stream, args); });
  return cudaGetLastError();
}

}  // namespace sepllm
