// What the binding (torch) and the CUDA kernels of the rotary embeddings agree on.
#pragma once

#include <cuda_runtime_api.h>

#include "rotary_math.h"
#include "storage.h"

namespace sepllm {

// As in rotary_cpu.h, of all tokens at once.
cudaError_t rotate_packed_cuda(Storage storage, const RotaryArgs& args, cudaStream_t stream);
cudaError_t rotate_packed_backward_cuda(Storage storage, const RotaryGradientArgs& args, cudaStream_t stream);

}  // namespace sepllm
