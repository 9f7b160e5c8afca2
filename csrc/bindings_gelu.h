// Arguments and results of the bias + GELU operators, the same for every device. `run` computes on the device: run(storage, args).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "gelu_math.h"

namespace sepllm {

// x and bias as the kernels read them; keeps what had to be copied alive.
struct GeluInputs {
  at::Tensor x, bias;

  GeluInputs(const at::Tensor& given_x, const std::optional<at::Tensor>& given_bias) : x(given_x.contiguous()) {
    if (!given_bias.has_value()) return;
    TORCH_CHECK_VALUE(x.dim() >= 1 && given_bias->dim() == 1 && given_bias->size(0) == x.size(-1) && given_bias->scalar_type() == x.scalar_type() &&
                          given_bias->device() == x.device(),
                      "bias ", given_bias->sizes(), " ", given_bias->scalar_type(), " on ", given_bias->device(), " must be ", x.scalar_type(),
                      " on ", x.device(), " of the last axis of x ", x.sizes(), ".");
    bias = given_bias->contiguous();
  }

  void fill(GeluArgs& args, bool is_tanh) const {
    constexpr int64_t kCut = 16384;
    args.columns = bias.defined() ? x.size(-1) : kCut;
    args.elements = x.numel();
    args.rows = args.columns ? (args.elements + args.columns - 1) / args.columns : 0;
    args.is_tanh = is_tanh;
    args.x = x.const_data_ptr();
    args.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  }
};

template <typename Run>
at::Tensor bias_gelu_by(const at::Tensor& x, const std::optional<at::Tensor>& bias, bool is_tanh, Run run) {
  const Storage storage = stored_as(x, "x");
  const GeluInputs inputs(x, bias);
  GeluForwardArgs args{};
  inputs.fill(args, is_tanh);
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  args.out = out.mutable_data_ptr();
  run(storage, args);
  return out;
}

// Gradients of x and of the bias, empty where there is none.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> bias_gelu_backward_by(const at::Tensor& grad_out, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                                                         bool is_tanh, Run run) {
  const Storage storage = stored_as(x, "x");
  TORCH_CHECK_VALUE(grad_out.sizes() == x.sizes() && grad_out.scalar_type() == x.scalar_type() && grad_out.device() == x.device(),
                    "grad_out must be like x.");
  const GeluInputs inputs(x, bias);
  const at::Tensor grad = grad_out.contiguous();
  GeluBackwardArgs args{};
  inputs.fill(args, is_tanh);
  at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor dbias = at::empty({bias.has_value() ? args.columns : 0}, x.options());
  at::Tensor partial = at::empty({bias.has_value() ? gelu_segments(args.rows) * args.columns : 0}, x.options().dtype(computed_in(x)));
  args.grad_out = grad.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.dbias = dbias.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  run(storage, args);
  return {dx, dbias};
}

}  // namespace sepllm
