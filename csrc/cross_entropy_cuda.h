// What the binding (torch) and the CUDA kernels of the cross-entropy agree on.
#pragma once

#include <cuda_runtime_api.h>

#include "cross_entropy_math.h"
#include "storage.h"

namespace sepllm {

// As in cross_entropy_cpu.h, of all rows at once.
cudaError_t cross_entropy_statistics_cuda(Storage storage, const StatisticsArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_gradient_cuda(Storage storage, const GradientArgs& args, cudaStream_t stream);

}  // namespace sepllm
