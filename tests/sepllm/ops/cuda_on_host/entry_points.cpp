// The launchers of csrc/*_cuda.cu for ctypes, of contiguous tensors.
#include <cstdint>

#include "layer_norm_cuda.h"
#include "rotary_cuda.h"

using namespace sepllm;

extern "C" {

void rotate(int storage, const int64_t* sizes, const void* cos, const void* sin, int has_wide_angles, void* packed) {
  const auto [batch, tokens, heads, kv_heads, head_size, dims] = *reinterpret_cast<const int64_t(*)[6]>(sizes);
  RotaryArgs args{batch, tokens, dims / 2, {heads, kv_heads, head_size}, cos, sin, has_wide_angles != 0, packed};
  args.token_stride = args.heads.row_size();
  args.batch_stride = tokens * args.token_stride;
  rotate_packed_cuda(static_cast<Storage>(storage), args, nullptr);
}

void rotate_backward(int storage, const int64_t* sizes, const void* cos, const void* sin, int has_wide_angles, void* packed, const void* dq,
                     const void* dk, const void* dv) {
  const auto [batch, tokens, heads, kv_heads, head_size, dims] = *reinterpret_cast<const int64_t(*)[6]>(sizes);
  const HeadStrides of_q{tokens * heads * head_size, heads * head_size, head_size};
  const HeadStrides of_k{tokens * kv_heads * head_size, kv_heads * head_size, head_size};
  const RotaryArgs shared{batch, tokens, dims / 2, {heads, kv_heads, head_size}, cos, sin, has_wide_angles != 0, packed};
  RotaryGradientArgs args{shared, dq, dk, dv, of_q, of_k, of_k};
  rotate_packed_backward_cuda(static_cast<Storage>(storage), args, nullptr);
}

int64_t layer_norms_partial_bytes(int storage, int64_t rows, int64_t size, int norms) {
  LayerNormArgs args{rows, size, norms};
  return layer_norm_cuda_partial_bytes(static_cast<Storage>(storage), args);
}

// Pointers: x, then weights, biases and outs, two each, then mean and rstd.
void layer_norms(int storage, int64_t rows, int64_t size, int norms, int has_wide_parameters, double epsilon, void* const* at) {
  LayerNormForwardArgs args{{rows, size, norms, epsilon, at[0], {at[1], at[2]}, {at[3], at[4]}, has_wide_parameters != 0}};
  args.outs[0] = at[5], args.outs[1] = at[6], args.mean = at[7], args.rstd = at[8];
  layer_norm_cuda(static_cast<Storage>(storage), args, nullptr);
}

// Pointers: x, weights and gradients, two each, mean, rstd, dx, gradients of weights and biases, two each, partial.
void layer_norms_backward(int storage, int64_t rows, int64_t size, int norms, int has_wide_parameters, void* const* at) {
  LayerNormBackwardArgs args{{rows, size, norms, 0, at[0], {at[1], at[2]}, {}, has_wide_parameters != 0}};
  args.grads[0] = at[3], args.grads[1] = at[4], args.mean = at[5], args.rstd = at[6], args.dx = at[7];
  args.dweights[0] = at[8], args.dweights[1] = at[9], args.dbiases[0] = at[10], args.dbiases[1] = at[11], args.partial = at[12];
  layer_norm_backward_cuda(static_cast<Storage>(storage), args, nullptr);
}

}  // extern "C"
