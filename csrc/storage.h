// The dtypes as they lie in memory, and the way from and to the type that each is computed in. The same names in C++ and in CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sepllm {

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

SEPLLM_HOST_DEVICE float widen(float x) { return x; }
SEPLLM_HOST_DEVICE double widen(double x) { return x; }
SEPLLM_HOST_DEVICE void narrow(float x, float* to) { *to = x; }
SEPLLM_HOST_DEVICE void narrow(double x, double* to) { *to = x; }

#if defined(__CUDACC__)

using BFloat16 = __nv_bfloat16;
using Half = __half;
#define SEPLLM_HAS_HALF 1

SEPLLM_HOST_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
SEPLLM_HOST_DEVICE void narrow(float x, BFloat16* to) { *to = __float2bfloat16_rn(x); }
SEPLLM_HOST_DEVICE float widen(Half x) { return __half2float(x); }
SEPLLM_HOST_DEVICE void narrow(float x, Half* to) { *to = __float2half_rn(x); }

#else

struct BFloat16 {
  uint16_t bits;
};

SEPLLM_HOST_DEVICE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
SEPLLM_HOST_DEVICE void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

#if defined(__FLT16_MANT_DIG__)
#define SEPLLM_HAS_HALF 1
using Half = _Float16;
SEPLLM_HOST_DEVICE float widen(Half x) { return static_cast<float>(x); }
SEPLLM_HOST_DEVICE void narrow(float x, Half* to) { *to = static_cast<Half>(x); }
#endif

#endif

template <typename S>
struct ComputedIn {
  using Type = float;
};
template <>
struct ComputedIn<double> {
  using Type = double;
};

// Calls visit with a value of the storage's type; returns whether the compiler has that type.
template <typename Visit>
bool with_storage(Storage storage, Visit visit) {
  switch (storage) {
    case Storage::kFloat: return visit(float{}), true;
    case Storage::kDouble: return visit(double{}), true;
    case Storage::kBFloat16: return visit(BFloat16{}), true;
    case Storage::kHalf:
#if defined(SEPLLM_HAS_HALF)
      return visit(Half{}), true;
#else
      return false;
#endif
  }
  return false;
}

}  // namespace sepllm
