// What a header of arithmetic needs to be compiled by nvcc for both sides and by a C++ compiler alone.
#pragma once

#if defined(__CUDACC__)
#define SEPLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEPLLM_HOST_DEVICE inline __attribute__((always_inline))
#endif
