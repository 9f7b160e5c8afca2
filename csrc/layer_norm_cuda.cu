// Layer norms on CUDA: one, or the two of one input that a parallel residual has.
//
// A row is held in the registers of a few neighbouring warps, 16 bytes or two times 16 a thread: 96 threads for bf16 rows of 768. A block
// takes as many rows at a time as fit into 256 threads. Forward: mean, then the sum of (x - mean)^2, by shuffles and through shared memory;
// then every norm's output. x is read once, each output written once.
//
// Backward, with s = (x - mean) rstd and slope = sum over the norms of gradient * weight:
//
//   dx = rstd (slope - mean(slope) - s mean(slope s));   dweight = sum over rows of gradient s;   dbias = sum over rows of gradient
//
// A block walks over a fixed share of the rows; x and each gradient are read once, dx written once. Each thread sums the parameters' gradients
// of its columns in registers over its rows, the block adds these up and writes them to `partial`; a second kernel adds the blocks'. Shares
// and orders of summation depend on shapes alone: the same bits on every run, without atomics.
//
// Rows of no multiple of 16 bytes are held as 8 single elements a thread. Whole tensors begin on a boundary of 16 bytes.
#include "layer_norm_cuda.h"

#include <algorithm>

#include "cuda_launch.h"

namespace sepllm {
namespace {

constexpr int kMostThreads = 512;
constexpr int64_t kMostBlocks = 512;     // of the backward, which write one partial sum each
constexpr int kSumColumns = 32, kSumParts = 16;  // block of the kernel that adds them up

template <typename S>
using Wide = typename ComputedIn<S>::Type;

// How a row lies in the registers of `threads` neighbouring threads: kPacks packs of kWidth elements each.
template <int kWidthOf, int kPacksOf>
struct Layout {
  static constexpr int kWidth = kWidthOf, kPacks = kPacksOf;

  static int threads_of(int64_t size) {
    const int64_t packs = (size + kWidth - 1) / kWidth, threads = (packs + kPacks - 1) / kPacks;
    return static_cast<int>((threads + kWarp - 1) / kWarp * kWarp);
  }
};

// Part of a row in one thread's registers.
template <typename T, typename L>
using Part = T[L::kPacks][L::kWidth];

// Calls run(pack, first column) for the thread's packs that lie in the row.
template <typename L, typename Run>
__device__ __forceinline__ void for_packs(int64_t size, Run run) {
#pragma unroll
  for (int pack = 0; pack < L::kPacks; ++pack) {
    const int64_t column = (static_cast<int64_t>(pack) * blockDim.x + threadIdx.x) * L::kWidth;
    if (column < size) run(pack, column);
  }
}

template <typename L, typename S>
__device__ __forceinline__ void read_row(const void* rows, int64_t row, int64_t size, Part<Wide<S>, L>& to) {
  for_packs<L>(size, [&](int pack, int64_t column) {
    const auto read = read_pack<L::kWidth>(static_cast<const S*>(rows) + row * size + column);
#pragma unroll
    for (int i = 0; i < L::kWidth; ++i) to[pack][i] = widen(read.element[i]);
  });
}

template <typename S, int kWidth>
__device__ __forceinline__ void read_parameters(const LayerNormArgs& args, const void* values, int64_t column, Wide<S> (&to)[kWidth]) {
  using T = Wide<S>;
  if (args.has_wide_parameters) {
    constexpr int kPart = kWidth * sizeof(T) > kPackBytes ? kPackBytes / sizeof(T) : kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = read_pack<kPart>(static_cast<const T*>(values) + column + i / kPart * kPart).element[i % kPart];
  } else {
    const auto read = read_pack<kWidth>(static_cast<const S*>(values) + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = widen(read.element[i]);
  }
}

// The sum over the threads of one row, the same in all of them. Every thread of the block calls it; `shared` holds a value a warp.
template <typename T>
__device__ T row_sum(T x, T* shared) {
  x = warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return x;
  T* of_row = shared + threadIdx.y * warps;
  __syncthreads();  // nobody still reads the sum before
  if (threadIdx.x % kWarp == 0) of_row[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += of_row[warp];
  return sum;
}

template <typename S, int kNorms, typename L>
__global__ void __launch_bounds__(kMostThreads) forward_kernel(LayerNormForwardArgs args) {
  using T = Wide<S>;
  __shared__ T shared[kMostThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool is_row = row < args.rows;
  Part<T, L> x = {};
  if (is_row) read_row<L, S>(args.x, row, args.size, x);
  T sum = 0;
  for_packs<L>(args.size, [&](int pack, int64_t) {
    for (int i = 0; i < L::kWidth; ++i) sum += x[pack][i];
  });
  const T mean = row_sum(sum, shared) / static_cast<T>(args.size);
  T squares = 0;
  for_packs<L>(args.size, [&](int pack, int64_t) {
    for (int i = 0; i < L::kWidth; ++i) squares += (x[pack][i] - mean) * (x[pack][i] - mean);
  });
  const T rstd = rstd_of(row_sum(squares, shared), args.size, args.epsilon);
  if (!is_row) return;
  if (threadIdx.x == 0) {
    static_cast<T*>(args.mean)[row] = mean;
    static_cast<T*>(args.rstd)[row] = rstd;
  }
  for_packs<L>(args.size, [&](int pack, int64_t column) {
#pragma unroll
    for (int norm = 0; norm < kNorms; ++norm) {
      T weights[L::kWidth], biases[L::kWidth];
      read_parameters<S>(args, args.weights[norm], column, weights);
      read_parameters<S>(args, args.biases[norm], column, biases);
      Pack<S, L::kWidth> out;
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) narrow(standardised(x[pack][i], mean, rstd) * weights[i] + biases[i], &out.element[i]);
      write_pack(out, static_cast<S*>(args.outs[norm]) + row * args.size + column);
    }
  });
}

// Adds up what the block's rows at a time found for each column, and writes it to `to`.
template <typename T, typename L>
__device__ void write_sums(const Part<T, L>& sums, int64_t size, T* shared, T* to) {
  for_packs<L>(size, [&](int pack, int64_t column) {
    for (int i = 0; i < L::kWidth; ++i) {
      const int64_t lane = (pack * L::kWidth + i) * blockDim.x + threadIdx.x, all = L::kPacks * L::kWidth * blockDim.x;
      shared[threadIdx.y * all + lane] = sums[pack][i];
    }
  });
  __syncthreads();
  if (threadIdx.y == 0)
    for_packs<L>(size, [&](int pack, int64_t column) {
      for (int i = 0; i < L::kWidth; ++i) {
        const int64_t lane = (pack * L::kWidth + i) * blockDim.x + threadIdx.x, all = L::kPacks * L::kWidth * blockDim.x;
        T sum = 0;
        for (unsigned row = 0; row < blockDim.y; ++row) sum += shared[row * all + lane];
        to[column + i] = sum;
      }
    });
  __syncthreads();
}

template <typename S, int kNorms, typename L>
__global__ void __launch_bounds__(kMostThreads) backward_kernel(LayerNormBackwardArgs args, int64_t rows_per_block) {
  using T = Wide<S>;
  T* shared = launched_memory<T>();
  Part<T, L> dweights[kNorms] = {}, dbiases[kNorms] = {};
  const int64_t first = blockIdx.x * rows_per_block, last = first + rows_per_block < args.rows ? first + rows_per_block : args.rows;
  for (int64_t at = first; at < last; at += blockDim.y) {  // as often for every thread of the block
    const int64_t row = at + threadIdx.y;
    const bool is_row = row < last;
    Part<T, L> standard = {}, slope = {};
    T rstd = 0, slopes = 0, slopes_standard = 0;
    if (is_row) {
      const T mean = static_cast<const T*>(args.mean)[row];
      rstd = static_cast<const T*>(args.rstd)[row];
      read_row<L, S>(args.x, row, args.size, standard);
      Part<T, L> grads[kNorms];
#pragma unroll
      for (int norm = 0; norm < kNorms; ++norm) read_row<L, S>(args.grads[norm], row, args.size, grads[norm]);
      for_packs<L>(args.size, [&](int pack, int64_t column) {
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i) standard[pack][i] = standardised(standard[pack][i], mean, rstd);
#pragma unroll
        for (int norm = 0; norm < kNorms; ++norm) {
          T weights[L::kWidth];
          read_parameters<S>(args, args.weights[norm], column, weights);
#pragma unroll
          for (int i = 0; i < L::kWidth; ++i) {
            slope[pack][i] += grads[norm][pack][i] * weights[i];
            dweights[norm][pack][i] += grads[norm][pack][i] * standard[pack][i];
            dbiases[norm][pack][i] += grads[norm][pack][i];
          }
        }
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i) {
          slopes += slope[pack][i];
          slopes_standard += slope[pack][i] * standard[pack][i];
        }
      });
    }
    const T mean_slope = row_sum(slopes, shared) / static_cast<T>(args.size);
    const T mean_slope_standard = row_sum(slopes_standard, shared) / static_cast<T>(args.size);
    if (is_row)
      for_packs<L>(args.size, [&](int pack, int64_t column) {
        Pack<S, L::kWidth> dx;
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i)
          narrow(input_gradient(standard[pack][i], slope[pack][i], mean_slope, mean_slope_standard, rstd), &dx.element[i]);
        write_pack(dx, static_cast<S*>(args.dx) + row * args.size + column);
      });
  }
  __syncthreads();
  T* partial = static_cast<T*>(args.partial) + blockIdx.x * 2 * kNorms * args.size;
#pragma unroll
  for (int norm = 0; norm < kNorms; ++norm) {
    write_sums<T, L>(dweights[norm], args.size, shared, partial + norm * args.size);
    write_sums<T, L>(dbiases[norm], args.size, shared, partial + (kNorms + norm) * args.size);
  }
}

// A column of one parameter a thread of the first row; the others sum every 16th block before it adds up their sums.
template <typename S>
__global__ void sum_kernel(LayerNormBackwardArgs args, int64_t blocks) {
  using T = Wide<S>;
  __shared__ T shared[kSumParts][kSumColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x, array = blockIdx.y;
  T sum = 0;
  if (column < args.size)
#pragma unroll 8
    for (int64_t block = threadIdx.y; block < blocks; block += kSumParts)
      sum += static_cast<const T*>(args.partial)[(block * 2 * args.norms + array) * args.size + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.size) return;
  for (int part = 1; part < kSumParts; ++part) sum += shared[part][threadIdx.x];
  void* to = array < args.norms ? args.dweights[array] : args.dbiases[array - args.norms];
  if (args.has_wide_parameters)
    static_cast<T*>(to)[column] = sum;
  else
    narrow(sum, static_cast<S*>(to) + column);
}

// Calls run(Layout) with the widest that fits; false where none does.
template <typename S, typename Run>
bool with_layout(const LayerNormArgs& args, Run run) {
  constexpr int kWidth = kPackBytes / sizeof(S);
  const bool is_whole = args.size % kWidth == 0;
  const auto fits = [&](auto layout) { return layout.threads_of(args.size) <= kMostThreads; };
  if (is_whole && fits(Layout<kWidth, 1>{})) return run(Layout<kWidth, 1>{}), true;
  if (is_whole && fits(Layout<kWidth, 2>{})) return run(Layout<kWidth, 2>{}), true;
  if (fits(Layout<1, 8>{})) return run(Layout<1, 8>{}), true;
  return false;
}

template <typename L>
dim3 block_of(int64_t size) {
  const int threads = L::threads_of(size);
  return dim3(threads, std::max(1, kMostThreads / 2 / threads));
}

int64_t backward_blocks(int64_t rows) { return std::min<int64_t>(kMostBlocks, rows); }

template <typename S, int kNorms>
void forward(const LayerNormForwardArgs& args, cudaStream_t stream) {
  with_layout<S>(args, [&](auto layout) {
    using L = decltype(layout);
    const dim3 block = block_of<L>(args.size);
    launch(forward_kernel<S, kNorms, L>, dim3(static_cast<unsigned>((args.rows + block.y - 1) / block.y)), block, 0, stream, args);
  });
}

template <typename S, int kNorms>
void backward(const LayerNormBackwardArgs& args, cudaStream_t stream) {
  const int64_t blocks = backward_blocks(args.rows);
  if (args.rows > 0)
    with_layout<S>(args, [&](auto layout) {
      using L = decltype(layout);
      const dim3 block = block_of<L>(args.size);
      const int64_t bytes = static_cast<int64_t>(sizeof(Wide<S>)) * block.x * block.y * L::kPacks * L::kWidth;
      launch(backward_kernel<S, kNorms, L>, dim3(static_cast<unsigned>(blocks)), block, bytes, stream, args, (args.rows + blocks - 1) / blocks);
    });
  const dim3 grid(static_cast<unsigned>((args.size + kSumColumns - 1) / kSumColumns), 2 * kNorms);
  launch(sum_kernel<S>, grid, dim3(kSumColumns, kSumParts), 0, stream, args, blocks);
}

}  // namespace

bool layer_norm_cuda_fits(Storage storage, const LayerNormArgs& args) {
  bool fits = false;
  with_storage(storage, [&](auto zero) { fits = with_layout<decltype(zero)>(args, [](auto) {}); });
  return fits;
}

cudaError_t layer_norm_cuda(Storage storage, const LayerNormForwardArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.norms == 1 ? forward<S, 1>(args, stream) : forward<S, 2>(args, stream);
  });
  return cudaGetLastError();
}

int64_t layer_norm_cuda_partial_bytes(Storage storage, const LayerNormArgs& args) {
  return backward_blocks(args.rows) * 2 * args.norms * args.size * (storage == Storage::kDouble ? 8 : 4);
}

cudaError_t layer_norm_backward_cuda(Storage storage, const LayerNormBackwardArgs& args, cudaStream_t stream) {
  if (args.size == 0) return cudaSuccess;
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    args.norms == 1 ? backward<S, 1>(args, stream) : backward<S, 2>(args, stream);
  });
  return cudaGetLastError();
}

}  // namespace sepllm
