// Rotary embeddings of the packed projection (arXiv 2104.09864): where its heads stand, and how a pair of dimensions turns.
#pragma once

#include <cstdint>

#include "cuda.h"

namespace sepllm {

// A row of the projection holds, with H the head size, `heads` = N and `kv_heads` = K:
//   N = K   head 0: q k v | head 1: q k v | ...
//   else    q of all heads | k of all key heads | v of all key heads
struct PackedHeads {
  int64_t heads, kv_heads, head_size;

  SEPLLM_HOST_DEVICE int64_t turning() const { return heads + kv_heads; }
  SEPLLM_HOST_DEVICE int64_t count() const { return heads + 2 * kv_heads; }
  SEPLLM_HOST_DEVICE int64_t row_size() const { return count() * head_size; }

  // First element of a head, counting those of q, then k, then v.
  SEPLLM_HOST_DEVICE int64_t start(int64_t head) const {
    if (heads != kv_heads) return head * head_size;
    return (head % heads * 3 + head / heads) * head_size;
  }
};

struct HeadStrides {
  int64_t batch, token, head;  // elements; a head's own elements are adjacent
};

// packed [B, T, row]; cos and sin contiguous [B, T, 2 half], in the dtype of packed or in the type that it is computed in.
struct RotaryArgs {
  int64_t batch, tokens, half;
  PackedHeads heads;
  const void *cos, *sin;
  bool has_wide_angles;
  void* packed;
  int64_t batch_stride, token_stride;
};

// Gradients of q [B, T, N, H], k and v [B, T, K, H]; packed receives them, turned back, contiguous.
struct RotaryGradientArgs : RotaryArgs {
  const void *dq, *dk, *dv;
  HeadStrides dq_strides, dk_strides, dv_strides;

  SEPLLM_HOST_DEVICE const void* gradient_of(int64_t head, HeadStrides* strides, int64_t* number) const {
    const bool is_query = head < heads.heads, is_key = !is_query && head < heads.turning();
    *strides = is_query ? dq_strides : is_key ? dk_strides : dv_strides;
    *number = is_query ? head : is_key ? head - heads.heads : head - heads.turning();
    return is_query ? dq : is_key ? dk : dv;
  }
};

template <typename V>
struct Pair {
  V first, second;
};

// By the angle of that cosine and sine; by its negative with the sine's sign changed.
template <typename V>
SEPLLM_HOST_DEVICE Pair<V> turned(Pair<V> x, V cos, V sin) {
  return {x.first * cos - x.second * sin, x.second * cos + x.first * sin};
}

}  // namespace sepllm
