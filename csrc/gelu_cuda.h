// What the binding (torch) and the CUDA kernels of bias + GELU agree on.
#pragma once

#include <cuda_runtime_api.h>

#include "gelu_math.h"
#include "storage.h"

namespace sepllm {

// As in gelu_cpu.h, of everything at once.
cudaError_t gelu_forward_cuda(Storage storage, const GeluForwardArgs& args, cudaStream_t stream);
cudaError_t gelu_backward_cuda(Storage storage, const GeluBackwardArgs& args, cudaStream_t stream);

}  // namespace sepllm
