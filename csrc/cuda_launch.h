// What the CUDA kernels share: launching, packs of neighbouring elements, items over all threads of a grid, sums over a warp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "storage.h"

namespace sepllm {

constexpr int kPackBytes = 16, kWarp = 32;

#if defined(__CUDACC__)  // a C++ compiler that emulates them brings its own (tests/sepllm/ops/cuda_on_host)
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
}

// The shared memory of `shared_bytes`.
template <typename T>
__device__ __forceinline__ T* launched_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

// A thread an item, in blocks of 256; kernels walk over further items in steps of all_threads().
template <typename Args>
void launch_items(void (*kernel)(Args), int64_t items, cudaStream_t stream, const Args& args) {
  constexpr int64_t kThreads = 256, kMostBlocks = 1 << 20;
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  if (blocks > 0) launch(kernel, dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(kThreads), 0, stream, args);
}

__device__ __forceinline__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Neighbouring elements that move in one instruction.
template <typename S, int kWidth>
struct alignas(kWidth * sizeof(S)) Pack {
  S element[kWidth];
};

template <int kWidth, typename S>
__device__ __forceinline__ Pack<S, kWidth> read_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, kWidth>*>(from);
}

template <typename S, int kWidth>
__device__ __forceinline__ void write_pack(const Pack<S, kWidth>& pack, S* to) {
  *reinterpret_cast<Pack<S, kWidth>*>(to) = pack;
}

// The sum over a warp, the same in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

}  // namespace sepllm
