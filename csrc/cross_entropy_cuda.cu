// Softmax cross-entropy on CUDA: the statistics of rows of logits, and their gradient, in place if wanted.
//
// A block of 512 threads a row; a thread takes every 512th pack of 16 bytes, and the elements before the first and after the last whole pack
// one by one. The statistics read a row once: each thread keeps a maximum and a sum of exponentials (arXiv 1805.02867), which are merged by
// shuffles in a fixed order, so that the bits repeat. The gradient reads and writes a row once. Bytes: V elements read for the statistics,
// V read and V written for the gradient.
#include "cross_entropy_cuda.h"
#include "cross_entropy_math.h"
#include "cuda_launch.h"

namespace sepllm {
namespace {

constexpr int kThreads = 512;

// How a row is cut: `head` elements, then `packs` whole packs, then the rest.
template <typename S>
struct Cut {
  static constexpr int kWidth = kPackBytes / sizeof(S);
  int64_t head, packs, columns;

  __device__ Cut(const S* row, int64_t columns) : columns(columns) {
    const int64_t to_pack = static_cast<int64_t>((kPackBytes - reinterpret_cast<uintptr_t>(row) % kPackBytes) % kPackBytes / sizeof(S));
    head = to_pack < columns ? to_pack : columns;
    packs = (columns - head) / kWidth;
  }

  // Calls each_pack(column) and each_element(column) for this thread's share of the row.
  template <typename EachPack, typename EachElement>
  __device__ void share(EachPack each_pack, EachElement each_element) const {
    if (threadIdx.x < head) each_element(static_cast<int64_t>(threadIdx.x));
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) each_pack(head + pack * kWidth);
    const int64_t last = head + packs * kWidth + threadIdx.x;
    if (last < columns) each_element(last);
  }
};

template <typename T>
__device__ RowSum<T> warp_merged(RowSum<T> sum) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum = merged(sum, RowSum<T>{__shfl_xor_sync(0xffffffffu, sum.maximum, distance), __shfl_xor_sync(0xffffffffu, sum.total, distance)});
  return sum;
}

// Of all threads of the block; right in the first warp.
template <typename T>
__device__ RowSum<T> block_merged(RowSum<T> sum) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T maxima[kWarps], totals[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  sum = warp_merged(sum);
  __syncthreads();  // the last row's have been read
  if (lane == 0) {
    maxima[warp] = sum.maximum;
    totals[warp] = sum.total;
  }
  __syncthreads();
  return warp_merged(lane < kWarps ? RowSum<T>{maxima[lane], totals[lane]} : empty_sum<T>());
}

template <typename S>
__global__ void __launch_bounds__(kThreads) statistics_kernel(StatisticsArgs args) {
  using T = typename ComputedIn<S>::Type;
  constexpr int kWidth = Cut<S>::kWidth;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const S* x = static_cast<const S*>(args.logits) + row * args.row_stride;
    RowSum<T> sum = empty_sum<T>();
    Cut<S>(x, args.columns)
        .share(
            [&](int64_t column) {
              const Pack<S, kWidth> pack = read_pack<kWidth>(x + column);
              T wide[kWidth];
              for (int i = 0; i < kWidth; ++i) wide[i] = widen(pack.element[i]);
              sum = added(sum, wide);
            },
            [&](int64_t column) {
              const T wide[1] = {widen(x[column])};
              sum = added(sum, wide);
            });
    sum = block_merged(sum);
    if (threadIdx.x == 0) {
      static_cast<T*>(args.maximum)[row] = sum.maximum;
      static_cast<T*>(args.total)[row] = sum.total;
      static_cast<T*>(args.target)[row] = target_of(x, args.labels[row] - args.first_label, args.columns, args.is_shard);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) gradient_kernel(GradientArgs args) {
  using T = typename ComputedIn<S>::Type;
  constexpr int kWidth = Cut<S>::kWidth;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const S* x = static_cast<const S*>(args.logits) + row * args.row_stride;
    S* to = static_cast<S*>(args.gradient) + row * args.gradient_row_stride;
    const bool is_alike = reinterpret_cast<uintptr_t>(x) % kPackBytes == reinterpret_cast<uintptr_t>(to) % kPackBytes;
    const T maximum = static_cast<const T*>(args.maximum)[row], grad = static_cast<const T*>(args.grad_losses)[row];
    const T factor = grad / static_cast<const T*>(args.total)[row];
    const int64_t label = args.labels[row] - args.first_label;
    const auto gradient = [&](S logit, int64_t column) {
      return grad == 0 ? T{0} : gradient_of<T>(widen(logit), maximum, factor, grad, column == label);
    };
    Cut<S>(x, args.columns)
        .share(
            [&](int64_t column) {
              Pack<S, kWidth> pack{};
              if (grad != 0) pack = read_pack<kWidth>(x + column);
              for (int i = 0; i < kWidth; ++i) narrow(gradient(pack.element[i], column + i), &pack.element[i]);
              if (is_alike)
                write_pack(pack, to + column);
              else
                for (int i = 0; i < kWidth; ++i) to[column + i] = pack.element[i];
            },
            [&](int64_t column) { narrow(gradient(x[column], column), to + column); });
  }
}

template <typename Args>
void launch_rows(void (*kernel)(Args), cudaStream_t stream, const Args& args) {
  constexpr int64_t kMostBlocks = 1 << 30;
  if (args.rows > 0) launch(kernel, dim3(static_cast<unsigned>(args.rows < kMostBlocks ? args.rows : kMostBlocks)), dim3(kThreads), 0, stream, args);
}

}  // namespace

cudaError_t cross_entropy_statistics_cuda(Storage storage, const StatisticsArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) { launch_rows(statistics_kernel<decltype(zero)>, stream, args); });
  return cudaGetLastError();
}

cudaError_t cross_entropy_gradient_cuda(Storage storage, const GradientArgs& args, cudaStream_t stream) {
  with_storage(storage, [&](auto zero) { launch_rows(gradient_kernel<decltype(zero)>, stream, args); });
  return cudaGetLastError();
}

}  // namespace sepllm
