// Arguments and results of the rotary operators, the same for every device. `run` computes on the device: run(storage, args).
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "bindings.h"
#include "rotary_math.h"

namespace sepllm {

inline void check_angles(const at::Tensor& x, const char* name, const at::Tensor& cos, const at::Tensor& sin, int64_t head_size) {
  TORCH_CHECK_VALUE(cos.dim() == 3 && cos.sizes() == sin.sizes() && cos.sizes().slice(0, 2) == x.sizes().slice(0, 2) && cos.size(2) % 2 == 0 &&
                        cos.size(2) <= head_size,
                    "cos ", cos.sizes(), " and sin ", sin.sizes(), " must be [B, T, R] like ", name, " ", x.sizes(), ", with an even R of at most ",
                    head_size, ".");
  TORCH_CHECK_VALUE(cos.scalar_type() == sin.scalar_type() && (cos.scalar_type() == x.scalar_type() || cos.scalar_type() == computed_in(x)),
                    "cos and sin must be ", x.scalar_type(), " like ", name, ", or ", computed_in(x), ", but are ", cos.scalar_type(), " and ",
                    sin.scalar_type(), ".");
  TORCH_CHECK_VALUE(cos.device() == x.device() && sin.device() == x.device(), "cos and sin must be on ", x.device(), " like ", name, ".");
}

inline void fill_rotary(RotaryArgs& args, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& packed) {
  args.batch = packed.size(0);
  args.tokens = packed.size(1);
  args.half = cos.size(2) / 2;
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.has_wide_angles = cos.scalar_type() == computed_in(packed);
  args.packed = packed.mutable_data_ptr();
  args.batch_stride = packed.stride(0);
  args.token_stride = packed.stride(1);
}

template <typename Run>
void rotate_packed_by(const at::Tensor& packed, const at::Tensor& cos, const at::Tensor& sin, int64_t num_heads, int64_t num_kv_heads,
                      int64_t head_size, Run run) {
  const Storage storage = stored_as(packed, "packed");
  RotaryArgs args{};
  args.heads = {num_heads, num_kv_heads, head_size};
  TORCH_CHECK_VALUE(packed.dim() == 3 && num_heads > 0 && num_kv_heads > 0 && packed.size(2) == args.heads.row_size(), "packed ", packed.sizes(),
                    " must be [B, T, ", args.heads.row_size(), "] for ", num_heads, " heads and ", num_kv_heads, " key heads of ", head_size, ".");
  check_angles(packed, "packed", cos, sin, head_size);
  at::assert_no_internal_overlap(packed);
  const at::Tensor written = packed.stride(2) == 1 ? packed : packed.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  fill_rotary(args, cosines, sines, written);
  run(storage, args);
  if (!written.is_same(packed)) packed.copy_(written);
  packed.unsafeGetTensorImpl()->bump_version();  // so that autograd refuses whoever has saved the projection
}

template <typename Run>
at::Tensor rotate_packed_backward_by(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const at::Tensor& cos, const at::Tensor& sin,
                                     Run run) {
  const Storage storage = stored_as(dq, "dq");
  TORCH_CHECK_VALUE(dq.dim() == 4 && dk.dim() == 4 && dk.sizes() == dv.sizes() && dq.size(0) == dk.size(0) && dq.size(1) == dk.size(1) &&
                        dq.size(3) == dk.size(3) && dk.scalar_type() == dq.scalar_type() && dv.scalar_type() == dq.scalar_type(),
                    "dq ", dq.sizes(), ", dk ", dk.sizes(), ", dv ", dv.sizes(), " must be [B, T, N, H], [B, T, K, H], [B, T, K, H] of one dtype.");
  check_angles(dq, "dq", cos, sin, dq.size(3));
  const at::Tensor q = with_adjacent_heads(dq), k = with_adjacent_heads(dk), v = with_adjacent_heads(dv);
  const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  RotaryGradientArgs args{};
  args.heads = {dq.size(2), dk.size(2), dq.size(3)};
  at::Tensor packed = at::empty({dq.size(0), dq.size(1), args.heads.row_size()}, dq.options().memory_format(at::MemoryFormat::Contiguous));
  fill_rotary(args, cosines, sines, packed);
  args.dq = q.const_data_ptr();
  args.dk = k.const_data_ptr();
  args.dv = v.const_data_ptr();
  args.dq_strides = {q.stride(0), q.stride(1), q.stride(2)};
  args.dk_strides = {k.stride(0), k.stride(1), k.stride(2)};
  args.dv_strides = {v.stride(0), v.stride(1), v.stride(2)};
  run(storage, args);
  return packed;
}

}  // namespace sepllm
