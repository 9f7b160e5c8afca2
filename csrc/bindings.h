// What the bindings of CPU and CUDA operators share: dtypes, and the strides that kernels walk along.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "storage.h"

namespace sepllm {

inline Storage stored_as(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Storage::kFloat;
    case at::kDouble: return Storage::kDouble;
    case at::kBFloat16: return Storage::kBFloat16;
    case at::kHalf:
#if !defined(SEPLLM_HAS_HALF)
      TORCH_CHECK_VALUE(false, name, " is float16, which the C++ compiler that built the operators does not know: use GCC 12 or Clang 15.");
#endif
      return Storage::kHalf;
    default: TORCH_CHECK_VALUE(false, name, " must be float32, float64, bfloat16 or float16, but is ", x.scalar_type(), ".");
  }
}

inline at::ScalarType computed_in(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Neighbouring elements of a head; any strides otherwise.
inline at::Tensor with_adjacent_heads(const at::Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

}  // namespace sepllm
