// Arguments and results of the cross-entropy operators, the same for every device. `run` computes on the device: run(storage, args).
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "bindings.h"
#include "cross_entropy_math.h"

namespace sepllm {

inline at::Tensor with_adjacent_columns(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

inline void check_logits(const at::Tensor& logits, const at::Tensor& labels) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) && labels.scalar_type() == at::kLong &&
                        labels.device() == logits.device(),
                    "logits ", logits.sizes(), " on ", logits.device(), " and labels ", labels.sizes(), " ", labels.scalar_type(), " on ",
                    labels.device(), ": they must be [T, V] and int64 [T] on one device.");
}

inline void fill_cross_entropy(CrossEntropyArgs& args, const at::Tensor& logits, const at::Tensor& labels, int64_t first_label) {
  args.rows = logits.size(0);
  args.columns = logits.size(1);
  args.row_stride = logits.stride(0);
  args.first_label = first_label;
  args.logits = logits.const_data_ptr();
  args.labels = labels.const_data_ptr<int64_t>();
}

template <typename Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_statistics_by(const at::Tensor& logits, const at::Tensor& labels, int64_t first_label,
                                                                           bool is_shard, Run run) {
  check_logits(logits, labels);
  const Storage storage = stored_as(logits, "logits");
  const at::Tensor read = with_adjacent_columns(logits), wanted = labels.contiguous();
  const auto wide = logits.options().dtype(computed_in(logits));
  at::Tensor maximum = at::empty({logits.size(0)}, wide), total = at::empty({logits.size(0)}, wide), target = at::empty({logits.size(0)}, wide);
  StatisticsArgs args{};
  fill_cross_entropy(args, read, wanted, first_label);
  args.is_shard = is_shard;
  args.maximum = maximum.mutable_data_ptr();
  args.total = total.mutable_data_ptr();
  args.target = target.mutable_data_ptr();
  run(storage, args);
  return {maximum, total, target};
}

// `gradient` may be `logits`; columns of both are adjacent.
template <typename Run>
void fill_with_gradient(const at::Tensor& gradient, const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum,
                        const at::Tensor& total, const at::Tensor& grad_losses, int64_t first_label, Run run) {
  for (const at::Tensor* x : {&maximum, &total, &grad_losses})
    TORCH_CHECK_VALUE(x->sizes() == labels.sizes() && x->scalar_type() == computed_in(logits) && x->device() == logits.device(),
                      "maximum, total and grad_losses must be ", computed_in(logits), " ", labels.sizes(), " on ", logits.device(), ", but one is ",
                      x->scalar_type(), " ", x->sizes(), " on ", x->device(), ".");
  const at::Tensor wanted = labels.contiguous(), largest = maximum.contiguous(), sums = total.contiguous(), grads = grad_losses.contiguous();
  GradientArgs args{};
  fill_cross_entropy(args, logits, wanted, first_label);
  args.maximum = largest.const_data_ptr();
  args.total = sums.const_data_ptr();
  args.grad_losses = grads.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  args.gradient_row_stride = gradient.stride(0);
  run(stored_as(logits, "logits"), args);
}

template <typename Run>
void cross_entropy_write_gradient_by(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum, const at::Tensor& total,
                                     const at::Tensor& grad_losses, int64_t first_label, Run run) {
  check_logits(logits, labels);
  at::assert_no_internal_overlap(logits);
  const at::Tensor written = with_adjacent_columns(logits);
  fill_with_gradient(written, written, labels, maximum, total, grad_losses, first_label, run);
  if (!written.is_same(logits)) logits.copy_(written);
  logits.unsafeGetTensorImpl()->bump_version();  // so that autograd refuses whoever has saved the logits
}

template <typename Run>
at::Tensor cross_entropy_gradient_by(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum, const at::Tensor& total,
                                     const at::Tensor& grad_losses, int64_t first_label, Run run) {
  check_logits(logits, labels);
  at::Tensor gradient = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  fill_with_gradient(gradient, with_adjacent_columns(logits), labels, maximum, total, grad_losses, first_label, run);
  return gradient;
}

// What autograd hangs the gradient of the logits on: they are not read.
inline at::Tensor cross_entropy_losses(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum, const at::Tensor& total,
                                       const at::Tensor& target, int64_t) {
  check_logits(logits, labels);
  return maximum.sub(target).add_(total.log());
}

}  // namespace sepllm
