// What the binding (torch) and the CUDA kernels of layer norms agree on.
#pragma once

#include <cuda_runtime_api.h>

#include "layer_norm_math.h"
#include "storage.h"

namespace sepllm {

// False where a row is too long for the kernels, which keep it in registers.
bool layer_norm_cuda_fits(Storage storage, const LayerNormArgs& args);

cudaError_t layer_norm_cuda(Storage storage, const LayerNormForwardArgs& args, cudaStream_t stream);

// Parameters' gradients in the dtype of the parameters. `partial` holds what the blocks found.
int64_t layer_norm_cuda_partial_bytes(Storage storage, const LayerNormArgs& args);
cudaError_t layer_norm_backward_cuda(Storage storage, const LayerNormBackwardArgs& args, cudaStream_t stream);

}  // namespace sepllm
