// What the binding (torch) and the CUDA kernels of the masked softmax agree on.
#pragma once

#include <cuda_runtime_api.h>

#include "masked_softmax_math.h"
#include "storage.h"

namespace sepllm {

// As in masked_softmax_cpu.h, of all rows at once.
cudaError_t masked_softmax_cuda(Storage storage, const MaskedSoftmaxForwardArgs& args, cudaStream_t stream);
cudaError_t masked_softmax_backward_cuda(Storage storage, const MaskedSoftmaxBackwardArgs& args, cudaStream_t stream);

}  // namespace sepllm
