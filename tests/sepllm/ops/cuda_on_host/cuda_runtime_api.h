// Enough of CUDA to run kernels on a CPU, compiled as C++ with this folder on the include path: blocks one after another, the threads of a
// block in turns on one thread of the machine, each until it waits for the others. It knows what the kernels of csrc/ use; every thread
// of a block must come to every __syncthreads and every shuffle.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

constexpr size_t kStackBytes = 128 * 1024;

inline ucontext_t scheduler;
inline std::vector<ucontext_t> threads;
inline std::vector<bool> is_done;
inline std::vector<double> lanes;          // what the threads shuffle; a double holds a float
inline std::vector<double> shared_memory;  // of the launch
inline std::function<void()> body;
inline unsigned current;

inline void enter() {
  body();
  is_done[current] = true;
  swapcontext(&threads[current], &scheduler);
}

inline void wait_for_block() { swapcontext(&threads[current], &scheduler); }

inline void run_block(std::vector<std::unique_ptr<char[]>>& stacks) {
  const unsigned count = blockDim.x * blockDim.y;
  threads.assign(count, ucontext_t{});
  is_done.assign(count, false);
  lanes.assign(count, 0);
  while (stacks.size() < count) stacks.push_back(std::make_unique<char[]>(kStackBytes));
  for (unsigned i = 0; i < count; ++i) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks[i].get();
    threads[i].uc_stack.ss_size = kStackBytes;
    makecontext(&threads[i], enter, 0);
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (current = 0; current < count; ++current) {
      if (is_done[current]) continue;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x);
      swapcontext(&scheduler, &threads[current]);
      is_running = is_running || !is_done[current];
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait_for_block(); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  cuda_on_host::lanes[cuda_on_host::current] = static_cast<double>(x);
  cuda_on_host::wait_for_block();
  const T other = static_cast<T>(cuda_on_host::lanes[cuda_on_host::current ^ distance]);
  cuda_on_host::wait_for_block();
  return other;
}

namespace sepllm {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  std::vector<std::unique_ptr<char[]>> stacks;
  gridDim = grid, blockDim = block;
  cuda_on_host::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_host::shared_memory.assign(shared_bytes / 8 + 1, 0.0 / 0.0);
      cuda_on_host::run_block(stacks);
    }
}

template <typename T>
T* launched_memory() {
  return reinterpret_cast<T*>(cuda_on_host::shared_memory.data());
}

}  // namespace sepllm
