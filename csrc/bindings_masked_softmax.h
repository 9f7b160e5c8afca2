// Arguments and results of the masked softmax operators, the same for every device. `run` computes on the device: run(storage, args).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "bindings.h"
#include "masked_softmax_math.h"

namespace sepllm {

inline void fill_softmax(MaskedSoftmaxArgs& args, const at::Tensor& scores, double scale) {
  args.heads = scores.size(1);
  args.queries = scores.size(2);
  args.rows = scores.size(0) * args.heads * args.queries;
  args.columns = scores.size(3);
  args.scale = scale;
}

template <typename Run>
at::Tensor masked_softmax_by(const at::Tensor& scores, const at::Tensor& is_read, double scale, Run run) {
  TORCH_CHECK_VALUE(scores.dim() == 4 && is_read.dim() == 4 && is_read.scalar_type() == at::kBool && is_read.device() == scores.device() &&
                        is_read.size(0) == scores.size(0) && (is_read.size(1) == 1 || is_read.size(1) == scores.size(1)) &&
                        is_read.size(2) == scores.size(2) && is_read.size(3) == scores.size(3),
                    "scores ", scores.sizes(), " on ", scores.device(), " and is_read ", is_read.sizes(), " ", is_read.scalar_type(), " on ",
                    is_read.device(), ": they must be [B, N, T, S] and Bool [B, 1 or N, T, S] on one device.");
  const Storage storage = stored_as(scores, "scores");
  const at::Tensor read = scores.contiguous();
  const at::Tensor mask = (is_read.stride(3) == 1 || is_read.size(3) <= 1 ? is_read : is_read.contiguous()).expand(scores.sizes());
  at::Tensor weights = at::empty(scores.sizes(), scores.options().memory_format(at::MemoryFormat::Contiguous));
  MaskedSoftmaxForwardArgs args{};
  fill_softmax(args, read, scale);
  args.scores = read.const_data_ptr();
  args.is_read = mask.const_data_ptr<bool>();
  args.batch_stride = mask.stride(0);
  args.head_stride = mask.stride(1);
  args.query_stride = mask.stride(2);
  args.weights = weights.mutable_data_ptr();
  run(storage, args);
  return weights;
}

template <typename Run>
at::Tensor masked_softmax_backward_by(const at::Tensor& grad_weights, const at::Tensor& weights, double scale, Run run) {
  TORCH_CHECK_VALUE(weights.dim() == 4 && grad_weights.sizes() == weights.sizes() && grad_weights.scalar_type() == weights.scalar_type() &&
                        grad_weights.device() == weights.device(),
                    "weights ", weights.sizes(), " must be [B, N, T, S], and grad_weights like them.");
  const at::Tensor probabilities = weights.contiguous(), grads = grad_weights.contiguous();
  at::Tensor grad_scores = at::empty(weights.sizes(), weights.options().memory_format(at::MemoryFormat::Contiguous));
  MaskedSoftmaxBackwardArgs args{};
  fill_softmax(args, weights, scale);
  args.weights = probabilities.const_data_ptr();
  args.grad_weights = grads.const_data_ptr();
  args.grad_scores = grad_scores.mutable_data_ptr();
  run(stored_as(weights, "weights"), args);
  return grad_scores;
}

}  // namespace sepllm
